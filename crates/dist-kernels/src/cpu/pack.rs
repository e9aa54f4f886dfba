//! Copies that make the inner loops simple: rows of `x` cut in segments, weights widened to tiles of `f32`.

use super::linear_order::Segments;
use super::simd::{LANES, Simd, Stored};

/// A tile of stored weights: `n` outputs by `len` inputs.
#[derive(Clone, Copy)]
pub(super) struct Source {
    /// Element (0, 0).
    pub(super) w: *const u8,
    /// Bytes from one stored row to the next: rows are outputs in `Nk`, inputs in `Kn`.
    pub(super) stride: usize,
    /// Outputs.
    pub(super) n: usize,
    /// Inputs.
    pub(super) len: usize,
}

/// Copies row `row` of `x` to `[segment][row][padded_len]`, filled up with zeros.
///
/// `piece(start, len)` gives the elements of the packed copy that belong to this row.
pub(super) fn pack_row<'a>(x: &[f32], segments: Segments, mut piece: impl FnMut(usize) -> &'a mut [f32]) {
    for idx in 0..segments.count {
        let (start, len) = segments.range(idx);
        let packed = piece(idx);
        packed[..len].copy_from_slice(&x[start..start + len]);
        packed[len..].fill(0.0);
    }
}

/// Widens a tile stored as `[n, k]` to `tile[n][stride]`, inputs filled up with zeros to a multiple of eight.
///
/// # Safety
/// `source` is readable; `tile` is writable for `n` times `stride`, which is at least `len` rounded up to eight.
#[inline(always)]
pub(super) unsafe fn widen_nk<S: Simd, E: Stored>(s: S, source: Source, tile: *mut f32, stride: usize) {
    for n in 0..source.n {
        for k in (0..source.len).step_by(LANES) {
            let len = LANES.min(source.len - k);
            // SAFETY: `len` elements of output `n` of the source, eight of the tile's, by the caller's promise.
            unsafe {
                let w = source.w.add(n * source.stride + k * E::BYTES);
                let w = if len == LANES { E::load(s, w) } else { E::load_partial(s, w, len) };
                s.store_ptr(w, tile.add(n * stride + k));
            }
        }
    }
}

/// Widens a tile stored as `[k, n]` to `tile[n][stride]`, both filled up with zeros to multiples of eight.
///
/// # Safety
/// `source` is readable; `tile` is writable for `n` rounded up to eight times `stride`, which is at least `len` rounded
/// up to eight.
#[inline(always)]
pub(super) unsafe fn widen_kn<S: Simd, E: Stored>(s: S, source: Source, tile: *mut f32, stride: usize) {
    for k in (0..source.len).step_by(LANES) {
        for n in (0..source.n).step_by(LANES) {
            let (height, width) = ((source.len - k).min(LANES), (source.n - n).min(LANES));
            let mut square = [s.zero(); LANES];
            // SAFETY: rows `k .. k + height` and columns `n .. n + width` lie in the source, and the eight by eight
            // elements from (n, k) on in the tile, by the caller's promise.
            unsafe {
                let w = source.w.add(k * source.stride + n * E::BYTES);
                if height == LANES && width == LANES {
                    for (i, row) in square.iter_mut().enumerate() {
                        *row = E::load(s, w.add(i * source.stride));
                    }
                } else {
                    for (i, row) in square.iter_mut().enumerate().take(height) {
                        *row = E::load_partial(s, w.add(i * source.stride), width);
                    }
                }
                for (i, column) in s.transpose(square).into_iter().enumerate() {
                    s.store_ptr(column, tile.add((n + i) * stride + k));
                }
            }
        }
    }
}
