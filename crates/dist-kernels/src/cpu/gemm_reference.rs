//! The `gemm` crate as a yardstick. Not part of the library: `benches/ceilings.rs` includes this file, which lies here
//! because the crate's entry point is `unsafe`.

use gemm::Parallelism;

/// `out[rows, n] = x[rows, k] · w[n, k]ᵀ` in f32.
pub(crate) fn gemm_f32(out: &mut [f32], x: &[f32], w: &[f32], [rows, n, k]: [usize; 3], threads: usize) {
    assert!(out.len() >= rows * n && x.len() >= rows * k && w.len() >= n * k, "shapes");
    let stride = |len: usize| isize::try_from(len).expect("a stride fits");
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // SAFETY: the three matrices lie in their slices by the assertion above, and `out` is borrowed mutably.
    unsafe {
        gemm::gemm(
            rows,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride(n),
            false,
            x.as_ptr(),
            1,
            stride(k),
            w.as_ptr(),
            stride(k),
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
