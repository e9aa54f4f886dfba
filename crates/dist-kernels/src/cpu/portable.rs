//! Eight lanes as an array: any machine, the same bits.

use half::{bf16, f16};

use super::simd::{Kernel, LANES, Simd};

/// Lanes in plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; LANES];
type I = [i32; LANES];
type M = [bool; LANES];

#[inline(always)]
fn map<A: Copy, O>(a: [A; LANES], f: impl Fn(A) -> O) -> [O; LANES] {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip<A: Copy, B: Copy, O>(a: [A; LANES], b: [B; LANES], f: impl Fn(A, B) -> O) -> [O; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = V;
    type I = I;
    type M = M;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn lanes(self, x: V) -> V {
        x
    }
    #[inline(always)]
    fn to_array(self, v: V) -> V {
        v
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> V {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: V, p: *mut f32) {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        // SAFETY: the caller vouches for 16 bytes.
        map(unsafe { p.cast::<[u16; LANES]>().read_unaligned() }, |bits| bf16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> V {
        // SAFETY: the caller vouches for 16 bytes.
        map(unsafe { p.cast::<[u16; LANES]>().read_unaligned() }, |bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        map(a, f32::abs)
    }
    #[inline(always)]
    fn copysign(self, magnitude: V, sign: V) -> V {
        zip(magnitude, sign, f32::copysign)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        map(a, f32::round_ties_even)
    }

    #[inline(always)]
    fn gt(self, a: V, b: V) -> M {
        zip(a, b, |a, b| a > b)
    }
    #[inline(always)]
    fn select(self, mask: M, a: V, b: V) -> V {
        std::array::from_fn(|i| if mask[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> I {
        [x; LANES]
    }
    #[inline(always)]
    fn to_int(self, a: V) -> I {
        // −2^31 is a float and in range; 2^31 is the first that is not.
        const LIMIT: f32 = 2_147_483_648.0;
        map(a, |a| {
            let a = a.round_ties_even();
            if (-LIMIT..LIMIT).contains(&a) { a as i32 } else { i32::MIN }
        })
    }
    #[inline(always)]
    fn add_int(self, a: I, b: I) -> I {
        zip(a, b, i32::wrapping_add)
    }
    #[inline(always)]
    fn sub_int(self, a: I, b: I) -> I {
        zip(a, b, i32::wrapping_sub)
    }
    #[inline(always)]
    fn shl<const BITS: i32>(self, a: I) -> I {
        map(a, |a| a << BITS)
    }
    #[inline(always)]
    fn shr<const BITS: i32>(self, a: I) -> I {
        map(a, |a| a >> BITS)
    }
    #[inline(always)]
    fn to_bits(self, a: V) -> I {
        map(a, |a| a.to_bits() as i32)
    }
    #[inline(always)]
    fn float_of(self, a: I) -> V {
        map(a, |a| f32::from_bits(a as u32))
    }

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Out {
        kernel.run(self)
    }

    #[inline(always)]
    fn sum_each(self, v: [V; LANES]) -> V {
        map(v, |v| self.sum(v))
    }
    #[inline(always)]
    fn transpose(self, v: [V; LANES]) -> [V; LANES] {
        std::array::from_fn(|i| std::array::from_fn(|j| v[j][i]))
    }
}
