//! What can go wrong below the model: memory, the device, a weight that no kernel takes.

use dist_core::DType;

use crate::cuda::driver::CudaError;

/// What to do where memory does not suffice.
pub(crate) const TAKE_LESS: &str = "take less at once: lower --max-seqs, --max-seq-len or --max-batch-tokens; or take a \
     smaller model, another GPU (--device cuda:N) or a machine with more memory; nvidia-smi says who holds a GPU's";
/// What to do where the system gives no thread.
pub(crate) const MORE_THREADS: &str =
    "raise the limit of processes: see `ulimit -u`, and the container's own (docker run --pids-limit)";

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
    /// What to do about it, if that is known.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::OutOfMemory { .. } => Some(TAKE_LESS.to_owned()),
            Self::Threads(_) => Some(MORE_THREADS.to_owned()),
            Self::Cuda(error) => error.help(),
            Self::WeightType { .. }
            | Self::HostRange { .. }
            | Self::CpuPath(_)
            | Self::Unsupported { .. } => None,
        }
    }

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
