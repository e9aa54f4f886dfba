//! The second half of attention: values weighted and added, and the load of cached elements that both halves use.

use std::marker::PhantomData;
use std::ops::Range;

use super::simd::{LANES, Simd, Stored};

/// Values of some positions with the weights that `R` entries give them.
pub(super) struct Values<'a, T, const R: usize> {
    pub(super) v: &'a [u8],
    /// First element of each position, from `locate`.
    pub(super) offsets: &'a [usize],
    /// As many as `offsets` for each entry.
    pub(super) weights: [&'a [f32]; R],
    /// Elements of a row of sums.
    pub(super) width: usize,
    pub(super) dtype: PhantomData<T>,
}

impl<T: Stored, const R: usize> Values<'_, T, R> {
    /// Adds columns `column .. column + 8 · N`; `n` elements are left in each vector.
    #[inline(always)]
    pub(super) fn add<S: Simd, const N: usize>(&self, s: S, out: &mut [f32], column: usize, n: usize) {
        let mut sums = [[s.zero(); N]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (idx, sum) in sums.iter_mut().enumerate() {
                *sum = s.load(&out[r * self.width + column + idx * LANES..]);
            }
        }
        for (position, &offset) in self.offsets.iter().enumerate() {
            let mut values = [s.zero(); N];
            for (idx, value) in values.iter_mut().enumerate() {
                // SAFETY: `locate` saw that the `d_head` elements from `offset` on are in the cache, whose keys and
                // values are of one size; the columns lie within `d_head`.
                *value = unsafe { load::<S, T>(s, self.v, offset + column + idx * LANES, n) };
            }
            for (sums, weights) in sums.iter_mut().zip(&self.weights) {
                // SAFETY: `weigh` made each row of weights as long as `offsets`.
                let weight = s.splat(unsafe { *weights.get_unchecked(position) });
                for (sum, &value) in sums.iter_mut().zip(&values) {
                    *sum = s.fma(weight, value, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (idx, &sum) in sums.iter().enumerate() {
                s.store(sum, &mut out[r * self.width + column + idx * LANES..]);
            }
        }
    }
}

/// Elements `at .. at + n`, then zeros.
///
/// # Safety
/// `bytes` holds that many elements of type `T`.
#[inline(always)]
pub(super) unsafe fn load<S: Simd, T: Stored>(s: S, bytes: &[u8], at: usize, n: usize) -> S::V {
    // SAFETY: the caller vouches for the elements.
    unsafe {
        let p = bytes.as_ptr().add(at * T::BYTES);
        if n == LANES { T::load(s, p) } else { T::load_partial(s, p, n) }
    }
}

/// Asks for the cache lines that begin in these columns of the rows at `offsets`: blocks lie anywhere, so the processor
/// does not see them coming.
#[inline(always)]
pub(super) fn prefetch<S: Simd, T: Stored>(s: S, bytes: &[u8], offsets: &[usize], columns: Range<usize>) {
    const LINE: usize = 64;
    let first = (columns.start * T::BYTES).next_multiple_of(LINE);
    for at in (first..columns.end * T::BYTES).step_by(LINE) {
        for &offset in offsets {
            s.prefetch(bytes.as_ptr().wrapping_add(offset * T::BYTES + at));
        }
    }
}
