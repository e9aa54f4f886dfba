//! The cuts that a rank holds: views of what is mapped, copies of what is read or lies in several files.

use std::ops::Range;
use std::sync::PoisonError;

use dist_core::{DType, TensorSpec};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};
use half::{bf16, f16};

use super::file::Rect;
use super::hashing::{Job, LARGE, hash};
use super::{Entry, Source, Storage, Stored, overlap};
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::map::Fresh;

/// Bytes that were taken of a file: views or copies of them, without gaps where they are a whole tensor.
struct Taken {
    file: usize,
    /// Where they lie in the file, for their order.
    offset: usize,
    bytes: HostBytes,
    at: usize,
    len: usize,
}

impl Stored {
    /// `is_head`: for the last stage, which reads a tied token table from its own file.
    pub(in crate::checkpoint) fn weight(
        &self,
        spec: &TensorSpec,
        seat: (usize, usize),
        is_head: bool,
    ) -> Result<HostWeight, CheckpointError> {
        let entry = if is_head { self.head_entry(spec)? } else { self.entry(spec)? };
        assert_eq!(entry.shape.len(), 2, "{} is a vector", spec.name);
        let (slice, k_total) = (spec.slice(seat.0, seat.1), entry.shape[1]);
        // Outputs and inputs of the cut: one of them is whole.
        let all_inputs = 0..k_total;
        let (outputs, inputs) = match slice.dim {
            0 => (slice.ranges, all_inputs),
            _ => (std::iter::once(0..entry.shape[0]).collect(), slice.ranges[0].clone()),
        };
        let is_apart = |source: &Source| overlap(&source.inputs, &inputs) != inputs;
        let (mut parts, mut taken) = (Vec::new(), Vec::new());
        for outputs in outputs.iter().filter(|outputs| !outputs.is_empty()) {
            if entry.sources(seat).all(is_apart) {
                parts.push(self.gather(&spec.name, entry, outputs.clone(), inputs.clone())?);
                continue;
            }
            for source in entry.sources(seat).filter(|source| !is_apart(source)) {
                let outputs = overlap(&source.outputs, outputs);
                if !outputs.is_empty() {
                    let rect = rect(source, entry.layout, &outputs, &inputs);
                    parts.push(self.part(&spec.name, source, rect, entry.layout, &mut taken)?);
                }
            }
        }
        self.compare(&spec.name, taken)?;
        Ok(HostWeight { parts, dtype: entry.sources[0].dtype, layout: entry.layout, k: inputs.len() })
    }

    fn part(
        &self,
        tensor: &str,
        source: &Source,
        rect: Rect,
        layout: Layout,
        taken: &mut Vec<Taken>,
    ) -> Result<HostPart, CheckpointError> {
        let n = if layout == Layout::Nk { rect.rows } else { rect.cols };
        let file = &self.files[source.file];
        let len = rect.rows * rect.cols * source.dtype.bytes();
        let part = match file.storage()? {
            Storage::Memory(bytes) => {
                file.touch(len);
                HostPart { bytes: bytes.clone(), offset: rect.offset, n, ld: rect.ld }
            }
            Storage::File(_) => {
                let mut fresh = fresh(tensor, len)?;
                file.read(rect, source.dtype, fresh.as_mut_slice())?;
                HostPart { bytes: fresh.share(), offset: 0, n, ld: rect.cols }
            }
        };
        let (bytes, at) = (part.bytes.clone(), part.offset);
        if rect.cols == rect.ld {
            taken.push(Taken { file: source.file, offset: rect.offset, bytes, at, len });
        }
        Ok(part)
    }

    /// A cut whose inputs lie in several files, in memory of its own.
    fn gather(
        &self,
        tensor: &str,
        entry: &Entry,
        outputs: Range<usize>,
        inputs: Range<usize>,
    ) -> Result<HostPart, CheckpointError> {
        let (n, k) = (outputs.len(), inputs.len());
        let mut fresh = fresh(tensor, n * k * entry.dtype().bytes())?;
        self.fill(Some(tensor), entry, (outputs, inputs), fresh.as_mut_slice())?;
        Ok(HostPart { bytes: fresh.share(), offset: 0, n, ld: k })
    }

    /// Tensors that were taken whole are compared to their hashes, file by file.
    fn compare(&self, tensor: &str, mut taken: Vec<Taken>) -> Result<(), CheckpointError> {
        taken.sort_by_key(|taken| (taken.file, taken.offset));
        for of_file in taken.chunk_by(|a, b| a.file == b.file) {
            let file = &self.files[of_file[0].file];
            let len = of_file.iter().map(|taken| taken.len).sum();
            if len < LARGE {
                let piece = |taken: &'_ Taken| taken.at..taken.at + taken.len;
                let pieces = of_file.iter().map(|taken| &taken.bytes.as_slice()[piece(taken)]);
                file.compare(tensor, pieces)?;
            } else if file.wants_comparing(tensor, len) {
                let pieces = of_file.iter().map(|taken| (taken.bytes.clone(), taken.at, taken.len));
                let (tensor, pieces) = (tensor.to_owned(), pieces.collect());
                let job = Job { file: of_file[0].file, tensor, pieces };
                let pushed = self.hashing.lock().unwrap_or_else(PoisonError::into_inner).push(job);
                // Where no thread can be started it is done here.
                if let Err(Job { tensor, pieces, .. }) = pushed {
                    file.compared(&tensor, hash(&pieces, &mut vec![0; LARGE]))?;
                }
            }
        }
        Ok(())
    }

    pub(in crate::checkpoint) fn vector(
        &self,
        spec: &TensorSpec,
        tp: usize,
        tp_rank: usize,
    ) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.entry(spec)?;
        assert_eq!(entry.shape.len(), 1, "{} is a matrix", spec.name);
        let (mut all, mut taken) = (Vec::new(), Vec::new());
        for range in spec.slice(tp, tp_rank).ranges {
            for source in entry.sources((tp, tp_rank)) {
                let outputs = overlap(&source.outputs, &range);
                if outputs.is_empty() {
                    continue;
                }
                let rect = rect(source, Layout::Nk, &outputs, &(0..1));
                let mut bytes = vec![0; outputs.len() * source.dtype.bytes()];
                self.files[source.file].read(rect, source.dtype, &mut bytes)?;
                extend_f32(&mut all, &bytes, source.dtype);
                let len = bytes.len();
                let bytes = HostBytes::new(bytes);
                taken.push(Taken { file: source.file, offset: rect.offset, bytes, at: 0, len });
            }
        }
        self.compare(&spec.name, taken)?;
        Ok(all)
    }
}

fn fresh(tensor: &str, n_bytes: usize) -> Result<Fresh, CheckpointError> {
    Fresh::zeroed(n_bytes).map_err(|source| CheckpointError::Memory {
        tensor: tensor.to_owned(),
        n_bytes,
        source,
    })
}

/// Where outputs × inputs, both within `source`, lie in its file.
pub(super) fn rect(source: &Source, layout: Layout, outputs: &Range<usize>, inputs: &Range<usize>) -> Rect {
    let local = |range: &Range<usize>, base: usize| range.start - base..range.end - base;
    let outputs = local(outputs, source.outputs.start);
    let inputs = local(inputs, source.inputs.start);
    let (rows, cols, ld) = match layout {
        Layout::Nk => (outputs, inputs, source.inputs.len()),
        Layout::Kn => (inputs, outputs, source.outputs.len()),
    };
    let offset = source.start + (rows.start * ld + cols.start) * source.dtype.bytes();
    Rect { offset, rows: rows.len(), cols: cols.len(), ld }
}

pub(super) fn extend_f32(out: &mut Vec<f32>, bytes: &[u8], dtype: DType) {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        DType::F16 => out.extend(pairs().map(|b| f16::from_le_bytes(b).to_f32())),
        DType::BF16 => out.extend(pairs().map(|b| bf16::from_le_bytes(b).to_f32())),
        _ => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    }
}
