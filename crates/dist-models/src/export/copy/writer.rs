//! Cuts rows for the ranks that hold them, hashes the cuts, writes them where the layout says.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use dist_core::{Placement, Rank, TensorSlice, TensorSpec};
use sha2::{Digest as _, Sha256};

use super::super::ExportError;
use super::{Copied, Order, Told};
use crate::manifest::Digest;

/// A cut of the tensor that is being copied, and who holds it.
struct Cut {
    slice: TensorSlice,
    /// File and slot.
    holders: Vec<(usize, usize)>,
    /// `None` for a cut that is the whole, whose hash the reader makes.
    hasher: Option<Sha256>,
    written: u64,
}

pub(super) struct Writer<'a> {
    order: &'a Order<'a>,
    /// File and slot of each tensor.
    holders: Vec<Vec<(usize, usize)>>,
    /// Open between their first and their last tensor.
    files: Vec<Option<File>>,
    /// Tensors that are still to come, of each file.
    n_left: Vec<usize>,
    cuts: Vec<Cut>,
    /// Columns of a cut, gathered.
    columns: Vec<u8>,
    copied: Copied,
    flusher: Flusher,
}

impl<'a> Writer<'a> {
    pub(super) fn new(order: &'a Order<'a>) -> Self {
        let mut holders = vec![Vec::new(); order.jobs.len()];
        for (file, layout) in order.files.iter().enumerate() {
            for (at, slot) in layout.slots.iter().enumerate() {
                holders[slot.tensor].push((file, at));
            }
        }
        let none = Digest([0; 32]);
        Self {
            order,
            holders,
            files: order.files.iter().map(|_| None).collect(),
            n_left: order.files.iter().map(|layout| layout.slots.len()).collect(),
            cuts: Vec::new(),
            columns: Vec::new(),
            copied: Copied {
                whole: vec![none; order.jobs.len()],
                parts: order.files.iter().map(|layout| vec![none; layout.slots.len()]).collect(),
            },
            flusher: Flusher::start(),
        }
    }

    /// Takes the next piece; its memory comes back.
    pub(super) fn take(&mut self, told: Told) -> Result<Option<Vec<u8>>, ExportError> {
        match told {
            Told::Rows { tensor, first, bytes } => {
                if first == 0 {
                    self.begin(tensor)?;
                }
                let order = self.order;
                let mut cuts = std::mem::take(&mut self.cuts);
                let mut columns = std::mem::take(&mut self.columns);
                for cut in &mut cuts {
                    each_piece(
                        &order.jobs[tensor].target,
                        &cut.slice.clone(),
                        first,
                        &bytes,
                        &mut columns,
                        |piece| self.write(cut, piece),
                    )?;
                }
                (self.cuts, self.columns) = (cuts, columns);
                Ok(Some(bytes))
            }
            Told::End { tensor, digest } => {
                self.end(tensor, digest);
                Ok(None)
            }
        }
    }

    /// The cuts of a tensor; those of several files that are the same are one.
    fn begin(&mut self, tensor: usize) -> Result<(), ExportError> {
        let (spec, split) = (&self.order.jobs[tensor].target, self.order.split);
        let is_whole = split.tp == 1 || spec.placement == Placement::Replicated;
        let tp_rank = |file: usize| if is_whole { 0 } else { split.mesh().coord(Rank(file)).tp };
        let mut of_rank: Vec<Option<Cut>> = (0..split.tp).map(|_| None).collect();
        for (file, slot) in self.holders[tensor].clone() {
            self.open(file)?;
            let tp_rank = tp_rank(file);
            let cut = of_rank[tp_rank].get_or_insert_with(|| Cut {
                slice: spec.slice(split.tp, tp_rank),
                holders: Vec::new(),
                hasher: (!is_whole).then(Sha256::new),
                written: 0,
            });
            cut.holders.push((file, slot));
        }
        self.cuts = of_rank.into_iter().flatten().collect();
        Ok(())
    }

    fn open(&mut self, file: usize) -> Result<(), ExportError> {
        if self.files[file].is_some() {
            return Ok(());
        }
        let path = &self.order.paths[file];
        let create = || {
            let opened = OpenOptions::new().write(true).create_new(true).open(path)?;
            opened.write_all_at(&self.order.files[file].header, 0)?;
            Ok(opened)
        };
        self.files[file] = Some(create().map_err(ExportError::write(path))?);
        Ok(())
    }

    fn write(&self, cut: &mut Cut, piece: &[u8]) -> Result<(), ExportError> {
        if let Some(hasher) = &mut cut.hasher {
            hasher.update(piece);
        }
        for &(file, slot) in &cut.holders {
            let at = self.order.files[file].slots[slot].offset + cut.written;
            let open = self.files[file].as_ref().expect("opened with the tensor's first row");
            open.write_all_at(piece, at).map_err(ExportError::write(&self.order.paths[file]))?;
        }
        cut.written += piece.len() as u64;
        Ok(())
    }

    fn end(&mut self, tensor: usize, whole: Digest) {
        self.copied.whole[tensor] = whole;
        for cut in std::mem::take(&mut self.cuts) {
            let digest = cut.hasher.map_or(whole, |hasher| Digest(hasher.finalize().into()));
            for (file, slot) in cut.holders {
                assert_eq!(cut.written, self.order.files[file].slots[slot].length, "every row was cut once");
                self.copied.parts[file][slot] = digest;
                self.n_left[file] -= 1;
                if self.n_left[file] == 0
                    && let Some(done) = self.files[file].take()
                {
                    self.flusher.flush(self.order.paths[file].clone(), done);
                }
            }
        }
    }

    /// Waits until all files are on the disk.
    pub(super) fn finish(self) -> Result<Copied, ExportError> {
        self.flusher.finish()?;
        Ok(self.copied)
    }
}

/// The bytes of a cut in rows of the whole, in order of the cut's own layout. Rows come in ascending order, and parts
/// ascend too, so that piece follows piece.
fn each_piece(
    spec: &TensorSpec,
    slice: &TensorSlice,
    first: usize,
    rows: &[u8],
    columns: &mut Vec<u8>,
    mut give: impl FnMut(&[u8]) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let row_bytes = spec.n_bytes() / spec.shape[0];
    if slice.dim == 0 {
        let end = first + rows.len() / row_bytes;
        for range in &slice.ranges {
            let (start, end) = (range.start.max(first), range.end.min(end));
            if start < end {
                give(&rows[(start - first) * row_bytes..(end - first) * row_bytes])?;
            }
        }
        return Ok(());
    }
    columns.clear();
    let size = spec.dtype.bytes();
    for row in rows.chunks_exact(row_bytes) {
        for range in &slice.ranges {
            columns.extend_from_slice(&row[range.start * size..range.end * size]);
        }
    }
    give(columns)
}

/// Waits for the disk beside the writer, which goes on with the next file.
struct Flusher {
    files: Sender<(PathBuf, File)>,
    thread: JoinHandle<Result<(), ExportError>>,
}

impl Flusher {
    fn start() -> Self {
        let (files, done) = channel::<(PathBuf, File)>();
        let flush = move || {
            done.into_iter().try_for_each(|(path, file)| file.sync_all().map_err(ExportError::write(&path)))
        };
        Self { files, thread: std::thread::spawn(flush) }
    }

    /// After an error nobody listens; [`finish`](Self::finish) tells it.
    fn flush(&self, path: PathBuf, file: File) {
        let _ = self.files.send((path, file));
    }

    fn finish(self) -> Result<(), ExportError> {
        drop(self.files);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
