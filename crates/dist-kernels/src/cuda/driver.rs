//! A thin layer over NVIDIA's driver: what lives on a GPU is a value that frees itself, and every call that fails is an
//! error that names the call, what it was about, and what to do. It knows no op.
//!
//! Everything belongs to the thread that made it (nothing here is `Send` but a `Target`, which only names a place), and a
//! thread works with one GPU: so no call has to ask which context is the current one. What a kernel does with the
//! addresses in its arguments no type can check; launches and asynchronous copies are therefore private to this crate,
//! whose ops make them from buffers that they hold.

mod blas;
mod device;
mod error;
mod graph;
mod launch;
mod memory;
mod module;
mod product;
pub(super) mod signals;
mod stream;
mod tensor_map;

#[cfg(test)]
mod tests;

pub use blas::{Algo, Blas, BlasProduct};
pub use device::{Context, DeviceInfo, Driver};
pub use error::CudaError;
pub use graph::Graph;
pub use launch::Launch;
pub(crate) use memory::Target;
pub use memory::{DeviceMemory, PinnedMemory};
pub use module::{Function, Module};
pub(crate) use product::Operands;
pub use product::{EpilogueKind, ProductShape};
pub use stream::{Event, Stream};
pub use tensor_map::{CacheMapSpec, TensorMap, TensorMapSpec};

/// Result of a call.
pub type Result<T> = std::result::Result<T, CudaError>;
