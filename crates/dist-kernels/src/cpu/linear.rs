//! `out = epilogue(x · weightᵀ)`: which kernel a product runs on and how it is cut into tasks.
//!
//! Three kernels, one order of summation (`linear_order`): few rows read stored weights straight into registers, one
//! row over a `[k, n]` weight runs along the outputs, all else widens weights to tiles that many rows use.

use std::sync::{Mutex, PoisonError};

use dist_core::DType;
use dist_core::shape::{align_up, div_ceil, split_even};

use super::buf::CpuBuf;
use super::linear_block::{self, BLOCK_ROWS_MAX, BLOCK_WIDTH, BlockTask, Rows, TILE_WIDTH};
use super::linear_column::{self, ColumnTask, STRIP_MAX, STRIP_MIN, SUM_WIDTH, SumTask};
use super::linear_order::Segments;
use super::linear_row::RowTask;
use super::norm::Floats;
use super::pack::pack_row;
use super::pool::{Disjoint, Pool};
use super::simd::{CpuKernels, Stored, StoredBf16, StoredF16, StoredF32};
use crate::args::Activation;
use crate::weight::{Layout, Weight, WeightPart};

/// A row count from which packing `x` is worth waking the other threads.
const PACK_ROWS_MIN: usize = 64;
/// Stored bytes of one task of few rows: large enough to stream, small enough to balance.
const TASK_BYTES_MAX: usize = 1 << 17;
/// Tasks a thread, at least, where the weight is large enough for them.
const TASKS_PER_THREAD: usize = 4;

/// What happens to the sums on their way out.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    /// `[n]`.
    pub(super) bias: Option<Floats<'a>>,
    /// After the bias.
    pub(super) activation: Option<Activation>,
}

/// One product, `x` packed.
pub(super) struct Product<'a> {
    /// `[segment][row][padded_len]`.
    pub(super) x: &'a [f32],
    /// `[rows, n]`; each task writes its own rows and columns.
    pub(super) out: Disjoint<'a, f32>,
    /// Sums of the segments, `[segment][n]`, for the kernel that needs them.
    pub(super) sums: Disjoint<'a, f32>,
    pub(super) weight: &'a Weight<CpuBuf>,
    pub(super) rows: usize,
    pub(super) segments: Segments,
    pub(super) finish: Finish<'a>,
}

impl Product<'_> {
    /// Row `row` of segment `segment` of packed `x`.
    #[inline(always)]
    pub(super) fn x_at(&self, segment: usize, row: usize) -> *const f32 {
        let stride = self.segments.padded_len();
        self.x[(segment * self.rows + row) * stride..].as_ptr()
    }
}

/// Consecutive outputs of one part of a weight.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    pub(super) part: &'a WeightPart<CpuBuf>,
    /// First output, in its part.
    pub(super) start: usize,
    /// First output, in the whole weight.
    pub(super) column: usize,
    pub(super) n: usize,
}

/// Memory that one thread needs for a tile or a strip, taken once.
pub(super) type ThreadScratch = Mutex<Vec<f32>>;

/// Elements of a [`ThreadScratch`].
pub(super) const SCRATCH_FLOATS: usize = {
    let (block, column) = (linear_block::SCRATCH_FLOATS, linear_column::SCRATCH_FLOATS);
    if block > column { block } else { column }
};

/// What `linear` runs on.
#[derive(Clone, Copy)]
pub(super) struct Runner<'a> {
    pub(super) kernels: CpuKernels,
    pub(super) pool: &'a Pool,
    /// One for each thread.
    pub(super) scratch: &'a [ThreadScratch],
}

/// Elements of packed `x`.
pub(super) fn packed_len(rows: usize, segments: Segments) -> usize {
    rows * segments.count * segments.padded_len()
}

/// Elements of [`Product::sums`].
pub(super) fn sums_len(weight: &Weight<CpuBuf>, rows: usize, segments: Segments) -> usize {
    if weight.layout == Layout::Kn && rows == 1 { linear_column::sums_len(weight.n, segments) } else { 0 }
}

/// Packs `x`, `[rows, k]`, into `[segment][row][padded_len]`.
pub(super) fn pack(pool: &Pool, x: &[f32], rows: usize, segments: Segments, packed: &mut [f32]) {
    let (k, stride) = (segments.k, segments.padded_len());
    let packed = Disjoint::new(packed);
    let pack = |row: usize| {
        pack_row(&x[row * k..(row + 1) * k], segments, |segment| {
            // SAFETY: each row has its own place in each segment.
            unsafe { packed.piece((segment * rows + row) * stride, stride) }
        });
    };
    if rows < PACK_ROWS_MIN { (0..rows).for_each(pack) } else { pool.run(rows, &pack) }
}

/// Computes a product whose shapes were checked.
pub(super) fn linear(runner: Runner<'_>, product: &Product<'_>) {
    if product.rows == 0 || product.weight.n == 0 {
        return;
    }
    match product.weight.dtype {
        DType::F32 => linear_stored::<StoredF32>(runner, product),
        DType::F16 => linear_stored::<StoredF16>(runner, product),
        DType::BF16 => linear_stored::<StoredBf16>(runner, product),
        dtype => unreachable!("`prepare` takes no {dtype} weights"),
    }
}

fn linear_stored<E: Stored>(runner: Runner<'_>, product: &Product<'_>) {
    let Product { weight, rows, .. } = *product;
    let threads = runner.pool.n_threads();
    match weight.layout {
        Layout::Nk if rows == 1 => {
            let bytes_per_output = (weight.k * E::BYTES).max(1);
            let width =
                width(weight.n, threads, 8).min(align_up(TASK_BYTES_MAX / bytes_per_output, 8)).max(8);
            run_tasks(runner.pool, weight, width, &|outputs, _| {
                runner.kernels.run(RowTask::<E>::new(product, outputs));
            });
        }
        Layout::Kn if rows == 1 => {
            let width = align_up(div_ceil(weight.n * product.segments.count, 2 * threads), STRIP_MIN);
            let width = width.clamp(STRIP_MIN, STRIP_MAX);
            let strips = n_tasks(weight, width);
            runner.pool.run_with_thread(strips * product.segments.count, &|idx, thread| {
                let (segment, outputs) = (idx / strips, outputs(weight, width, idx % strips));
                let mut scratch = runner.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
                runner.kernels.run(ColumnTask::<E>::new(product, outputs, segment, &mut scratch));
            });
            run_tasks(runner.pool, weight, SUM_WIDTH, &|outputs, _| {
                runner.kernels.run(SumTask::new(product, outputs));
            });
        }
        _ => linear_blocks::<E>(runner, product),
    }
}

fn linear_blocks<E: Stored>(runner: Runner<'_>, product: &Product<'_>) {
    let Product { weight, rows, .. } = *product;
    let rows_max =
        (BLOCK_FLOATS / product.segments.padded_len().max(1)).clamp(BLOCK_ROWS_MIN, BLOCK_ROWS_MAX);
    let n_blocks = div_ceil(rows, rows_max);
    // Few rows read a tile's weights as one stretch; many rows rather keep their segment of `x` in the cache.
    let width_max = if rows <= FEW_ROWS { TILE_WIDTH } else { BLOCK_WIDTH };
    let width = width(weight.n, runner.pool.n_threads(), TILE_WIDTH).clamp(TILE_WIDTH, width_max);
    let n_columns = n_tasks(weight, width);
    runner.pool.run_with_thread(n_columns * n_blocks, &|idx, thread| {
        let (start, len) = split_even(rows, n_blocks, idx % n_blocks);
        let outputs = outputs(weight, width, idx / n_blocks);
        let mut scratch = runner.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
        runner.kernels.run(BlockTask::<E>::new(product, outputs, Rows { start, len }, &mut scratch));
    });
}

/// Rows up to which reading the weights counts.
const FEW_ROWS: usize = 64;
/// Rows of a block, at least, where there are as many.
const BLOCK_ROWS_MIN: usize = 32;

/// Elements of `x` of one segment that one block of rows may have, so that they stay in the second-level cache.
const BLOCK_FLOATS: usize = 1 << 16;

/// Outputs of one task, a multiple of `step`.
fn width(n: usize, threads: usize, step: usize) -> usize {
    align_up(div_ceil(n, threads * TASKS_PER_THREAD), step)
}

/// Runs `task` for every `width` outputs of every part.
fn run_tasks<'a>(
    pool: &Pool,
    weight: &'a Weight<CpuBuf>,
    width: usize,
    task: &(dyn Fn(Outputs<'a>, usize) + Sync),
) {
    pool.run_with_thread(n_tasks(weight, width), &|idx, thread| task(outputs(weight, width, idx), thread));
}

/// Tasks of `width` outputs; none spans two parts.
fn n_tasks(weight: &Weight<CpuBuf>, width: usize) -> usize {
    weight.parts.iter().map(|part| div_ceil(part.n, width)).sum()
}

/// The outputs of task `idx`.
fn outputs(weight: &Weight<CpuBuf>, width: usize, mut idx: usize) -> Outputs<'_> {
    let mut column = 0;
    for part in &weight.parts {
        let here = div_ceil(part.n, width);
        if idx < here {
            let start = idx * width;
            return Outputs { part, start, column: column + start, n: width.min(part.n - start) };
        }
        idx -= here;
        column += part.n;
    }
    unreachable!("a task beyond the outputs")
}
