//! Residual additions, normalisations and picked rows: against double precision, and bit by bit across paths, threads
//! and company.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

use std::time::Duration;

use dist_core::philox::{NormalTable, stream_key};
use dist_kernels::Backend;
use dist_kernels::args::{AddBiasArgs, AddBiasNormArgs, GatherRowsArgs, Norm, Residual};
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use half::bf16;

const EPS: f32 = 1e-5;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    None,
    Layer,
    Rms,
}

const KINDS: [Kind; 3] = [Kind::None, Kind::Layer, Kind::Rms];

fn backend(path: CpuPath, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path, spin: Duration::from_micros(20) }).unwrap()
}

fn numbers(name: &str, n: usize, mean: f32, std_dev: f64) -> Vec<f32> {
    let (table, key) = (NormalTable::new(std_dev), stream_key(5, name));
    (0..n).map(|i| mean + table.at(key, i as u64)).collect()
}

fn buf(x: &[f32]) -> CpuBuf {
    CpuBuf::from_slice("test", x).unwrap()
}

/// A step's operands; `mean` lets rows lie far from zero.
struct Case {
    d: usize,
    residual: Vec<f32>,
    delta: Vec<f32>,
    bias: Vec<f32>,
    weight: Vec<f32>,
    shift: Vec<f32>,
}

impl Case {
    fn new(rows: usize, d: usize, mean: f32) -> Self {
        Self {
            d,
            residual: numbers("residual", rows * d, mean, 1.0),
            delta: numbers("delta", rows * d, 0.0, 0.5),
            bias: numbers("bias", d, 0.1, 0.2),
            weight: numbers("weight", d, 1.0, 0.1),
            shift: numbers("shift", d, 0.0, 0.1),
        }
    }

    /// `(normed, residual)` of some rows.
    fn run(
        &self,
        backend: &mut CpuBackend,
        kind: Kind,
        keep: Residual,
        rows: std::ops::Range<usize>,
    ) -> [Vec<f32>; 2] {
        let part = rows.start * self.d..rows.end * self.d;
        let (mut normed, mut residual) =
            (buf(&vec![f32::NAN; part.len()]), buf(&self.residual[part.clone()]));
        let (weight, shift) = (buf(&self.weight), buf(&self.shift));
        let norm = match kind {
            Kind::None => Norm::None,
            Kind::Layer => Norm::Layer { weight: &weight, bias: &shift, eps: EPS },
            Kind::Rms => Norm::Rms { weight: &weight, eps: EPS },
        };
        backend
            .add_bias_norm(AddBiasNormArgs {
                normed: &mut normed,
                residual: &mut residual,
                delta: Some(&buf(&self.delta[part])),
                bias: Some(&buf(&self.bias)),
                norm,
                keep,
                rows: rows.len(),
                d: self.d,
            })
            .unwrap();
        [normed.slice().to_vec(), residual.slice().to_vec()]
    }

    /// A row in double precision, from the sum that `f32` holds.
    fn exact(&self, kind: Kind, sum: &[f32]) -> Vec<f64> {
        let d = self.d as f64;
        let mean = if kind == Kind::Layer { sum.iter().map(|&x| f64::from(x)).sum::<f64>() / d } else { 0.0 };
        let square = sum.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / d;
        let scale = 1.0 / (square + f64::from(EPS)).sqrt();
        let vectors = self.weight.iter().zip(&self.shift);
        sum.iter()
            .zip(vectors)
            .map(|(&x, (&weight, &shift))| match kind {
                Kind::None => f64::from(x),
                Kind::Layer => (f64::from(x) - mean) * scale * f64::from(weight) + f64::from(shift),
                Kind::Rms => f64::from(x) * scale * f64::from(weight),
            })
            .collect()
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Results are near one, rows lie at most 8 from zero. Measured over all cases: 9.3e-7, the rounding of a mean of 8.
const BOUND: f64 = 2e-6;

#[test]
fn norms_match_double_precision() {
    for path in [CpuPath::Auto, CpuPath::Portable] {
        let mut backend = backend(path, 2);
        for (d, mean) in
            [(1, 0.0), (7, 0.0), (8, 1.0), (31, 0.0), (32, 8.0), (33, -3.0), (1023, 0.0), (2048, 8.0)]
        {
            let case = Case::new(3, d, mean);
            for kind in KINDS {
                let [normed, sum] = case.run(&mut backend, kind, Residual::Sum, 0..3);
                for (idx, sum) in sum.iter().enumerate() {
                    let expected = case.residual[idx] + (case.delta[idx] + case.bias[idx % d]);
                    assert_eq!(sum.to_bits(), expected.to_bits(), "sum at {idx}, path {path:?}");
                }
                for (normed, sum) in normed.chunks(d).zip(sum.chunks(d)) {
                    for (&ours, exact) in normed.iter().zip(case.exact(kind, sum)) {
                        let error = (f64::from(ours) - exact).abs();
                        assert!(
                            error < BOUND,
                            "{kind:?} of {d} on path {path:?}: {ours}, {exact}: {error:e}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_post_norm_model_keeps_the_normed_sum() {
    for path in [CpuPath::Auto, CpuPath::Portable] {
        let case = Case::new(4, 45, 0.0);
        for kind in KINDS {
            let [expected, _] = case.run(&mut backend(path, 1), kind, Residual::Sum, 0..4);
            let kept = case.run(&mut backend(path, 1), kind, Residual::Normed, 0..4);
            assert!(kept.iter().all(|kept| bits(kept) == bits(&expected)), "{kind:?} on path {path:?}");
        }
    }
}

#[test]
fn paths_threads_and_company_change_nothing() {
    let (rows, d) = (37, 2051);
    let case = Case::new(rows, d, 1.0);
    for kind in KINDS {
        let expected =
            case.run(&mut backend(CpuPath::Auto, 1), kind, Residual::Sum, 0..rows).map(|x| bits(&x));
        for (path, threads) in
            [(CpuPath::Portable, 1), (CpuPath::Auto, 2), (CpuPath::Auto, 3), (CpuPath::Portable, 4)]
        {
            let mut backend = backend(path, threads);
            let together = case.run(&mut backend, kind, Residual::Sum, 0..rows).map(|x| bits(&x));
            assert!(together == expected, "{kind:?} with {threads} threads on path {path:?}");
            for row in [0, 5, rows - 1] {
                let alone = case.run(&mut backend, kind, Residual::Sum, row..row + 1);
                for (alone, expected) in alone.iter().zip(&expected) {
                    assert!(
                        bits(alone) == expected[row * d..][..d],
                        "{kind:?}, row {row} alone, path {path:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn vectors_may_be_stored_in_half_precision() {
    let (n, d) = (3, 21);
    let (x, bias) = (numbers("x", n * d, 0.0, 1.0), numbers("bias", d, 0.0, 1.0));
    let halves: Vec<bf16> = bias.iter().map(|&x| bf16::from_f32(x)).collect();
    for path in [CpuPath::Auto, CpuPath::Portable] {
        let mut sum = buf(&x);
        let bias = CpuBuf::from_slice("test", &halves).unwrap();
        backend(path, 2).add_bias(AddBiasArgs { x: &mut sum, bias: &bias, rows: n, n: d }).unwrap();
        for (idx, (sum, x)) in sum.slice::<f32>().iter().zip(&x).enumerate() {
            assert_eq!(sum.to_bits(), (x + halves[idx % d].to_f32()).to_bits(), "path {path:?}");
        }
    }
}

#[test]
fn picked_rows_are_copies() {
    let (rows, d) = (9, 13);
    let x = numbers("x", rows * d, 0.0, 1.0);
    let indices = [8_u32, 0, 3, 3];
    let mut backend = backend(CpuPath::Auto, 2);
    let mut out = buf(&vec![f32::NAN; indices.len() * d]);
    let args = GatherRowsArgs {
        out: &mut out,
        x: &buf(&x),
        indices: &CpuBuf::from_slice("test", &indices).unwrap(),
        n_out: indices.len(),
        rows,
        d,
    };
    backend.gather_rows(args).unwrap();
    for (out, &row) in out.slice::<f32>().chunks(d).zip(&indices) {
        assert_eq!(out, &x[row as usize * d..][..d], "path {}", backend.describe().path);
    }
}
