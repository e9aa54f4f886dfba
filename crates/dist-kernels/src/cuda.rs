//! NVIDIA GPUs. Nothing of CUDA is needed to build or to start this program: libraries are found and opened at run time
//! ([`libraries`]), kernels are compiled for the GPU that is found ([`compile`], [`nvrtc`]) and kept on disk
//! ([`cache`]), the driver is called through a thin layer ([`driver`]), and weights go to
//! the GPU past the readers of [`staging`]. Where cuBLASLt multiplies many rows faster than our own kernels, which was
//! measured and is kept on disk ([`plans`]), it does. [`CudaBackend`] runs the steps of a decoder with all of it.

mod args;
pub mod backend;
mod buf;
pub mod cache;
mod ceiling;
mod choice;
pub mod compile;
pub mod driver;
mod gathered;
mod gemms;
mod inputs;
mod launch;
mod launched;
pub mod libraries;
mod loaded;
pub mod nvrtc;
mod outputs;
pub mod plans;
mod regular_file;
mod sample;
pub mod staging;
mod tune;
pub mod units;
mod weight;

pub use backend::{CudaBackend, CudaOptions};
pub use buf::CudaBuf;
pub use driver::{EpilogueKind, ProductShape};
pub use gemms::GemmChoice;
pub use outputs::CudaFetch;
pub use tune::TuneReport;

#[cfg(test)]
mod test_support;
