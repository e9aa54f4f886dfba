//! The commands: flags into a request, the request into a result, the result onto the screen.

pub mod benchmark;
pub mod completions;
pub mod doctor;
pub mod export;
pub mod infer;
pub mod kernels;
pub mod plan;
pub mod shard;
