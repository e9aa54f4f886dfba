//! `linear` for one row over `[k, n]`: vectors run along the outputs, with an accumulator for each lane of the
//! canonical order. Bound by reading the weights.

use std::marker::PhantomData;

use dist_core::shape::align_up;

use super::linear::{Outputs, Product};
use super::linear_finish::finish_row;
use super::linear_order::LEVELS;
use super::simd::{Kernel, LANES, Simd, Stored};

/// Outputs of one strip, at most: eight accumulators each, which stay in the second-level cache. As wide as can be,
/// because the processor's own prefetcher follows a stored row only as long as it goes on.
pub(super) const STRIP_MAX: usize = 4096;
/// Elements of a thread's scratch memory: lanes and the sums that wait.
pub(super) const SCRATCH_FLOATS: usize = (LANES + LEVELS) * STRIP_MAX;
/// Outputs of one strip, at least: whole cache lines of two-byte weights.
pub(super) const STRIP_MIN: usize = 64;
/// Inputs of one lane that are added together: an accumulator is then read and written once for so many of them.
const CHAIN: usize = 4;
/// Inputs of a round: so many of each lane.
const ROUND: usize = CHAIN * LANES;

/// A strip of outputs of one row.
pub(super) struct ColumnTask<'a, E> {
    product: &'a Product<'a>,
    outputs: Outputs<'a>,
    scratch: &'a mut [f32],
    stored: PhantomData<E>,
}

impl<'a, E> ColumnTask<'a, E> {
    pub(super) fn new(product: &'a Product<'a>, outputs: Outputs<'a>, scratch: &'a mut [f32]) -> Self {
        Self { product, outputs, scratch, stored: PhantomData }
    }
}

impl<E: Stored> Kernel for ColumnTask<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        linear_columns::<S, E>(s, self.product, self.outputs, self.scratch);
    }
}

/// `[lanes or levels][STRIP_MAX]`.
type Rows = [[f32; STRIP_MAX]];

// kernel
#[inline(always)]
fn linear_columns<S: Simd, E: Stored>(
    s: S,
    product: &Product<'_>,
    outputs: Outputs<'_>,
    scratch: &mut [f32],
) {
    let segments = product.segments;
    let (rows, _) = scratch.as_chunks_mut::<STRIP_MAX>();
    let (lanes, rows) = rows.split_at_mut(LANES);
    let waiting = &mut rows[..LEVELS];
    let mut depth = 0;
    for idx in 0..segments.count {
        for lane in lanes.iter_mut() {
            lane[..align_up(outputs.n, LANES)].fill(0.0);
        }
        add_segment::<S, E>(s, product, outputs, idx, lanes);
        let merges = segments.merges(idx);
        for n in (0..outputs.n).step_by(LANES) {
            let mut sum = add_lanes(s, lanes, n);
            for level in (depth - merges..depth).rev() {
                sum = s.add(s.load(&waiting[level][n..]), sum);
            }
            s.store(sum, &mut waiting[depth - merges][n..]);
        }
        depth = depth - merges + 1;
    }
    // SAFETY: these columns of the only row belong to this task alone.
    let out = unsafe { product.out.piece(outputs.column, outputs.n) };
    out.copy_from_slice(&waiting[0][..outputs.n]);
    finish_row(s, product, outputs, out);
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
    let whole = len / ROUND * ROUND;
    for first in (0..whole).step_by(ROUND) {
        for (j, lane) in (first..).zip(lanes.iter_mut()) {
            let x: [f32; CHAIN] = std::array::from_fn(|i| x[j + i * LANES]);
            add_inputs::<S, E, CHAIN>(s, x, std::array::from_fn(|i| row(j + i * LANES)), ROUND * ld, lane);
        }
    }
    for j in whole..len {
        add_inputs::<S, E, 1>(s, [x[j]], [row(j)], LANES * ld, &mut lanes[j % LANES]);
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

/// `lane += x · row` for `M` rows, one after the other; asks for the rows `ahead` bytes on.
#[inline(always)]
fn add_inputs<S: Simd, E: Stored, const M: usize>(
    s: S,
    x: [f32; M],
    rows: [&[u8]; M],
    ahead: usize,
    lane: &mut [f32; STRIP_MAX],
) {
    const LINE: usize = 64;
    let (x, n) = (x.map(|x| s.splat(x)), rows[0].len() / E::BYTES);
    let (whole, rest) = (n / LANES, n % LANES);
    assert!(n <= STRIP_MAX && rows.iter().all(|row| row.len() == n * E::BYTES), "a strip of {n} outputs");
    for row in rows {
        for line in (0..row.len()).step_by(LINE) {
            s.prefetch(row.as_ptr().wrapping_add(ahead + line));
        }
    }
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
