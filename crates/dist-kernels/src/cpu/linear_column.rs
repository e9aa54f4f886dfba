//! `linear` for one row over `[k, n]`: vectors run along the outputs, with an accumulator for each lane of the
//! canonical order. Bound by reading the weights.
//!
//! A task is one segment of some outputs, so that a thread reads whole stored rows one behind the other, as they lie in
//! memory; the sums of the segments are added afterwards.

use std::marker::PhantomData;

use dist_core::shape::align_up;

use super::linear::{Outputs, Product};
use super::linear_finish::finish_row;
use super::linear_order::Segments;
use super::linear_tile::Waiting;
use super::simd::{Kernel, LANES, Simd, Stored};

/// Outputs of one strip, at most: eight accumulators each, which stay in the second-level cache.
pub(super) const STRIP_MAX: usize = 4096;
/// Outputs of one strip, at least: whole cache lines of two-byte weights.
pub(super) const STRIP_MIN: usize = 64;
/// Outputs whose segments are added by one task.
pub(super) const SUM_WIDTH: usize = 1024;
/// Elements of a thread's scratch memory: the lanes.
pub(super) const SCRATCH_FLOATS: usize = LANES * STRIP_MAX;
/// Inputs of one lane that are added together, while there are as many: an accumulator is then read and written once for
/// all of them.
const LONG: usize = 8;
const SHORT: usize = 2;

/// Elements that the sums of all segments need.
pub(super) const fn sums_len(n: usize, segments: Segments) -> usize {
    n * segments.count
}

/// One segment of a strip of outputs of one row.
pub(super) struct ColumnTask<'a, E> {
    product: &'a Product<'a>,
    outputs: Outputs<'a>,
    segment: usize,
    scratch: &'a mut [f32],
    stored: PhantomData<E>,
}

impl<'a, E> ColumnTask<'a, E> {
    pub(super) fn new(
        product: &'a Product<'a>,
        outputs: Outputs<'a>,
        segment: usize,
        scratch: &'a mut [f32],
    ) -> Self {
        Self { product, outputs, segment, scratch, stored: PhantomData }
    }
}

impl<E: Stored> Kernel for ColumnTask<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        linear_columns::<S, E>(s, self.product, self.outputs, self.segment, self.scratch);
    }
}

/// `[lane][STRIP_MAX]`.
type Rows = [[f32; STRIP_MAX]];

// kernel
#[inline(always)]
fn linear_columns<S: Simd, E: Stored>(
    s: S,
    product: &Product<'_>,
    outputs: Outputs<'_>,
    segment: usize,
    scratch: &mut [f32],
) {
    let (rows, _) = scratch.as_chunks_mut::<STRIP_MAX>();
    let lanes = &mut rows[..LANES];
    for lane in lanes.iter_mut() {
        lane[..align_up(outputs.n, LANES)].fill(0.0);
    }
    add_segment::<S, E>(s, product, outputs, segment, lanes);
    // SAFETY: these columns of this segment belong to this task alone.
    let sums = unsafe { product.sums.piece(segment * product.weight.n + outputs.column, outputs.n) };
    let (whole, rest) = sums.as_chunks_mut::<LANES>();
    for (i, sums) in whole.iter_mut().enumerate() {
        *sums = s.to_array(add_lanes(s, lanes, i * LANES));
    }
    if !rest.is_empty() {
        s.store_partial(add_lanes(s, lanes, whole.len() * LANES), rest);
    }
}

/// Adds the sums of the segments of some outputs.
pub(super) struct SumTask<'a> {
    product: &'a Product<'a>,
    outputs: Outputs<'a>,
}

impl<'a> SumTask<'a> {
    pub(super) fn new(product: &'a Product<'a>, outputs: Outputs<'a>) -> Self {
        Self { product, outputs }
    }
}

impl Kernel for SumTask<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { product, outputs } = self;
        // SAFETY: these columns of the only row belong to this task alone.
        let out = unsafe { product.out.piece(outputs.column, outputs.n) };
        for n in (0..outputs.n).step_by(LANES) {
            let width = LANES.min(outputs.n - n);
            let (mut waiting, mut sum) = (Waiting::new(s), s.zero());
            for idx in 0..product.segments.count {
                let at = idx * product.weight.n + outputs.column + n;
                // SAFETY: as above, and those who wrote the sums are done.
                let sums = unsafe { product.sums.piece(at, width) };
                sum = waiting.push(s, product.segments, idx, s.load_partial(sums));
            }
            s.store_partial(sum, &mut out[n..n + width]);
        }
        finish_row(s, product, outputs, out);
    }
}

/// Adds one segment to the lanes.
#[inline(always)]
fn add_segment<S: Simd, E: Stored>(
    s: S,
    product: &Product<'_>,
    outputs: Outputs<'_>,
    idx: usize,
    lanes: &mut Rows,
) {
    let ((start, len), ld) = (product.segments.range(idx), outputs.part.ld * E::BYTES);
    let x = &product.x[idx * product.segments.padded_len()..];
    let bytes = outputs.part.data.bytes();
    let row = |j: usize| {
        let at = (start + j) * ld + outputs.start * E::BYTES;
        &bytes[at..at + outputs.n * E::BYTES]
    };
    let mut whole = 0;
    while len - whole >= LONG * LANES {
        for (j, lane) in (whole..).zip(lanes.iter_mut()) {
            add_inputs::<S, E, LONG>(s, &x[j..], std::array::from_fn(|i| row(j + i * LANES)), lane);
        }
        whole += LONG * LANES;
    }
    while len - whole >= SHORT * LANES {
        for (j, lane) in (whole..).zip(lanes.iter_mut()) {
            add_inputs::<S, E, SHORT>(s, &x[j..], std::array::from_fn(|i| row(j + i * LANES)), lane);
        }
        whole += SHORT * LANES;
    }
    for j in whole..len {
        add_inputs::<S, E, 1>(s, &x[j..], [row(j)], &mut lanes[j % LANES]);
    }
    for lane in lanes.iter_mut().skip(len % LANES) {
        if len.is_multiple_of(LANES) {
            break;
        }
        // The zeros that fill up the last step: they turn a lane of −0 into +0, here as in the other kernels.
        for n in (0..outputs.n).step_by(LANES) {
            s.store(s.fma(s.zero(), s.zero(), s.load(&lane[n..])), &mut lane[n..]);
        }
    }
}

/// `lane += x · row` for `M` rows, one after the other; `x` is that of the first row, and every eighth of the others.
#[inline(always)]
fn add_inputs<S: Simd, E: Stored, const M: usize>(
    s: S,
    x: &[f32],
    rows: [&[u8]; M],
    lane: &mut [f32; STRIP_MAX],
) {
    let x: [S::V; M] = std::array::from_fn(|i| s.splat(x[i * LANES]));
    let n = rows[0].len() / E::BYTES;
    let (whole, rest) = (n / LANES, n % LANES);
    assert!(n <= STRIP_MAX && rows.iter().all(|row| row.len() == n * E::BYTES), "a strip of {n} outputs");
    for step in 0..whole {
        // SAFETY: eight more elements of the rows, and of the lane, which is at least as long.
        unsafe {
            let lane = lane.as_mut_ptr().add(step * LANES);
            let mut sum = s.load_ptr(lane);
            for (&x, row) in x.iter().zip(rows) {
                sum = s.fma(x, E::load(s, row.as_ptr().add(step * LANES * E::BYTES)), sum);
            }
            s.store_ptr(sum, lane);
        }
    }
    if rest > 0 {
        let lane = &mut lane[whole * LANES..];
        let mut sum = s.load(lane);
        for (&x, row) in x.iter().zip(rows) {
            // SAFETY: `rest` elements of the row are left.
            let w = unsafe { E::load_partial(s, row.as_ptr().add(whole * LANES * E::BYTES), rest) };
            sum = s.fma(x, w, sum);
        }
        s.store(sum, lane);
    }
}

/// The sum over the lanes of outputs `n .. n + 8`, in the order of [`Simd::sum`].
#[inline(always)]
fn add_lanes<S: Simd>(s: S, lanes: &Rows, n: usize) -> S::V {
    s.add(
        s.add(add_pair(s, lanes, [0, 4], n), add_pair(s, lanes, [2, 6], n)),
        s.add(add_pair(s, lanes, [1, 5], n), add_pair(s, lanes, [3, 7], n)),
    )
}

#[inline(always)]
fn add_pair<S: Simd>(s: S, lanes: &Rows, [a, b]: [usize; 2], n: usize) -> S::V {
    s.add(s.load(&lanes[a][n..]), s.load(&lanes[b][n..]))
}
