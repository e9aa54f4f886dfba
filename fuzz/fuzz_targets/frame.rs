//! Any bytes, in pieces, as what comes in from a connection; what must hold stands beside the tests of dist-comm, which
//! replay the seeds.
#![no_main]

#[path = "../../crates/dist-comm/tests/hostile/mod.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hostile::check(bytes));
