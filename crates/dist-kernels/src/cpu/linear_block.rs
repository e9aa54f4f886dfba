//! `linear` for several rows: weights are widened once to a tile of `f32` in the cache, and all rows of a block use it.
//! Bound by fused multiply-adds, with few rows also by reading the weights.

use std::marker::PhantomData;

use super::linear::{Outputs, Product};
use super::linear_finish::finish_row;
use super::linear_order::LEVELS;
use super::linear_tile::{Ahead, Operands, Part, Strip};
use super::pack::{Source, widen_kn, widen_nk};
use super::simd::{Kernel, LANES, Simd, Stored, StoredF32};
use crate::weight::Layout;

/// Rows of one block, at most.
pub(super) const BLOCK_ROWS_MAX: usize = 256;
/// Outputs of one task, at most.
pub(super) const BLOCK_WIDTH: usize = 96;
/// Outputs of the widened tile.
pub(super) const TILE_WIDTH: usize = 24;

/// Rows and outputs of the inner loop: twelve accumulators.
const R: usize = 4;
const N: usize = 3;
/// Inputs of the widened tile, at most: longer segments come in chunks, their lanes being kept in between.
const CHUNK: usize = 512;
/// Rows up to which each reads `[n, k]` weights as they are stored: widening would cost more than it saves.
const DIRECT_ROWS_MAX: usize = 8;
/// Tiles of rows in a block: all of four rows, but for the last two.
const ROW_TILES_MAX: usize = BLOCK_ROWS_MAX / R + 1;
const TILE_FLOATS: usize = TILE_WIDTH * CHUNK;
const SUMS_FLOATS: usize = ROW_TILES_MAX * (BLOCK_WIDTH / N) * 2 * LANES;
const SPILL_FLOATS: usize = ROW_TILES_MAX * (TILE_WIDTH / N) * R * N * LANES;

/// Elements of a thread's scratch memory.
pub(super) const SCRATCH_FLOATS: usize = TILE_FLOATS + (LEVELS - 1) * SUMS_FLOATS + SPILL_FLOATS;

/// Consecutive rows.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// Some outputs of a block of rows.
pub(super) struct BlockTask<'a, E> {
    product: &'a Product<'a>,
    outputs: Outputs<'a>,
    rows: Rows,
    /// The widened tile, `[outputs][chunk]`.
    tile: &'a mut [f32],
    /// Sums of segments that wait for their other half, `[level][tile]`, sixteen each.
    waiting: &'a mut [f32],
    /// Lanes of a segment that is longer than a chunk, `[tile]`.
    spill: &'a mut [f32],
    stored: PhantomData<E>,
}

impl<'a, E> BlockTask<'a, E> {
    pub(super) fn new(
        product: &'a Product<'a>,
        outputs: Outputs<'a>,
        rows: Rows,
        scratch: &'a mut [f32],
    ) -> Self {
        assert!(rows.len <= BLOCK_ROWS_MAX && outputs.n <= BLOCK_WIDTH, "the block fits its scratch");
        let (tile, rest) = scratch.split_at_mut(TILE_FLOATS);
        let (waiting, spill) = rest.split_at_mut((LEVELS - 1) * SUMS_FLOATS);
        Self { product, outputs, rows, tile, waiting, spill, stored: PhantomData }
    }
}

impl<E: Stored> Kernel for BlockTask<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        linear_block::<S, E>(s, &mut self);
    }
}

/// A part of a segment for some outputs.
#[derive(Clone, Copy)]
struct Chunk {
    segment: usize,
    /// First element in the segment.
    start: usize,
    len: usize,
    /// The segment ends here.
    is_last: bool,
    /// First output, in the task.
    output: usize,
    /// Outputs.
    n: usize,
}

impl Chunk {
    /// Elements from one output to the next in the tile.
    #[inline(always)]
    fn stride(self) -> usize {
        self.len.div_ceil(LANES) * LANES
    }
}

impl<E: Stored> BlockTask<'_, E> {
    #[inline(always)]
    fn chunk(&self, segment: usize, output: usize, start: usize) -> Chunk {
        let left = self.product.segments.range(segment).1 - start;
        let n = TILE_WIDTH.min(self.outputs.n - output);
        Chunk { segment, start, len: left.min(CHUNK), is_last: left <= CHUNK, output, n }
    }

    /// The chunk after `chunk`: inputs of the segment first, then outputs, then segments.
    #[inline(always)]
    fn after(&self, chunk: Chunk) -> Option<Chunk> {
        if !chunk.is_last {
            Some(self.chunk(chunk.segment, chunk.output, chunk.start + CHUNK))
        } else if chunk.output + chunk.n < self.outputs.n {
            Some(self.chunk(chunk.segment, chunk.output + chunk.n, 0))
        } else if chunk.segment + 1 < self.product.segments.count {
            Some(self.chunk(chunk.segment + 1, 0, 0))
        } else {
            None
        }
    }

    /// The weights behind the task's, which this thread multiplies next.
    fn ahead(&self) -> Ahead {
        let (outputs, k) = (self.outputs, self.product.segments.k);
        let stride = outputs.part.ld * E::BYTES;
        let end = outputs.start + outputs.n;
        let n = outputs.n.min(outputs.part.n - end);
        let base = outputs.part.data.bytes().as_ptr();
        match self.product.weight.layout {
            Layout::Nk => {
                let rate = (N * Ahead::lines_per_group::<E>()).div_ceil(self.rows.len.div_ceil(R));
                Ahead::new(base.wrapping_add(end * stride), n, k * E::BYTES, stride, rate)
            }
            Layout::Kn => Ahead::new(base.wrapping_add(end * E::BYTES), k, n * E::BYTES, stride, 2),
        }
    }

    /// The stored weights of a chunk.
    #[inline(always)]
    fn source(&self, chunk: Chunk) -> Source {
        let (bytes, stride) = (self.outputs.part.data.bytes(), self.outputs.part.ld * E::BYTES);
        let (height, width) = match self.product.weight.layout {
            Layout::Nk => (chunk.n, chunk.len),
            Layout::Kn => (chunk.len, chunk.n),
        };
        let k = self.product.segments.range(chunk.segment).0 + chunk.start;
        let n = self.outputs.start + chunk.output;
        let first = match self.product.weight.layout {
            Layout::Nk => n * stride + k * E::BYTES,
            Layout::Kn => k * stride + n * E::BYTES,
        };
        let end = first + height.saturating_sub(1) * stride + width * E::BYTES;
        assert!(height == 0 || end <= bytes.len(), "the chunk lies in its part");
        Source { w: bytes.as_ptr().wrapping_add(first), stride, n: chunk.n, len: chunk.len }
    }
}

// kernel
#[inline(always)]
fn linear_block<S: Simd, E: Stored>(s: S, task: &mut BlockTask<'_, E>) {
    let mut ahead = task.ahead();
    let mut next = Some(task.chunk(0, 0, 0));
    while let Some(chunk) = next {
        multiply(s, task, chunk, &mut ahead);
        next = task.after(chunk);
    }
    for row in task.rows.start..task.rows.start + task.rows.len {
        let at = row * task.product.weight.n + task.outputs.column;
        // SAFETY: these rows and columns belong to this task alone.
        let out = unsafe { task.product.out.piece(at, task.outputs.n) };
        finish_row(s, task.product, task.outputs, out);
    }
}

/// Multiplies a chunk with all rows of the block.
#[inline(always)]
fn multiply<S: Simd, E: Stored>(s: S, task: &mut BlockTask<'_, E>, chunk: Chunk, ahead: &mut Ahead) {
    let source = task.source(chunk);
    let (tile, stride) = (task.tile.as_mut_ptr(), chunk.stride());
    assert!(chunk.n.next_multiple_of(LANES) * stride <= task.tile.len(), "the tile fits");
    let mut is_widened = false;
    // SAFETY: source and tile are large enough by the two assertions.
    unsafe {
        if task.product.weight.layout == Layout::Kn {
            widen_kn::<S, E>(s, source, tile, stride);
            is_widened = true;
        } else if !chunk.n.is_multiple_of(N) {
            widen_nk::<S, E>(s, source, tile, stride);
            is_widened = true;
        }
    }
    let (mut row, mut idx) = (0, 0);
    while row < task.rows.len {
        // Four rows at a time; a single last row would leave the multipliers waiting, so five are three and two.
        let left = task.rows.len - row;
        let height = if left == R + 1 { R - 1 } else { left.min(R) };
        let place = Place { row, idx, source, is_widened };
        match height {
            1 => multiply_rows::<S, E, 1>(s, task, chunk, place, ahead),
            2 => multiply_rows::<S, E, 2>(s, task, chunk, place, ahead),
            3 => multiply_rows::<S, E, 3>(s, task, chunk, place, ahead),
            _ => multiply_rows::<S, E, R>(s, task, chunk, place, ahead),
        }
        row += height;
        idx += 1;
        is_widened |= task.rows.len > DIRECT_ROWS_MAX;
    }
}

/// Where a tile of rows stands.
#[derive(Clone, Copy)]
struct Place {
    /// First row, in the block.
    row: usize,
    /// Which tile of rows.
    idx: usize,
    source: Source,
    /// The tile holds the weights; else these rows read them as they are stored and widen them for the others.
    is_widened: bool,
}

/// Multiplies the chunk with `H` rows.
#[inline(always)]
fn multiply_rows<S: Simd, E: Stored, const H: usize>(
    s: S,
    task: &mut BlockTask<'_, E>,
    chunk: Chunk,
    place: Place,
    ahead: &mut Ahead,
) {
    let (product, stride) = (task.product, chunk.stride());
    let widened = (task.tile.as_mut_ptr(), stride);
    let part = Part { is_first: chunk.start == 0, is_last: chunk.is_last };
    let mut sums = [[[0.0; LANES]; 2]; TILE_WIDTH / N];
    let sums = &mut sums[..chunk.n.div_ceil(N)];
    let (lanes, _) = task.spill[place.idx * TILE_WIDTH * R * LANES..].as_chunks_mut();
    let x = product.x_at(chunk.segment, task.rows.start + place.row).wrapping_add(chunk.start);
    let x = (x, product.segments.padded_len());
    // SAFETY: packed rows and the tile are padded to whole steps. Outputs of the tile behind the chunk's are left over
    // from before, and nobody uses their sums. Stored weights are read only where the chunk is whole tiles of outputs,
    // which lie in their part as `source` asserted.
    unsafe {
        if place.is_widened {
            let w_stride = stride * size_of::<f32>();
            let from = (Operands::new(x, (widened.0.cast_const().cast(), w_stride), stride), w_stride);
            s.outlined(Strip::<StoredF32, H, N, false>::new(from, widened, lanes, (part, ahead), sums));
        } else {
            let w_stride = place.source.stride;
            let from = (Operands::new(x, (place.source.w, w_stride), chunk.len), w_stride);
            if task.rows.len > DIRECT_ROWS_MAX {
                s.outlined(Strip::<E, H, N, true>::new(from, widened, lanes, (part, ahead), sums));
            } else {
                s.outlined(Strip::<E, H, N, false>::new(from, widened, lanes, (part, ahead), sums));
            }
        }
    }
    if chunk.is_last {
        add_segment(s, task, chunk, place, sums, H);
    }
}

/// Adds a segment's sums to those that wait; the last segment's are written out.
#[inline(always)]
fn add_segment<S: Simd, E: Stored>(
    s: S,
    task: &mut BlockTask<'_, E>,
    chunk: Chunk,
    place: Place,
    sums: &[[[f32; LANES]; 2]],
    height: usize,
) {
    let segments = task.product.segments;
    let first = place.idx * (BLOCK_WIDTH / N) + chunk.output / N;
    let depth = chunk.segment.count_ones() as usize;
    let level = depth - segments.merges(chunk.segment);
    let is_whole = chunk.segment + 1 == segments.count;
    let (waiting, _) = task.waiting.as_chunks_mut::<LANES>();
    for (i, sums) in sums.iter().enumerate() {
        let at = |level: usize| level * (SUMS_FLOATS / LANES) + (first + i) * 2;
        let mut sums = [s.lanes(sums[0]), s.lanes(sums[1])];
        for level in (level..depth).rev() {
            let left = &waiting[at(level)..at(level) + 2];
            sums = [s.add(s.lanes(left[0]), sums[0]), s.add(s.lanes(left[1]), sums[1])];
        }
        let sums = [s.to_array(sums[0]), s.to_array(sums[1])];
        if !is_whole {
            waiting[at(level)..at(level) + 2].copy_from_slice(&sums);
            continue;
        }
        let (n, row) = (chunk.output + i * N, task.rows.start + place.row);
        let width = N.min(task.outputs.n - n);
        for r in 0..height {
            let at = (row + r) * task.product.weight.n + task.outputs.column + n;
            // SAFETY: these rows and columns belong to this task alone.
            let out = unsafe { task.product.out.piece(at, width) };
            out.copy_from_slice(&sums.as_flattened()[r * N..r * N + width]);
        }
    }
}
