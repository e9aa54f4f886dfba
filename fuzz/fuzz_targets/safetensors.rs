//! Any bytes as the weights of a tiny model: refused, or a checkpoint that can be read to its last element.
#![no_main]

use dist_core::decoder_specs;
use dist_kernels::weight::HostBytes;
use dist_models::checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

const CONFIG: &[u8] = include_bytes!("../seeds/config_json/gpt2.json");
/// Bytes of the tiny model's tensors in f32.
const DATA_BYTES: usize = 4320;

fn open(bytes: Vec<u8>) {
    let Ok(checkpoint) = Checkpoint::from_bytes("fuzz", CONFIG, HostBytes::new(bytes), None) else { return };
    for spec in decoder_specs(checkpoint.config()) {
        if spec.shape.len() == 2 {
            let weight = checkpoint.weight(&spec, 2, 1).expect("every tensor was found");
            weight.check().expect("every part lies within the file");
        } else {
            checkpoint.vector(&spec, 2, 1).expect("every tensor was found");
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    open(bytes.to_vec());
    open([&(bytes.len() as u64).to_le_bytes(), bytes, &[0; DATA_BYTES]].concat());
});
