//! GEMM, attention and sampling kernels behind one [`Backend`] trait.
pub mod args;
pub mod backend;
pub mod cpu;
pub mod error;
pub mod trace;
pub mod weight;

pub use args::Activation;
pub use backend::Backend;
pub use error::{KernelError, Result};
