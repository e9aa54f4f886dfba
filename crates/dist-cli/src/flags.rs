//! Flags as facts: what the user wrote, checked one by one. Each group turns into a typed request elsewhere.

mod device;
mod limits;
mod mesh;
mod model;
mod numbers;
mod sampling;

pub mod benchmark;
pub mod doctor;
pub mod export;
pub mod infer;
pub mod kernels;
pub mod plan;
pub mod shard;

pub use device::{DeviceArgs, DeviceRequest};
pub use limits::{LimitArgs, check_room};
pub use mesh::{DegreeArgs, Degrees, MeshArgs, MeshRequest, Nodes};
pub use model::ModelArgs;
pub use sampling::SamplingArgs;
