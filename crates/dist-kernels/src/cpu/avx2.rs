//! Eight lanes as one AVX2 register.

#[allow(clippy::wildcard_imports, reason = "every name begins with _mm and cannot be mistaken")]
use std::arch::x86_64::*;

use super::simd::{Kernel, LANES, Simd};

/// The proof that this machine has AVX2, FMA and F16C: only [`Avx2::detect`] makes one.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Looks at the machine.
    pub(crate) fn detect() -> Option<Self> {
        let all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }

    /// Runs a kernel compiled with these instructions.
    #[inline]
    pub(crate) fn enter<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: the features of `with_avx2` exist, since `self` was made by `detect`.
        unsafe { with_avx2(self, kernel) }
    }
}

/// The only function of the crate that is compiled with these features; kernels are inlined into it.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<K: Kernel>(avx2: Avx2, kernel: K) -> K::Out {
    kernel.run(avx2)
}

/// Places eight 16-bit numbers, given in both halves of a register, in the upper halves of its lanes; −128 is zero.
static UPPER_HALVES: __m256i = {
    let places: [i8; 32] = [
        -128, -128, 0, 1, -128, -128, 2, 3, -128, -128, 4, 5, -128, -128, 6, 7, //
        -128, -128, 8, 9, -128, -128, 10, 11, -128, -128, 12, 13, -128, -128, 14, 15,
    ];
    // SAFETY: both types are 32 plain bytes.
    unsafe { std::mem::transmute(places) }
};

/// Wraps intrinsics that touch no memory.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the instruction exists, since `self` was made by `detect`; it touches no memory.
        unsafe { $e }
    };
}

impl Simd for Avx2 {
    type V = __m256;
    type I = __m256i;
    type M = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        op!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn lanes(self, x: [f32; LANES]) -> __m256 {
        // SAFETY: the instruction exists, since `self` was made by `detect`; the array has eight floats.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn to_array(self, v: __m256) -> [f32; LANES] {
        let mut x = [0.0; LANES];
        // SAFETY: the instruction exists, since `self` was made by `detect`; the array has eight floats.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) };
        x
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m256 {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: __m256, p: *mut f32) {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m256 {
        // SAFETY: the caller vouches for 16 bytes.
        let half = unsafe { _mm_loadu_si128(p.cast()) };
        // One shuffle puts each number in the upper half of its lane; widening and shifting would be two or three. Its
        // pattern is read from memory every time: kept in a register, it would push an accumulator out of its own.
        // SAFETY: a read of a constant.
        let upper = unsafe { std::ptr::read_volatile(&raw const UPPER_HALVES) };
        op!(_mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), upper)))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        // SAFETY: the caller vouches for 16 bytes.
        let half = unsafe { _mm_loadu_si128(p.cast()) };
        op!(_mm256_cvtph_ps(half))
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch may name any address; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        op!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        op!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), a))
    }
    #[inline(always)]
    fn copysign(self, magnitude: __m256, sign: __m256) -> __m256 {
        let bit = self.splat(-0.0);
        op!(_mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign)))
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        op!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn gt(self, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b))
    }
    #[inline(always)]
    fn select(self, mask: __m256, a: __m256, b: __m256) -> __m256 {
        op!(_mm256_blendv_ps(b, a, mask))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> __m256i {
        op!(_mm256_set1_epi32(x))
    }
    #[inline(always)]
    fn to_int(self, a: __m256) -> __m256i {
        op!(_mm256_cvtps_epi32(a))
    }
    #[inline(always)]
    fn add_int(self, a: __m256i, b: __m256i) -> __m256i {
        op!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_int(self, a: __m256i, b: __m256i) -> __m256i {
        op!(_mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn shl<const BITS: i32>(self, a: __m256i) -> __m256i {
        op!(_mm256_slli_epi32::<BITS>(a))
    }
    #[inline(always)]
    fn shr<const BITS: i32>(self, a: __m256i) -> __m256i {
        op!(_mm256_srai_epi32::<BITS>(a))
    }
    #[inline(always)]
    fn to_bits(self, a: __m256) -> __m256i {
        op!(_mm256_castps_si256(a))
    }
    #[inline(always)]
    fn float_of(self, a: __m256i) -> __m256 {
        op!(_mm256_castsi256_ps(a))
    }

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Out {
        self.enter(kernel)
    }

    #[inline(always)]
    fn sum_each(self, v: [__m256; LANES]) -> __m256 {
        // Vectors i and i + 4 share a register; a blend and a crossing shuffle bring the halves together, and since
        // addition commutes it does not matter which half comes first.
        let [a, b, c, d] = [halves(v[0], v[4]), halves(v[1], v[5]), halves(v[2], v[6]), halves(v[3], v[7])];
        let (e, f) = (quarters(a, b), quarters(c, d));
        op!(_mm256_add_ps(_mm256_shuffle_ps::<0x88>(e, f), _mm256_shuffle_ps::<0xDD>(e, f)))
    }

    #[inline(always)]
    fn transpose(self, v: [__m256; LANES]) -> [__m256; LANES] {
        let [a0, b0] = unpack(v[0], v[1]);
        let [a1, b1] = unpack(v[2], v[3]);
        let [a2, b2] = unpack(v[4], v[5]);
        let [a3, b3] = unpack(v[6], v[7]);
        let ([c0, c1], [c2, c3]) = (pairs(a0, a1), pairs(b0, b1));
        let ([d0, d1], [d2, d3]) = (pairs(a2, a3), pairs(b2, b3));
        op!([
            _mm256_permute2f128_ps::<0x20>(c0, d0),
            _mm256_permute2f128_ps::<0x20>(c1, d1),
            _mm256_permute2f128_ps::<0x20>(c2, d2),
            _mm256_permute2f128_ps::<0x20>(c3, d3),
            _mm256_permute2f128_ps::<0x31>(c0, d0),
            _mm256_permute2f128_ps::<0x31>(c1, d1),
            _mm256_permute2f128_ps::<0x31>(c2, d2),
            _mm256_permute2f128_ps::<0x31>(c3, d3),
        ])
    }
}

/// `[a.low + a.high | b.low + b.high]`.
#[inline(always)]
fn halves(a: __m256, b: __m256) -> __m256 {
    op!(_mm256_add_ps(_mm256_blend_ps::<0xF0>(a, b), _mm256_permute2f128_ps::<0x21>(a, b)))
}

/// In each half: `[a0 + a2, a1 + a3, b0 + b2, b1 + b3]`.
#[inline(always)]
fn quarters(a: __m256, b: __m256) -> __m256 {
    op!(_mm256_add_ps(_mm256_blend_ps::<0xCC>(a, b), _mm256_shuffle_ps::<0x4E>(a, b)))
}

/// In each half: `[a0, b0, a1, b1]` and `[a2, b2, a3, b3]`.
#[inline(always)]
fn unpack(a: __m256, b: __m256) -> [__m256; 2] {
    op!([_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)])
}

/// In each half: `[a0, a1, b0, b1]` and `[a2, a3, b2, b3]`.
#[inline(always)]
fn pairs(a: __m256, b: __m256) -> [__m256; 2] {
    op!([_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xEE>(a, b)])
}
