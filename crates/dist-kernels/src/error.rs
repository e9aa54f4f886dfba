//! What can go wrong below the model: memory, the device, a weight that no kernel takes.

use dist_core::DType;

use crate::cuda::driver::CudaError;

/// An error of a backend. Wrong shapes are our own bugs and panic in the args' `check` instead.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The device has less memory than asked for.
    #[error("out of memory for {what}: {needed} bytes needed, {available} available")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        needed: usize,
        /// Bytes that are left, zero if unknown.
        available: usize,
    },
    /// No kernel of this backend takes weights of this type.
    #[error("no kernel of the {backend} backend takes {dtype} weights")]
    WeightType {
        /// Name of the backend.
        backend: &'static str,
        /// The type that was given.
        dtype: DType,
    },
    /// A host range lies outside the bytes that hold it.
    #[error("weight part reads bytes {start}..{end} of {len}")]
    HostRange {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Bytes that there are.
        len: usize,
    },
    /// The instruction set asked for is not there.
    #[error("this machine has no {0}: choose another CPU path")]
    CpuPath(&'static str),
    /// Threads could not be started.
    #[error("cannot start worker threads")]
    Threads(#[from] std::io::Error),
    /// The GPU, its driver or its libraries.
    #[error(transparent)]
    Cuda(CudaError),
    /// The backend has no such facility.
    #[error("the {backend} backend cannot {what}")]
    Unsupported {
        /// Name of the backend.
        backend: &'static str,
        /// What was asked.
        what: &'static str,
    },
}

impl KernelError {
    /// Whether it may be of something that was asked for earlier: a GPU is asked first and works afterwards.
    pub fn may_be_late(&self) -> bool {
        matches!(self, Self::Cuda(CudaError::Call { .. } | CudaError::Blas { .. }))
    }
}

impl From<CudaError> for KernelError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::OutOfMemory { what, needed, free } => {
                Self::OutOfMemory { what, needed, available: free }
            }
            other => Self::Cuda(other),
        }
    }
}

/// Result of every backend method.
pub type Result<T> = std::result::Result<T, KernelError>;
