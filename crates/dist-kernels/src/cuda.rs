//! NVIDIA GPUs. Nothing of CUDA is needed to build or to start this program: libraries are found and opened at run time
//! ([`libraries`]), kernels are compiled for the GPU that is found ([`compile`], [`nvrtc`]) and kept on disk
//! ([`cache`]), the driver is called through a thin layer ([`driver`]), and weights go to
//! the GPU past the readers of [`staging`].

pub mod cache;
pub mod compile;
pub mod driver;
pub mod libraries;
pub mod nvrtc;
pub mod staging;
pub mod units;

#[cfg(test)]
mod test_support;
