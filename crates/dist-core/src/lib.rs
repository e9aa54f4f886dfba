//! Skeleton.

pub mod config;
mod decoder_specs;
pub mod dtype;
pub mod kv_layout;
pub mod mesh;
pub mod philox;
pub mod presets;
pub mod raw;
pub mod shape;
pub mod spec;

pub use config::{Activation, BlockSpec, ModelConfig, NormPosition};
pub use decoder_specs::decoder_specs;
pub use dtype::DType;
pub use kv_layout::KvLayout;
pub use mesh::{Coord, Mesh, Rank};
pub use spec::{Owner, Part, Placement, TensorSlice, TensorSpec};
