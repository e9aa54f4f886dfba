//! Any bytes as a file of GEMM plans; what must hold stands beside the tests of dist-kernels, which replay the seeds.
#![no_main]

#[path = "../../crates/dist-kernels/tests/plan_file/mod.rs"]
mod plan_file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| plan_file::check(bytes));
