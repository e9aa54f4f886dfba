//! Seeded random weights for measuring: each element is a function of seed, canonical name and global index, so that
//! every mesh makes the same ones. A rank makes only its own.

use std::ops::Range;
use std::sync::Mutex;
use std::thread::Builder;

use dist_core::philox::{NormalTable, stream_key};
use dist_core::{DType, TensorSpec};
use dist_kernels::weight::{HostPart, HostWeight, Layout};
use half::f16;

use super::error::CheckpointError;
use super::map::Fresh;
use crate::spare_threads::with_helpers;

/// Standard deviation of every weight.
const STD_DEV: f64 = 0.02;
/// Elements that a thread makes at a time; a multiple of eight.
const CHUNK: usize = 1 << 18;

/// A source of random weights.
pub(super) struct Random {
    seed: u64,
    table: NormalTable,
    n_threads: usize,
}

/// A run of rows of equal length in a global row-major tensor.
#[derive(Clone, Copy)]
struct Region {
    /// Global index of the first element.
    first: u64,
    /// Elements of a row.
    len: usize,
    /// Elements from one row to the next.
    stride: usize,
}

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { seed, table: NormalTable::new(STD_DEV), n_threads }
    }

    pub(super) fn weight(
        &self,
        spec: &TensorSpec,
        tp: usize,
        tp_rank: usize,
    ) -> Result<HostWeight, CheckpointError> {
        assert_eq!(spec.shape.len(), 2, "{} is a vector", spec.name);
        let (n_total, k_total, slice) = (spec.shape[0], spec.shape[1], spec.slice(tp, tp_rank));
        let n_outputs: usize = slice.ranges.iter().map(ExactSizeIterator::len).sum();
        let (n, k) = if slice.dim == 0 { (n_outputs, k_total) } else { (n_total, n_outputs) };
        let n_bytes = n * k * spec.dtype.bytes();
        let mut fresh = Fresh::zeroed(n_bytes).map_err(|source| CheckpointError::Memory {
            tensor: spec.name.clone(),
            n_bytes,
            source,
        })?;
        let mut rest = fresh.as_mut_slice();
        for range in slice.ranges {
            let (region, n_elements) = if slice.dim == 0 {
                let len = range.len() * k_total;
                (Region { first: (range.start * k_total) as u64, len, stride: len }, len)
            } else {
                let region = Region { first: range.start as u64, len: range.len(), stride: k_total };
                (region, range.len() * n_total)
            };
            let (out, after) = rest.split_at_mut(n_elements * spec.dtype.bytes());
            rest = after;
            if !out.is_empty() {
                self.fill(&spec.name, region, spec.dtype, out);
            }
        }
        let parts = match n_bytes {
            0 => Vec::new(),
            _ => vec![HostPart { bytes: fresh.share(), offset: 0, n, ld: k }],
        };
        Ok(HostWeight { parts, dtype: spec.dtype, layout: Layout::Nk, k })
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// Rows of the whole tensor, or elements of a vector.
    pub(super) fn rows(&self, spec: &TensorSpec, rows: Range<usize>, out: &mut [u8]) {
        if let Some(&k) = spec.shape.get(1) {
            let region = Region { first: (rows.start * k) as u64, len: rows.len() * k, stride: 0 };
            if !out.is_empty() {
                self.fill(&spec.name, region, spec.dtype, out);
            }
            return;
        }
        let value = Self::constant(spec);
        let cells = out.chunks_exact_mut(spec.dtype.bytes());
        match spec.dtype {
            DType::BF16 => cells.for_each(|cell| cell.copy_from_slice(&bf16_bytes(value))),
            DType::F16 => cells.for_each(|cell| cell.copy_from_slice(&f16::from_f32(value).to_le_bytes())),
            _ => cells.for_each(|cell| cell.copy_from_slice(&value.to_le_bytes())),
        }
    }

    /// Norm weights are one, biases zero.
    fn constant(spec: &TensorSpec) -> f32 {
        if spec.name.rsplit('.').next() == Some("bias") { 0.0 } else { 1.0 }
    }

    pub(super) fn vector(spec: &TensorSpec, tp: usize, tp_rank: usize) -> Vec<f32> {
        assert_eq!(spec.shape.len(), 1, "{} is a matrix", spec.name);
        vec![Self::constant(spec); spec.slice(tp, tp_rank).ranges.iter().map(ExactSizeIterator::len).sum()]
    }

    fn fill(&self, name: &str, region: Region, dtype: DType, out: &mut [u8]) {
        let key = stream_key(self.seed, name);
        match dtype {
            DType::BF16 => self.spread(key, region, out, bf16_bytes),
            DType::F16 => self.spread(key, region, out, |x| f16::from_f32(x).to_le_bytes()),
            _ => self.spread(key, region, out, f32::to_le_bytes),
        }
    }

    /// Deals chunks to the threads as they come free. Each element is its own function, so who makes it is no matter.
    fn spread<const N: usize>(
        &self,
        key: [u32; 2],
        region: Region,
        out: &mut [u8],
        encode: impl Fn(f32) -> [u8; N] + Sync,
    ) {
        let n_threads = self.n_threads.min(out.len().div_ceil(CHUNK * N));
        let (cells, _) = out.as_chunks_mut::<N>();
        let chunks = Mutex::new(cells.chunks_mut(CHUNK).enumerate());
        let work = || {
            while let Some((idx, chunk)) = chunks.lock().ok().and_then(|mut chunks| chunks.next()) {
                self.fill_chunk(key, region, idx * CHUNK, chunk, &encode);
            }
        };
        with_helpers(n_threads.saturating_sub(1), Builder::new, work, work);
    }

    /// The elements from local index `local` on.
    fn fill_chunk<const N: usize>(
        &self,
        key: [u32; 2],
        region: Region,
        local: usize,
        mut out: &mut [[u8; N]],
        encode: &impl Fn(f32) -> [u8; N],
    ) {
        let (mut row, mut col) = (local / region.len, local % region.len);
        while !out.is_empty() {
            let (run, rest) = out.split_at_mut(out.len().min(region.len - col));
            self.fill_run(key, region.first + (row * region.stride + col) as u64, run, encode);
            (out, row, col) = (rest, row + 1, 0);
        }
    }

    /// Neighbouring elements from global index `first` on.
    fn fill_run<const N: usize>(
        &self,
        key: [u32; 2],
        first: u64,
        out: &mut [[u8; N]],
        encode: &impl Fn(f32) -> [u8; N],
    ) {
        let n_head = ((8 - first % 8) % 8).min(out.len() as u64) as usize;
        let (head, rest) = out.split_at_mut(n_head);
        for (i, cell) in head.iter_mut().enumerate() {
            *cell = encode(self.table.at(key, first + i as u64));
        }
        let group = (first + n_head as u64) / 8;
        let (eights, tail) = rest.as_chunks_mut::<8>();
        let n_eights = eights.len() as u64;
        for (g, cells) in (group..).zip(eights) {
            *cells = self.table.eight(key, g).map(encode);
        }
        let last = self.table.eight(key, group + n_eights);
        for (cell, value) in tail.iter_mut().zip(last) {
            *cell = encode(value);
        }
    }
}

/// The nearest bf16, ties to even. `half` looks for NaN as well, which takes longer than to make the number.
fn bf16_bytes(x: f32) -> [u8; 2] {
    let bits = x.to_bits();
    (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_as_half_does() {
        let table = NormalTable::new(STD_DEV);
        for i in 0..1_000_000 {
            let x = table.at([1, 2], i);
            assert_eq!(bf16_bytes(x), half::bf16::from_f32(x).to_le_bytes());
        }
    }
}
