//! Why a step could not be run, for whoever has to find out.

use std::error::Error;
use std::fmt::{self, Write as _};

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
    #[error("{suspects}")]
    Step {
        /// Where, and which step it was or may have been.
        suspects: Box<Suspects>,
        /// What the device says.
        source: KernelError,
    },
    /// The device, at the start.
    #[error("the decode step of {rows} rows could not be recorded on {rank}")]
    Record {
        /// Rows of the step.
        rows: usize,
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

/// A step that an error may be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// Its number.
    pub step: u64,
    /// Rows of the graph that it ran as, if it was a recorded one.
    pub graph_rows: Option<usize>,
}

/// The steps that an error of a rank's device may be of: one that is asked for steps ahead says late what went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspects {
    /// The rank whose device it is.
    pub rank: Rank,
    /// Oldest first.
    pub steps: Vec<Suspect>,
}

impl fmt::Display for Suspects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, Suspect { step, graph_rows }) in self.steps.iter().enumerate() {
            f.write_str(if i == 0 { "" } else { " or " })?;
            write!(f, "step {step}")?;
            if let Some(rows) = graph_rows {
                write!(f, " (the graph of {rows} rows)")?;
            }
        }
        write!(f, " failed on {}", self.rank)
    }
}

/// An error and what is behind it in one sentence, for whoever gets no more than a text.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut told = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let _ = write!(told, ": {next}");
        cause = next.source();
    }
    told
}

impl RunError {
    /// Of `own`, if it is the device's, or of the steps in flight beside it, if the device says such errors late.
    pub(super) fn of(self, own: Suspect, beside: impl Iterator<Item = Suspect>, rank: Rank) -> Self {
        let Self::Kernel(source) = self else { return self };
        let mut steps = vec![own];
        if source.may_be_late() {
            steps.extend(beside);
            steps.sort_by_key(|suspect| suspect.step);
        }
        Self::Step { suspects: Box::new(Suspects { rank, steps }), source }
    }
}
