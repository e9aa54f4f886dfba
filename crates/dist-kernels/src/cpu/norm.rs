//! Residual additions and normalisations. A row is summed in one fixed order: lane `i % 8` of accumulator
//! `i / 8 % 4`, then a balanced tree. Mean and variance take two passes.

use dist_core::DType;
use dist_core::shape::split_even;

use super::buf::CpuBuf;
use super::pool::{Disjoint, Pool};
use super::simd::{CpuKernels, Kernel, LANES, Simd, Stored, StoredBf16, StoredF16, StoredF32};
use crate::args::{AddBiasArgs, AddBiasNormArgs, Norm, Residual};
use crate::backend::Backend;
use crate::weight::Buffer;

/// A vector in any float type, widened while it is read.
#[derive(Clone, Copy)]
pub(crate) struct Floats<'a> {
    bytes: &'a [u8],
    dtype: DType,
}

impl<'a> Floats<'a> {
    pub(crate) fn new(buf: &'a CpuBuf) -> Self {
        assert!(buf.dtype().is_float(), "a vector of {} is not of floats", buf.dtype());
        Self { bytes: buf.bytes(), dtype: buf.dtype() }
    }

    /// Elements `at .. at + n`, `n` at most eight, then zeros.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(self, s: S, at: usize, n: usize) -> S::V {
        match self.dtype {
            DType::F16 => load_stored::<S, StoredF16>(s, self.bytes, at, n),
            DType::BF16 => load_stored::<S, StoredBf16>(s, self.bytes, at, n),
            _ => load_stored::<S, StoredF32>(s, self.bytes, at, n),
        }
    }
}

/// Elements `at .. at + n`, `n` at most eight, then zeros.
#[inline(always)]
pub(super) fn load_stored<S: Simd, T: Stored>(s: S, bytes: &[u8], at: usize, n: usize) -> S::V {
    let bytes = &bytes[at * T::BYTES..(at + n) * T::BYTES];
    // SAFETY: the slice holds `n` elements, checked by the indexing.
    unsafe { if n == LANES { T::load(s, bytes.as_ptr()) } else { T::load_partial(s, bytes.as_ptr(), n) } }
}

/// Up to eight elements of `x` from `at` on, then `fill`.
#[inline(always)]
pub(super) fn load_or<S: Simd>(s: S, x: &[f32], at: usize, fill: f32) -> S::V {
    let x = &x[at..];
    if x.len() >= LANES {
        return s.load(x);
    }
    let mut lanes = [fill; LANES];
    lanes[..x.len()].copy_from_slice(x);
    s.lanes(lanes)
}

/// Writes up to eight elements of `out` from `at` on.
#[inline(always)]
pub(super) fn store_at<S: Simd>(s: S, v: S::V, out: &mut [f32], at: usize) {
    let out = &mut out[at..];
    if out.len() >= LANES { s.store(v, out) } else { s.store_partial(v, out) }
}

/// A norm whose vectors are at hand.
#[derive(Clone, Copy)]
enum RowNorm<'a> {
    None,
    Layer { weight: Floats<'a>, bias: Floats<'a>, eps: f32 },
    Rms { weight: Floats<'a>, eps: f32 },
}

impl<'a> RowNorm<'a> {
    fn new<B: Backend<Buf = CpuBuf>>(norm: &Norm<'a, B>) -> Self {
        match *norm {
            Norm::None => Self::None,
            Norm::Layer { weight, bias, eps } => {
                Self::Layer { weight: Floats::new(weight), bias: Floats::new(bias), eps }
            }
            Norm::Rms { weight, eps } => Self::Rms { weight: Floats::new(weight), eps },
        }
    }

    /// `out = norm(x)` for one row.
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, out: &mut [f32], x: &[f32]) {
        let d = x.len() as f32;
        match self {
            Self::None => out.copy_from_slice(x),
            Self::Layer { weight, bias, eps } => {
                let mean = sum(s, x, 0.0, |x| x) / d;
                let centre = s.splat(mean);
                let variance = sum(s, x, mean, |x| square(s, s.sub(x, centre))) / d;
                let scale = s.splat(1.0 / (variance + eps).sqrt());
                for at in (0..x.len()).step_by(LANES) {
                    let n = LANES.min(x.len() - at);
                    let y = s.mul(s.sub(load_or(s, x, at, 0.0), centre), scale);
                    store_at(s, s.fma(y, weight.load(s, at, n), bias.load(s, at, n)), out, at);
                }
            }
            Self::Rms { weight, eps } => {
                let mean_square = sum(s, x, 0.0, |x| square(s, x)) / d;
                let scale = s.splat(1.0 / (mean_square + eps).sqrt());
                for at in (0..x.len()).step_by(LANES) {
                    let n = LANES.min(x.len() - at);
                    let y = s.mul(load_or(s, x, at, 0.0), scale);
                    store_at(s, s.mul(y, weight.load(s, at, n)), out, at);
                }
            }
        }
    }
}

#[inline(always)]
fn square<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, x)
}

/// `Σ term(x)`; beyond the end `x` is `fill`, which `term` must send to zero.
#[inline(always)]
fn sum<S: Simd>(s: S, x: &[f32], fill: f32, term: impl Fn(S::V) -> S::V) -> f32 {
    let mut sums = [s.zero(); 4];
    let (blocks, rest) = x.as_chunks::<{ 4 * LANES }>();
    for block in blocks {
        for (idx, sum) in sums.iter_mut().enumerate() {
            *sum = s.add(*sum, term(s.load(&block[idx * LANES..])));
        }
    }
    for (idx, at) in (0..rest.len()).step_by(LANES).enumerate() {
        sums[idx] = s.add(sums[idx], term(load_or(s, rest, at, fill)));
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

/// `residual += delta + bias`, `normed = norm(residual)` for some rows.
struct AddBiasNorm<'a> {
    normed: &'a mut [f32],
    residual: &'a mut [f32],
    delta: Option<&'a [f32]>,
    bias: Option<Floats<'a>>,
    norm: RowNorm<'a>,
    keep: Residual,
    d: usize,
}

impl Kernel for AddBiasNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let d = self.d;
        let rows = self.normed.chunks_exact_mut(d).zip(self.residual.chunks_exact_mut(d));
        for (row, (normed, residual)) in rows.enumerate() {
            add(s, residual, self.delta.map(|delta| &delta[row * d..][..d]), self.bias);
            self.norm.apply(s, normed, residual);
            if self.keep == Residual::Normed {
                residual.copy_from_slice(normed);
            }
        }
    }
}

/// `x += delta + bias` for one row.
#[inline(always)]
fn add<S: Simd>(s: S, x: &mut [f32], delta: Option<&[f32]>, bias: Option<Floats<'_>>) {
    if delta.is_none() && bias.is_none() {
        return;
    }
    for at in (0..x.len()).step_by(LANES) {
        let n = LANES.min(x.len() - at);
        let delta = delta.map(|delta| load_or(s, delta, at, 0.0));
        let bias = bias.map(|bias| bias.load(s, at, n));
        let added = match (delta, bias) {
            (Some(delta), Some(bias)) => s.add(delta, bias),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => s.zero(),
        };
        store_at(s, s.add(load_or(s, x, at, 0.0), added), x, at);
    }
}

/// Elements that make a task worth the hand-over to another thread.
const TASK_LEN: usize = 16 << 10;

/// Cuts `rows` rows of `d` elements into tasks: `task(first row, rows)`.
pub(super) fn for_rows(pool: &Pool, rows: usize, d: usize, task: &(dyn Fn(usize, usize) + Sync)) {
    let n_tasks = (rows * d).div_ceil(TASK_LEN).min(4 * pool.n_threads()).min(rows);
    pool.run(n_tasks, &|idx| {
        let (row, n) = split_even(rows, n_tasks, idx);
        task(row, n);
    });
}

// kernel
/// `residual += delta + bias`, then `normed = norm(residual)`.
pub(crate) fn add_bias_norm<B: Backend<Buf = CpuBuf>>(
    kernels: CpuKernels,
    pool: &Pool,
    args: AddBiasNormArgs<'_, B>,
) {
    let AddBiasNormArgs { normed, residual, delta, bias, norm, keep, rows, d } = args;
    let (normed, residual) =
        (Disjoint::new(&mut normed.f32s_mut()[..rows * d]), Disjoint::new(residual.f32s_mut()));
    let (delta, bias, norm) = (delta.map(CpuBuf::f32s), bias.map(Floats::new), RowNorm::new(&norm));
    for_rows(pool, rows, d, &|row, n| {
        // SAFETY: `for_rows` cuts the rows into ranges that do not overlap.
        let (normed, residual) = unsafe { (normed.piece(row * d, n * d), residual.piece(row * d, n * d)) };
        let delta = delta.map(|delta| &delta[row * d..]);
        kernels.run(AddBiasNorm { normed, residual, delta, bias, norm, keep, d });
    });
}

/// Normalises some rows of `x`.
struct NormRows<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    norm: RowNorm<'a>,
    d: usize,
}

impl Kernel for NormRows<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (out, x) in self.out.chunks_exact_mut(self.d).zip(self.x.chunks_exact(self.d)) {
            self.norm.apply(s, out, x);
        }
    }
}

// kernel
/// `out = norm(x)`, both `[rows, d]`: the prologue of `linear`.
pub(crate) fn norm_rows<B: Backend<Buf = CpuBuf>>(
    kernels: CpuKernels,
    pool: &Pool,
    out: &mut [f32],
    x: &[f32],
    norm: &Norm<'_, B>,
    d: usize,
) {
    assert_eq!(out.len(), x.len(), "norm_rows: out and x");
    let (rows, out, norm) = (x.len() / d, Disjoint::new(out), RowNorm::new(norm));
    for_rows(pool, rows, d, &|row, n| {
        // SAFETY: `for_rows` cuts the rows into ranges that do not overlap.
        let out = unsafe { out.piece(row * d, n * d) };
        kernels.run(NormRows { out, x: &x[row * d..][..n * d], norm, d });
    });
}

/// Adds a vector to some rows.
struct AddBias<'a> {
    x: &'a mut [f32],
    bias: Floats<'a>,
    n: usize,
}

impl Kernel for AddBias<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.n) {
            add(s, x, None, Some(self.bias));
        }
    }
}

// kernel
/// `x += bias`, row by row.
pub(crate) fn add_bias<B: Backend<Buf = CpuBuf>>(kernels: CpuKernels, pool: &Pool, args: AddBiasArgs<'_, B>) {
    let AddBiasArgs { x, bias, rows, n } = args;
    let (x, bias) = (Disjoint::new(x.f32s_mut()), Floats::new(bias));
    for_rows(pool, rows, n, &|row, n_rows| {
        // SAFETY: `for_rows` cuts the rows into ranges that do not overlap.
        let x = unsafe { x.piece(row * n, n_rows * n) };
        kernels.run(AddBias { x, bias, n });
    });
}
