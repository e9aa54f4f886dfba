//! Any bytes as config.json: an error, never a panic. There are no weights, so it is always an error.
#![no_main]

use dist_kernels::weight::HostBytes;
use dist_models::checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

/// A safetensors file without tensors.
const EMPTY: &[u8] = b"\x02\0\0\0\0\0\0\0{}";

fuzz_target!(|bytes: &[u8]| {
    let error = Checkpoint::from_bytes("fuzz", bytes, HostBytes::new(EMPTY), None).expect_err("no weights");
    assert!(error.to_string().len() < 20_000, "a message of bounded length");
});
