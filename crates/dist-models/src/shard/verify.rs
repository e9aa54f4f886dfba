//! Compares every hash of an exported or sharded directory; all that differ are told, by file and tensor.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::Builder;

use dist_core::TensorSpec;
use sha2::{Digest as _, Sha256};

use crate::checkpoint::{Checkpoint, CheckpointError, Findings, OpenOptions};
use crate::export::{ExportError, Progress, Watch};
use crate::manifest::Digest;
use crate::manifest::layout::Slot;
use crate::spare_threads::with_helpers;

/// Hashing is bound by the cores, and more than two seldom read a disk faster.
const N_THREADS: usize = 2;
const PIECE_BYTES: usize = 4 << 20;

/// What was compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Files of weights.
    pub n_files: usize,
    /// Tensors in them.
    pub n_tensors: usize,
    /// Their bytes.
    pub n_bytes: u64,
}

/// A thing to hash: a tensor of a file, or a whole tensor that is cut over several.
#[derive(Clone)]
enum Task {
    Part { file: usize, name: String, bytes: Range<u64> },
    Whole { tensor: usize },
}

/// Compares every hash of `dir`.
pub fn verify(dir: &Path, watch: Watch<'_>) -> Result<Verified, ExportError> {
    let checkpoint = Checkpoint::open(dir, &OpenOptions { mmap: false })?;
    let Some(manifest) = checkpoint.manifest() else {
        return Err(CheckpointError::NoManifest { dir: dir.to_owned() }.into());
    };
    let files = manifest.files();
    let mut findings = Findings::default();
    let mut tasks = Vec::new();
    for (file, layout) in files.iter().enumerate() {
        // Header, length and the rank's own manifest.
        if let Err(error) = checkpoint.open_file(file) {
            match error {
                // It names the parts itself.
                CheckpointError::Parts { findings: found, .. } => findings.extend(found),
                error => {
                    // A finding is one line.
                    let lines: Vec<_> =
                        error.to_string().lines().map(|line| line.trim().to_owned()).collect();
                    findings.add(checkpoint.file_name(file), "a file as the manifest says", lines.join(" "));
                }
            }
            continue;
        }
        tasks.extend(layout.slots.iter().map(|slot| {
            let bytes = slot.offset..slot.offset + slot.length;
            Task::Part { file, name: slot.name.clone(), bytes }
        }));
    }
    let is_cut = |slot: &&Slot| slot.shape != manifest.tensors[slot.tensor].shape;
    let cut: BTreeSet<usize> =
        files.iter().flat_map(|file| &file.slots).filter(is_cut).map(|slot| slot.tensor).collect();
    let n_tensors = tasks.len();
    if findings.is_empty() {
        tasks.extend(cut.into_iter().map(|tensor| Task::Whole { tensor }));
    }
    let specs = manifest.specs();
    compare(&Held { checkpoint: &checkpoint, specs: &specs }, &tasks, &mut findings, watch)?;
    if !findings.is_empty() {
        return Err(CheckpointError::Parts { dir: dir.to_owned(), findings }.into());
    }
    let n_bytes = files.iter().map(|file| file.length).sum();
    Ok(Verified { n_files: files.len(), n_tensors, n_bytes })
}

/// What is hashed.
#[derive(Clone, Copy)]
struct Held<'a> {
    checkpoint: &'a Checkpoint,
    /// Of whole tensors.
    specs: &'a [TensorSpec],
}

fn compare(
    held: &Held<'_>,
    tasks: &[Task],
    findings: &mut Findings,
    watch: Watch<'_>,
) -> Result<(), ExportError> {
    let total_bytes = tasks.iter().map(|task| task.n_bytes(held)).sum();
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let (stop, wrong) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let work = |tell: &mut dyn FnMut()| {
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(task) = tasks.get(at) else { break };
            let hashed = task.hash(held, &mut |n_bytes| {
                done.fetch_add(n_bytes, Ordering::Relaxed);
                tell();
                !stop.load(Ordering::Relaxed)
            });
            if let Err(error) = hashed {
                wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((at, error));
            }
        }
    };
    let own = || {
        work(&mut || {
            let done_bytes = done.load(Ordering::Relaxed);
            if watch(Progress { done_bytes, total_bytes }) == ControlFlow::Break(()) {
                stop.store(true, Ordering::Relaxed);
            }
        });
    };
    with_helpers(N_THREADS - 1, Builder::new, || work(&mut || {}), own);
    if stop.load(Ordering::Relaxed) {
        return Err(ExportError::Interrupted);
    }
    let mut wrong = wrong.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    wrong.sort_by_key(|(at, _)| *at);
    for (at, error) in wrong {
        let what = tasks[at].name(held);
        match error {
            CheckpointError::Hash { expected, found, .. } => {
                findings.add(what, format!("SHA-256 {expected}"), found);
            }
            error => findings.add(what, "bytes that can be read", error.to_string()),
        }
    }
    Ok(())
}

impl Task {
    fn n_bytes(&self, held: &Held<'_>) -> u64 {
        match self {
            Self::Part { bytes, .. } => bytes.end - bytes.start,
            Self::Whole { tensor } => held.specs[*tensor].n_bytes() as u64,
        }
    }

    fn name(&self, held: &Held<'_>) -> String {
        match self {
            Self::Part { file, name, .. } => format!("{}, {name}", held.checkpoint.file_name(*file)),
            Self::Whole { tensor } => format!("{} over all ranks", held.specs[*tensor].name),
        }
    }

    /// Hashes it and compares; `go_on` hears of bytes and may say no.
    fn hash(&self, held: &Held<'_>, go_on: &mut dyn FnMut(u64) -> bool) -> Result<(), CheckpointError> {
        let checkpoint = held.checkpoint;
        let mut hasher = Sha256::new();
        match self {
            Self::Part { file, name, bytes } => {
                let mut piece = vec![0; PIECE_BYTES.min((bytes.end - bytes.start) as usize)];
                let mut at = bytes.start;
                while at < bytes.end {
                    let n = (bytes.end - at).min(PIECE_BYTES as u64) as usize;
                    checkpoint.read_file(*file, at, &mut piece[..n])?;
                    hasher.update(&piece[..n]);
                    at += n as u64;
                    if !go_on(n as u64) {
                        return Ok(());
                    }
                }
                checkpoint.expect_part(*file, name, Digest(hasher.finalize().into()))
            }
            Self::Whole { tensor } => {
                let spec = &held.specs[*tensor];
                let row_bytes = spec.n_bytes() / spec.shape[0];
                let step = (PIECE_BYTES / row_bytes).max(1);
                let mut piece = Vec::new();
                for first in (0..spec.shape[0]).step_by(step) {
                    let rows = first..(first + step).min(spec.shape[0]);
                    piece.resize(rows.len() * row_bytes, 0);
                    checkpoint.read_rows(spec, rows, &mut piece)?;
                    hasher.update(&piece);
                    if !go_on(piece.len() as u64) {
                        return Ok(());
                    }
                }
                checkpoint.expect_whole(*tensor, Digest(hasher.finalize().into()))
            }
        }
    }
}
