//! `linear` for one row over `[n, k]`: weights go from memory to registers, several outputs at once. Bound by reading
//! the weights.

use std::marker::PhantomData;

use super::linear::{Outputs, Product};
use super::linear_finish::finish_row;
use super::linear_tile::{Ahead, Operands, Waiting, dot, sum_lanes};
use super::simd::{Kernel, LANES, Simd, Stored};

/// Outputs at once.
const N: usize = LANES;

/// Some outputs of the only row.
pub(super) struct RowTask<'a, E> {
    product: &'a Product<'a>,
    outputs: Outputs<'a>,
    stored: PhantomData<E>,
}

impl<'a, E> RowTask<'a, E> {
    pub(super) fn new(product: &'a Product<'a>, outputs: Outputs<'a>) -> Self {
        Self { product, outputs, stored: PhantomData }
    }
}

impl<E: Stored> Kernel for RowTask<'_, E> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        linear_row::<S, E>(s, self.product, self.outputs);
    }
}

// kernel
#[inline(always)]
fn linear_row<S: Simd, E: Stored>(s: S, product: &Product<'_>, outputs: Outputs<'_>) {
    // SAFETY: these columns of the only row belong to this task alone.
    let out = unsafe { product.out.piece(outputs.column, outputs.n) };
    let mut first = 0;
    let (whole, rest) = out.as_chunks_mut::<N>();
    for out in whole {
        *out = s.to_array(sum_outputs::<S, E, N>(s, product, outputs, first));
        first += N;
    }
    for out in rest {
        *out = s.to_array(sum_outputs::<S, E, 1>(s, product, outputs, first))[0];
        first += 1;
    }
    finish_row(s, product, outputs, out);
}

/// Outputs `first .. first + M` of the task, in the first lanes.
#[inline(always)]
fn sum_outputs<S: Simd, E: Stored, const M: usize>(
    s: S,
    product: &Product<'_>,
    outputs: Outputs<'_>,
    first: usize,
) -> S::V {
    let (segments, stride) = (product.segments, outputs.part.ld * E::BYTES);
    let bytes = &outputs.part.data.bytes()[(outputs.start + first) * stride..];
    assert!(bytes.len() >= (M - 1) * stride + segments.k * E::BYTES, "outputs lie in their part");
    let mut waiting = Waiting::new(s);
    let mut sum = s.zero();
    let row_bytes = segments.k * E::BYTES;
    let next = bytes.as_ptr().wrapping_add(M * stride);
    let mut ahead = Ahead::new(next, M, row_bytes, stride, M * Ahead::lines_per_group::<E>());
    for idx in 0..segments.count {
        let (start, len) = segments.range(idx);
        let w = bytes.as_ptr().wrapping_add(start * E::BYTES);
        let from = Operands::new((product.x_at(idx, 0), 0), (w, stride), len);
        let zero = [[s.zero(); M]; 1];
        // SAFETY: M outputs of k elements lie in `bytes`, and the packed row is padded to whole steps.
        let acc = unsafe { dot::<S, E, 1, M, false>(s, from, zero, [std::ptr::null_mut(); M], &mut ahead) };
        sum = waiting.push(s, segments, idx, sum_lanes(s, acc)[0]);
    }
    sum
}
