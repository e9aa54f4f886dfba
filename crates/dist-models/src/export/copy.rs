//! From one checkpoint to files of weights, on two threads: one reads and hashes whole tensors, the other cuts, hashes
//! the cuts and writes. Memory is a few pieces of bounded size, whatever the size of the model.

#[cfg(test)]
mod tests;
mod writer;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SendError, SyncSender, channel, sync_channel};
use std::thread::Builder;

use dist_core::{DType, TensorSpec};
use sha2::{Digest as _, Sha256};

use super::cast::cast;
use super::{ExportError, Progress, Watch};
use crate::checkpoint::Checkpoint;
use crate::manifest::layout::FileLayout;
use crate::manifest::{Digest, Split};
use writer::Writer;

/// Bytes that are read at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct PieceBytes {
    /// Where rows follow each other in the file.
    along: usize,
    /// Where they lie across it: longer runs of each line of it.
    across: usize,
}

impl PieceBytes {
    /// Small enough to be hashed and cut in the processor's cache.
    pub(super) const USUAL: Self = Self { along: 4 << 20, across: 32 << 20 };
}

/// Pieces that are on their way to the writer.
const AHEAD: usize = 4;

/// A tensor as it is and as it will be.
pub(super) struct Job {
    pub(super) source: TensorSpec,
    /// The type that it has.
    pub(super) from: DType,
    /// Whether its outputs lie across the source's file.
    pub(super) is_transposed: bool,
    /// Fewer rows, perhaps, and another type.
    pub(super) target: TensorSpec,
    /// The hash of its bytes before they are changed, where it is known.
    pub(super) expected: Option<Digest>,
}

/// What to copy, and where to.
pub(super) struct Order<'a> {
    pub(super) source: &'a Checkpoint,
    pub(super) jobs: &'a [Job],
    pub(super) split: &'a Split,
    /// The files, in order of ranks.
    pub(super) files: &'a [FileLayout],
    pub(super) paths: &'a [PathBuf],
    pub(super) piece_bytes: PieceBytes,
}

/// The hashes of what was copied.
pub(super) struct Copied {
    /// Of whole tensors, in canonical order.
    pub(super) whole: Vec<Digest>,
    /// Of each file's tensors, in order of ranks.
    pub(super) parts: Vec<Vec<Digest>>,
}

/// What the reader tells the writer.
enum Told {
    /// Rows of a tensor from `first` on.
    Rows { tensor: usize, first: usize, bytes: Vec<u8> },
    /// All rows of a tensor were told; its hash.
    End { tensor: usize, digest: Digest },
}

/// Copies everything; the files are on the disk when it returns. `thread` begins the writer's.
pub(super) fn run(
    order: &Order<'_>,
    watch: Watch<'_>,
    thread: fn() -> Builder,
) -> Result<Copied, ExportError> {
    let (told, pieces) = sync_channel(AHEAD);
    let (give_back, spare) = channel();
    std::thread::scope(|scope| {
        let write = move || {
            let mut writer = Writer::new(order);
            for piece in pieces {
                if let Some(bytes) = writer.take(piece)? {
                    // The reader may be done already.
                    let _ = give_back.send(bytes);
                }
            }
            writer.finish()
        };
        let writing = thread().spawn_scoped(scope, write).map_err(ExportError::Thread)?;
        let total_bytes = order.jobs.iter().map(|job| job.target.n_bytes() as u64).sum();
        let progress = Progress { done_bytes: 0, total_bytes };
        let mut reader = Reader { order, told, spare, raw: Vec::new(), watch, progress };
        let read = order.jobs.iter().enumerate().try_for_each(|(i, job)| reader.copy(i, job));
        drop(reader);
        let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (read, written) {
            // Where the writer failed, the reader only found nobody to tell.
            (_, Err(error)) | (Err(Stopped::Failed(error)), _) => Err(error),
            (_, Ok(written)) => Ok(written),
        }
    })
}

/// Why the reader does not go on.
enum Stopped {
    Failed(ExportError),
    /// The writer knows.
    NobodyListens,
}

impl<E: Into<ExportError>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

struct Reader<'a, 'w> {
    order: &'a Order<'a>,
    told: SyncSender<Told>,
    spare: Receiver<Vec<u8>>,
    /// Rows before they are cast.
    raw: Vec<u8>,
    watch: Watch<'w>,
    progress: Progress,
}

impl Reader<'_, '_> {
    fn copy(&mut self, tensor: usize, job: &Job) -> Result<(), Stopped> {
        let row_len = job.target.n_elements() / job.target.shape[0];
        let PieceBytes { along, across } = self.order.piece_bytes;
        let piece_bytes = if job.is_transposed { across } else { along };
        let widest = job.from.bytes().max(job.target.dtype.bytes());
        let step = (piece_bytes / (row_len * widest)).max(1);
        let (mut before, mut after) = (Sha256::new(), Sha256::new());
        let is_cast = job.from != job.target.dtype;
        for first in (0..job.target.shape[0]).step_by(step) {
            let rows = first..(first + step).min(job.target.shape[0]);
            let mut bytes = self.spare.try_recv().unwrap_or_default();
            let n_bytes = rows.len() * row_len * job.from.bytes();
            if is_cast {
                self.raw.resize(n_bytes, 0);
                self.order.source.read_rows(&job.source, rows, &mut self.raw)?;
                if job.expected.is_some() {
                    before.update(&self.raw);
                }
                bytes.clear();
                let (tensor, dtype) = (&job.target.name, job.target.dtype);
                cast(&self.raw, job.from, dtype, &mut bytes).map_err(|value| ExportError::Overflow {
                    tensor: tensor.clone(),
                    value,
                    dtype,
                })?;
            } else {
                bytes.resize(n_bytes, 0);
                self.order.source.read_rows(&job.source, rows, &mut bytes)?;
            }
            after.update(&bytes);
            self.progress.done_bytes += bytes.len() as u64;
            self.tell(Told::Rows { tensor, first, bytes })?;
            if (self.watch)(self.progress) == ControlFlow::Break(()) {
                return Err(ExportError::Interrupted.into());
            }
        }
        let digest = Digest(after.finalize().into());
        let found = if is_cast { Digest(before.finalize().into()) } else { digest };
        if let Some(expected) = job.expected.filter(|expected| *expected != found) {
            let (expected, found) = (expected.to_string(), found.to_string());
            return Err(ExportError::Source { tensor: job.target.name.clone(), expected, found }.into());
        }
        self.tell(Told::End { tensor, digest })
    }

    fn tell(&self, told: Told) -> Result<(), Stopped> {
        self.told.send(told).map_err(|SendError(_)| Stopped::NobodyListens)
    }
}
