//! Skeleton.
pub mod dtype;
pub mod kv_layout;
pub mod philox;
pub mod raw;
pub mod shape;
pub use dtype::DType;
pub use kv_layout::KvLayout;
