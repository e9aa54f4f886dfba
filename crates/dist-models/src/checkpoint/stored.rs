//! Tensors of files under their canonical names: which pieces of which files make up each of them.

mod cuts;
mod file;
mod hashing;
mod resolve;
mod rows;

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use dist_core::{DType, TensorSpec};
use dist_kernels::weight::Layout;

use super::error::CheckpointError;
use crate::manifest::Origin;
pub(super) use file::{Seal, Storage, TensorFile};
use hashing::{Hashed, Hashing};

/// A piece of a canonical tensor: some of its outputs by some of its inputs, as it lies in a file.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) file: usize,
    pub(super) dtype: DType,
    /// Byte offset of its first element in the file.
    pub(super) start: usize,
    /// Outputs, or elements of a vector, in the canonical tensor.
    pub(super) outputs: Range<usize>,
    /// Inputs in the canonical tensor; one for vectors.
    pub(super) inputs: Range<usize>,
    /// The tensor-parallel rank whose file it is in, in a sharded directory.
    pub(super) holder: usize,
    /// Whether an earlier source is the same, for another rank.
    pub(super) is_copy: bool,
}

/// A canonical tensor: sources stacked along the outputs, or side by side along the inputs.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) sources: Vec<Source>,
    pub(super) layout: Layout,
    /// Canonical shape.
    pub(super) shape: Vec<usize>,
    /// The degree that it is cut for.
    pub(super) tp: usize,
    /// Where the values come from.
    pub(super) origin: Origin,
}

impl Entry {
    /// The type of all of it: the stored one, or f32 where the parts of a vector differ.
    fn dtype(&self) -> DType {
        let first = self.sources[0].dtype;
        if self.sources.iter().all(|source| source.dtype == first) { first } else { DType::F32 }
    }

    /// The sources that rank `tp_rank` of `tp` reads: its own where it is cut so, else one for each place.
    fn sources(&self, (tp, tp_rank): (usize, usize)) -> impl Iterator<Item = &Source> {
        let is_own = tp == self.tp;
        self.sources
            .iter()
            .filter(move |source| if is_own { source.holder == tp_rank } else { !source.is_copy })
    }

    /// Inputs; one for vectors.
    fn k(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }
}

/// All tensors of a model, by canonical name.
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) files: Vec<TensorFile>,
    pub(super) entries: HashMap<String, Entry>,
    /// The token table as the last stage holds it, where that is a file of its own.
    pub(super) head_table: Option<Entry>,
    pub(super) n_bytes: u64,
    /// Large tensors that are being compared to their hashes.
    pub(super) hashing: Mutex<Hashing>,
}

/// How much of a file was read or lent out as a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Touched {
    /// The file.
    pub path: PathBuf,
    /// Bytes of tensors; a byte that is taken twice counts twice.
    pub n_bytes: u64,
}

impl Stored {
    pub(super) fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Waits until all that was taken so far has been compared to its hashes.
    pub(super) fn compared(&self) -> Result<(), CheckpointError> {
        let mut hashing = self.hashing.lock().unwrap_or_else(PoisonError::into_inner);
        tracing::debug!(n = hashing.n_out(), "tensors are still being hashed");
        let mut told = Ok(());
        while let Some(Hashed { file, tensor, digest }) = hashing.next() {
            let compared = self.files[file].compared(&tensor, digest);
            told = told.and(compared);
        }
        told
    }

    pub(super) fn touched(&self) -> Vec<Touched> {
        self.files.iter().map(TensorFile::touched).collect()
    }

    pub(super) fn dtype(&self, spec: &TensorSpec) -> Result<DType, CheckpointError> {
        Ok(self.entry(spec)?.dtype())
    }

    pub(super) fn is_transposed(&self, spec: &TensorSpec) -> Result<bool, CheckpointError> {
        Ok(self.entry(spec)?.layout == Layout::Kn)
    }

    pub(super) fn origin(&self, spec: &TensorSpec) -> Result<&Origin, CheckpointError> {
        Ok(&self.entry(spec)?.origin)
    }

    fn entry(&self, spec: &TensorSpec) -> Result<&Entry, CheckpointError> {
        let entry = self.entries.get(&spec.name).filter(|entry| entry.shape == spec.shape);
        entry.ok_or_else(|| CheckpointError::NoTensor {
            name: self.name.clone(),
            tensor: spec.name.clone(),
            shape: spec.shape.clone(),
        })
    }

    /// The entry, or its copy in the last stage's files.
    fn head_entry(&self, spec: &TensorSpec) -> Result<&Entry, CheckpointError> {
        match self.head_table.as_ref().filter(|entry| entry.shape == spec.shape) {
            Some(entry) if spec.name == dist_core::plan::TOKEN_TABLE => Ok(entry),
            _ => self.entry(spec),
        }
    }
}

/// The overlap of two ranges, empty where there is none.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
