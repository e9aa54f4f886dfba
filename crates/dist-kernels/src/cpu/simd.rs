//! Eight `f32` lanes with two implementations, and the one place where a kernel is instantiated for each of them.
//!
//! A kernel is written once, generic over [`Simd`] and `#[inline(always)]`, and run through [`CpuKernels::run`]. Both
//! instances then make the same operations in the same order, so they give the same bits. Flags stay at their
//! defaults: round to nearest even, denormals kept.

use dist_core::DType;

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2;
use super::portable::Portable;
use crate::error::{KernelError, Result};

/// Number of lanes of every vector.
pub(crate) const LANES: usize = 8;

/// Which implementation of the lanes a backend shall use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuPath {
    /// The fastest that this machine has.
    Auto,
    /// AVX2 with FMA and F16C, or an error.
    Avx2,
    /// Plain Rust, on any machine; the same bits, many times slower.
    Portable,
}

/// Eight lanes of `f32`. A value of an implementing type is the proof that its instructions exist here.
///
/// Every method is one operation a lane. `max(a, b)` is `if a > b { a } else { b }` and `min(a, b)` is
/// `if a < b { a } else { b }`, hence `b` where either is NaN. A comparison with NaN is false.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Eight floats.
    type V: Copy;
    /// Eight 32-bit integers.
    type I: Copy;
    /// Eight truth values.
    type M: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Lanes from an array.
    fn lanes(self, x: [f32; LANES]) -> Self::V;
    /// Lanes as an array.
    fn to_array(self, v: Self::V) -> [f32; LANES];

    /// Eight floats from memory.
    ///
    /// # Safety
    /// `p` is readable for 32 bytes; any alignment.
    unsafe fn load_ptr(self, p: *const f32) -> Self::V;
    /// Eight floats to memory.
    ///
    /// # Safety
    /// `p` is writable for 32 bytes; any alignment.
    unsafe fn store_ptr(self, v: Self::V, p: *mut f32);
    /// Eight bfloat16 numbers from memory, exact.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes; any alignment.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// Eight half-precision numbers from memory, exact.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes; any alignment.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// Asks for the cache line at `p`, which may be any address, to be brought near (second-level cache).
    fn prefetch(self, p: *const u8);

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a − b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `|a|`.
    fn abs(self, a: Self::V) -> Self::V;
    /// `magnitude` with the sign bit of `sign`.
    fn copysign(self, magnitude: Self::V, sign: Self::V) -> Self::V;
    /// The nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;

    /// `a > b`.
    fn gt(self, a: Self::V, b: Self::V) -> Self::M;
    /// `if mask { a } else { b }`.
    fn select(self, mask: Self::M, a: Self::V, b: Self::V) -> Self::V;

    /// All lanes `x`.
    fn splat_int(self, x: i32) -> Self::I;
    /// The nearest integer, ties to even; `i32::MIN` for NaN and what does not fit.
    fn to_int(self, a: Self::V) -> Self::I;
    /// `a + b`, wrapping.
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a − b`, wrapping.
    fn sub_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a << BITS`.
    fn shl<const BITS: i32>(self, a: Self::I) -> Self::I;
    /// `a >> BITS`, keeping the sign.
    fn shr<const BITS: i32>(self, a: Self::I) -> Self::I;
    /// The bits of `a` as integers.
    fn to_bits(self, a: Self::V) -> Self::I;
    /// The floats with these bits.
    fn float_of(self, a: Self::I) -> Self::V;

    /// Runs a kernel as a function of its own, so that its loops have all registers to themselves.
    fn outlined<K: Kernel>(self, kernel: K) -> K::Out;

    /// Lane `i` becomes the sum of the eight lanes of `v[i]`, each added as [`Simd::sum`] adds.
    fn sum_each(self, v: [Self::V; LANES]) -> Self::V;
    /// Turns eight rows into eight columns.
    fn transpose(self, v: [Self::V; LANES]) -> [Self::V; LANES];

    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// The first eight floats of `x`, which has at least eight.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        let x = &x[..LANES];
        // SAFETY: the slice above has eight elements, checked by the indexing.
        unsafe { self.load_ptr(x.as_ptr()) }
    }

    /// Writes the first eight floats of `out`, which has at least eight.
    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32]) {
        let out = &mut out[..LANES];
        // SAFETY: the slice above has eight elements, checked by the indexing.
        unsafe { self.store_ptr(v, out.as_mut_ptr()) }
    }

    /// All floats of `x`, at most eight, then zeros.
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> Self::V {
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.lanes(lanes)
    }

    /// Writes as many lanes as `out` has elements, at most eight.
    #[inline(always)]
    fn store_partial(self, v: Self::V, out: &mut [f32]) {
        let n = out.len();
        out.copy_from_slice(&self.to_array(v)[..n]);
    }

    /// The sum of all lanes: `((0+4) + (2+6)) + ((1+5) + (3+7))`.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let v = self.to_array(v);
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    /// The greatest of all lanes; no lane may be NaN.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        let v = self.to_array(v);
        v.into_iter().fold(v[0], |a, b| if a > b { a } else { b })
    }
}

/// A stored element type that kernels widen to `f32` while they load it.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// Its name in buffers.
    const DTYPE: DType;
    /// Size of one element in bytes.
    const BYTES: usize = Self::DTYPE.bytes();

    /// Eight elements, widened.
    ///
    /// # Safety
    /// `p` is readable for eight elements; any alignment.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V;

    /// `n < 8` elements, widened, then zeros.
    ///
    /// # Safety
    /// `p` is readable for `n` elements; any alignment.
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(s: S, p: *const u8, n: usize) -> S::V {
        let mut bytes = [0_u8; 4 * LANES];
        assert!(n <= LANES, "a partial load of {n} lanes");
        // SAFETY: the caller vouches for `n` elements at `p`; the array holds eight of any type.
        unsafe {
            std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n * Self::BYTES);
            Self::load(s, bytes.as_ptr())
        }
    }
}

/// Weights stored as `f32`.
#[derive(Clone, Copy)]
pub(crate) struct StoredF32;
/// Weights stored as `f16`.
#[derive(Clone, Copy)]
pub(crate) struct StoredF16;
/// Weights stored as `bf16`.
#[derive(Clone, Copy)]
pub(crate) struct StoredBf16;

impl Stored for StoredF32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller vouches for eight elements; `load_ptr` takes any alignment.
        unsafe { s.load_ptr(p.cast()) }
    }
}

impl Stored for StoredF16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller vouches for eight elements.
        unsafe { s.load_f16(p) }
    }
}

impl Stored for StoredBf16 {
    const DTYPE: DType = DType::BF16;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller vouches for eight elements.
        unsafe { s.load_bf16(p) }
    }
}

/// A piece of work that is written once for all implementations.
pub(crate) trait Kernel {
    /// What it returns.
    type Out;
    /// Does the work. Must be `#[inline(always)]`, as all that it calls in its loops: what is not inlined is compiled
    /// without the instructions.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// The implementation that was chosen.
#[derive(Clone, Copy)]
pub(crate) enum CpuKernels {
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// Plain Rust.
    Portable(Portable),
}

impl CpuKernels {
    /// Looks at the machine and takes the wanted implementation.
    pub(crate) fn new(path: CpuPath) -> Result<Self> {
        #[cfg(target_arch = "x86_64")]
        match (path, Avx2::detect()) {
            (CpuPath::Auto | CpuPath::Avx2, Some(avx2)) => return Ok(Self::Avx2(avx2)),
            (CpuPath::Auto | CpuPath::Portable, _) | (CpuPath::Avx2, None) => {}
        }
        match path {
            CpuPath::Auto | CpuPath::Portable => Ok(Self::Portable(Portable)),
            CpuPath::Avx2 => Err(KernelError::CpuPath("AVX2 with FMA and F16C")),
        }
    }

    /// Its name: `avx2` or `portable`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            Self::Portable(_) => "portable",
        }
    }

    /// Runs a kernel in the chosen implementation.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Out {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.enter(kernel),
            Self::Portable(portable) => kernel.run(portable),
        }
    }
}

#[cfg(test)]
mod tests;
