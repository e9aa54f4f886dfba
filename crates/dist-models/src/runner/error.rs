//! Why a step could not be run, for whoever has to find out.

use dist_comm::CommError;
use dist_core::Rank;
use dist_kernels::KernelError;

/// Why a step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The device.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device, in the middle of a step.
    #[error("step {step} failed on {rank}: {source}")]
    Step {
        /// Number of the step.
        step: u64,
        /// The rank whose device it is.
        rank: Rank,
        /// What the device says.
        source: KernelError,
    },
    /// Another rank, or the way to it.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A batch that is larger than what was planned for.
    #[error("step {step} has {found} {what}, the plan allows {limit}")]
    TooLarge {
        /// Number of the step.
        step: u64,
        /// Which array.
        what: &'static str,
        /// Its size.
        found: usize,
        /// What was planned.
        limit: usize,
    },
    /// Something went wrong before.
    #[error("this rank has failed and runs no more steps, start it anew: {first}")]
    Broken {
        /// What it was.
        first: String,
    },
}

impl RunError {
    /// Of a step, if it is the device's.
    pub(super) fn at(self, step: u64, rank: Rank) -> Self {
        match self {
            Self::Kernel(source) => Self::Step { step, rank, source },
            other => other,
        }
    }
}
