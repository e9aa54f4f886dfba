//! `linear` for one row over `[k, n]`: vectors run along the outputs, with an accumulator for each lane of the
//! canonical order. Bound by reading the weights.

use std::marker::PhantomData;

use super::linear::{Outputs, Product};
use super::linear_finish::finish_row;
use super::linear_order::LEVELS;
use super::simd::{Kernel, LANES, Simd, Stored};

/// Outputs of one strip, at most: eight accumulators each, which stay in the first-level cache.
pub(super) const STRIP_MAX: usize = 256;
/// Outputs of one strip, at least: whole cache lines of two-byte weights.
pub(super) const STRIP_MIN: usize = 64;
/// Inputs that are asked for ahead of their use.
const AHEAD: usize = 16;

/// A strip of outputs of one row.
pub(super) struct ColumnTask<'a, E> {
    product: &'a Product<'a>,
    outputs: Outputs<'a>,
    stored: PhantomData<E>,
}

impl<'a, E> ColumnTask<'a, E> {
    pub(super) fn new(product: &'a Product<'a>, outputs: Outputs<'a>) -> Self {
        Self { product, outputs, stored: PhantomData }
    }
}

impl<E: Stored> Kernel for ColumnTask<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        linear_columns::<S, E>(s, self.product, self.outputs);
    }
}

/// Accumulators of one strip: a row for each lane.
type Lanes = [[f32; STRIP_MAX]; LANES];

// kernel
#[inline(always)]
fn linear_columns<S: Simd, E: Stored>(s: S, product: &Product<'_>, outputs: Outputs<'_>) {
    let segments = product.segments;
    let mut waiting = [[0.0; STRIP_MAX]; LEVELS];
    let mut depth = 0;
    for idx in 0..segments.count {
        let mut lanes = [[0.0; STRIP_MAX]; LANES];
        add_segment::<S, E>(s, product, outputs, idx, &mut lanes);
        let merges = segments.merges(idx);
        for n in (0..outputs.n).step_by(LANES) {
            let mut sum = add_lanes(s, &lanes, n);
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
    lanes: &mut Lanes,
) {
    let ((start, len), ld) = (product.segments.range(idx), outputs.part.ld * E::BYTES);
    let x = &product.x[idx * product.segments.padded_len()..];
    let bytes = outputs.part.data.bytes();
    for j in 0..len {
        let at = (start + j) * ld + outputs.start * E::BYTES;
        let row = &bytes[at..at + outputs.n * E::BYTES];
        add_input::<S, E>(s, x[j], row, AHEAD * ld, &mut lanes[j % LANES]);
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

/// `lane += x · row`.
#[inline(always)]
fn add_input<S: Simd, E: Stored>(s: S, x: f32, row: &[u8], ahead: usize, lane: &mut [f32; STRIP_MAX]) {
    const LINE: usize = 64;
    let (x, n) = (s.splat(x), row.len() / E::BYTES);
    let (whole, rest) = (n / LANES, n % LANES);
    assert!(n <= STRIP_MAX, "a strip of {n} outputs");
    let w = row.as_ptr();
    for line in (0..row.len()).step_by(LINE) {
        s.prefetch(w.wrapping_add(ahead + line));
    }
    for step in 0..whole {
        // SAFETY: eight more elements of the row, and of the lane, which is at least as long.
        unsafe {
            let lane = lane.as_mut_ptr().add(step * LANES);
            s.store_ptr(s.fma(x, E::load(s, w.add(step * LANES * E::BYTES)), s.load_ptr(lane)), lane);
        }
    }
    if rest > 0 {
        let lane = &mut lane[whole * LANES..];
        // SAFETY: `rest` elements of the row are left.
        let w = unsafe { E::load_partial(s, w.add(whole * LANES * E::BYTES), rest) };
        s.store(s.fma(x, w, s.load(lane)), lane);
    }
}

/// The sum over the lanes of outputs `n .. n + 8`, in the order of [`Simd::sum`].
#[inline(always)]
fn add_lanes<S: Simd>(s: S, lanes: &Lanes, n: usize) -> S::V {
    s.add(
        s.add(add_pair(s, lanes, [0, 4], n), add_pair(s, lanes, [2, 6], n)),
        s.add(add_pair(s, lanes, [1, 5], n), add_pair(s, lanes, [3, 7], n)),
    )
}

#[inline(always)]
fn add_pair<S: Simd>(s: S, lanes: &Lanes, [a, b]: [usize; 2], n: usize) -> S::V {
    s.add(s.load(&lanes[a][n..]), s.load(&lanes[b][n..]))
}
