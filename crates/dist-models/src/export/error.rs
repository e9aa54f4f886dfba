//! Why a checkpoint could not be written: what, where, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use dist_core::DType;
use dist_core::plan::PlanError;

use crate::checkpoint::CheckpointError;
use crate::engine::EngineError;

/// Why a checkpoint could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The source.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A split that the model does not allow.
    #[error("the model cannot be cut so: {0}")]
    Plan(PlanError),
    /// More positions than the model knows.
    #[error("--max-seq-len {asked}: the model knows {n_ctx} positions")]
    TooLong {
        /// What was asked for.
        asked: usize,
        /// The model's context.
        n_ctx: usize,
    },
    /// Something is at the target.
    #[error("{}: exists already", dir.display())]
    Exists {
        /// The target.
        dir: PathBuf,
    },
    /// Something is at the target that this program did not write.
    #[error("{}: is no checkpoint of this program, it is not replaced", dir.display())]
    Foreign {
        /// The target.
        dir: PathBuf,
    },
    /// Somebody else writes there.
    #[error("{}: another run writes it now", dir.display())]
    Busy {
        /// The target.
        dir: PathBuf,
    },
    /// Too little space.
    #[error("{}: {needed} bytes are needed, {available} are free; nothing was written", dir.display())]
    NoSpace {
        /// The target.
        dir: PathBuf,
        /// Bytes of all files.
        needed: u64,
        /// What the file system has left.
        available: u64,
    },
    /// The system refused.
    #[error("{}: cannot be written; the target is as it was", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The thread that writes could not be started.
    #[error("no thread could be started to write the files; the target is as it was")]
    Thread(#[source] io::Error),
    /// A value that the type cannot hold.
    #[error("{tensor}: has {value}, which {dtype} cannot hold")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
        /// The type that was asked for.
        dtype: DType,
    },
    /// A source whose bytes are not what its manifest says.
    #[error("{tensor}: the source's bytes have SHA-256 {found}, its manifest says {expected}")]
    Source {
        /// The tensor.
        tensor: String,
        /// The manifest's.
        expected: String,
        /// That of the bytes.
        found: String,
    },
    /// The probe could not be computed.
    #[error("the golden log-probabilities could not be computed")]
    Probe(#[from] EngineError),
    /// The model does not compute.
    #[error("the model gives a log-probability of {found}: its weights are damaged")]
    NotFinite {
        /// What it gave.
        found: f32,
    },
    /// The user said to stop.
    #[error("interrupted; the target is as it was")]
    Interrupted,
}

// Its sentence is in this one's, so that it is not its source as well.
impl From<PlanError> for ExportError {
    fn from(error: PlanError) -> Self {
        Self::Plan(error)
    }
}

impl ExportError {
    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Write { path, source }
    }

    /// What to do about it, where there is something to do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Checkpoint(error) => return error.help(),
            Self::Plan(_) => "choose --tp, --pp and --stages that the model allows".to_owned(),
            Self::TooLong { n_ctx, .. } => format!("use at most --max-seq-len {n_ctx}"),
            Self::Exists { .. } => "choose another --out, or replace it with --overwrite".to_owned(),
            Self::Foreign { .. } => "choose another --out, or remove it yourself".to_owned(),
            Self::Busy { .. } => "wait for that run, or choose another --out".to_owned(),
            Self::NoSpace { .. } => "free space, or choose another --out".to_owned(),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "free space, or choose another --out".to_owned()
            }
            Self::Write { .. } => "check that you may write there, and that the disk is not full".to_owned(),
            Self::Thread(_) => {
                "raise the limit of processes: see `ulimit -u`, and the container's own (docker run --pids-limit)"
                    .to_owned()
            }
            Self::Overflow { .. } => "use --dtype bf16, which has f32's range".to_owned(),
            Self::Source { .. } => {
                "a byte has changed: dist-cli shard --verify says in which file".to_owned()
            }
            Self::NotFinite { .. } => "compare the source's checksums with the published ones".to_owned(),
            Self::Probe(_) | Self::Interrupted => return None,
        })
    }
}
