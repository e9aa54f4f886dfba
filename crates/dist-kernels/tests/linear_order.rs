//! `linear` adds in one order: the bits of a result depend on its row of `x`, its row of weights and the number of
//! segments, and on nothing else. And the sums are right, within the error bound of that order.

use std::time::Duration;

use dist_core::DType;
use dist_core::philox::{NormalTable, stream_key};
use dist_core::shape::{div_ceil, split_even};
use dist_kernels::args::{Epilogue, LinearArgs, LogitsArgs, Prologue, Then};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout, Weight};
use half::{bf16, f16};
use proptest::prelude::*;

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const LAYOUTS: [Layout; 2] = [Layout::Nk, Layout::Kn];

fn backend(threads: usize, path: CpuPath) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path, spin: Duration::from_micros(20) }).expect("sound inputs")
}

/// Rows of `x` and a weight, `[n, k]`, of numbers that `dtype` holds exactly.
#[derive(Clone)]
struct Problem {
    rows: usize,
    n: usize,
    k: usize,
    dtype: DType,
    x: Vec<f32>,
    w: Vec<f32>,
}

impl Problem {
    fn new(rows: usize, n: usize, k: usize, dtype: DType) -> Self {
        let table = NormalTable::new(1.0);
        let draw = |name: &str, len: usize| {
            let key = stream_key(3, name);
            (0..len).map(|i| table.at(key, i as u64)).collect::<Vec<f32>>()
        };
        let w = draw("w", n * k).into_iter().map(|w| rounded(w, dtype)).collect();
        Self { rows, n, k, dtype, x: draw("x", rows * k), w }
    }

    /// Row `row` alone.
    fn row(&self, row: usize) -> Self {
        Self { rows: 1, x: self.x[row * self.k..(row + 1) * self.k].to_vec(), ..self.clone() }
    }

    /// The inputs `start .. start + len` alone.
    fn inputs(&self, start: usize, len: usize) -> Self {
        let cut = |m: &[f32]| -> Vec<f32> {
            m.chunks(self.k).flat_map(|row| row[start..start + len].to_vec()).collect()
        };
        Self { k: len, x: cut(&self.x), w: cut(&self.w), ..self.clone() }
    }

    fn at(&self, layout: Layout, row: usize, column: usize) -> f32 {
        match layout {
            Layout::Nk => self.w[row * self.k + column],
            Layout::Kn => self.w[column * self.k + row],
        }
    }

    /// The weight in host memory: parts one after another, each row followed by `gap` elements of NaN.
    fn host(&self, layout: Layout, n_parts: usize, gap: usize) -> HostWeight {
        let mut parts = Vec::new();
        for idx in 0..n_parts {
            let (first, n) = split_even(self.n, n_parts, idx);
            let (height, width) = if layout == Layout::Nk { (n, self.k) } else { (self.k, n) };
            let mut bytes = vec![0xFF; 3];
            for row in 0..height {
                for column in 0..width {
                    let w = match layout {
                        Layout::Nk => self.at(layout, first + row, column),
                        Layout::Kn => self.at(layout, row, first + column),
                    };
                    store(&mut bytes, w, self.dtype);
                }
                if row + 1 < height {
                    (0..gap).for_each(|_| store(&mut bytes, f32::NAN, self.dtype));
                }
            }
            parts.push(HostPart { bytes: HostBytes::new(bytes), offset: 3, n, ld: width + gap });
        }
        HostWeight { parts, dtype: self.dtype, layout, k: self.k }
    }

    fn run(&self, backend: &mut CpuBackend, weight: HostWeight, k_segments: usize) -> Vec<u32> {
        let weight = backend.prepare(weight).expect("sound inputs");
        self.run_prepared(backend, &weight, k_segments)
    }

    fn run_prepared(&self, backend: &mut CpuBackend, weight: &Weight<CpuBuf>, k_segments: usize) -> Vec<u32> {
        // One element more than needed: nothing may be written behind the output.
        let mut out =
            CpuBuf::from_slice("out", &vec![f32::NAN; self.rows * self.n + 1]).expect("sound inputs");
        let x = CpuBuf::from_slice("x", &self.x).expect("sound inputs");
        let epilogue = Epilogue { bias: None, then: Then::Store };
        let args = LinearArgs {
            out: &mut out,
            x: &x,
            weight,
            rows: self.rows,
            k_segments,
            prologue: Prologue::None,
            epilogue,
        };
        backend.linear(args).expect("sound inputs");
        let (out, behind) = out.slice::<f32>().split_at(self.rows * self.n);
        assert!(behind[0].is_nan(), "written behind the output");
        out.iter().map(|x| x.to_bits()).collect()
    }

    fn plain(&self, backend: &mut CpuBackend, k_segments: usize) -> Vec<u32> {
        self.run(backend, self.host(Layout::Nk, 1, 0), k_segments)
    }
}

fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

fn store(bytes: &mut Vec<u8>, x: f32, dtype: DType) {
    match dtype {
        DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
        DType::BF16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
        _ => bytes.extend(x.to_le_bytes()),
    }
}

#[test]
fn the_path_has_a_name() {
    let auto = backend(2, CpuPath::Auto).describe();
    println!("path: {auto:?}");
    assert_eq!(backend(3, CpuPath::Portable).describe().path, "portable");
    assert_eq!(backend(3, CpuPath::Portable).describe().threads, 3);
}

/// Every row alone gives the bits it has among others, on both paths.
#[test]
fn one_row_is_any_row_among_many() {
    let paths = [CpuPath::Auto, CpuPath::Portable];
    for (n, k, dtype) in [(37, 203, DType::BF16), (19, 64, DType::F16), (13, 517, DType::F32)] {
        for layout in LAYOUTS {
            let problem = Problem::new(40, n, k, dtype);
            let mut fast = backend(2, CpuPath::Auto);
            let alone: Vec<Vec<u32>> =
                (0..40).map(|row| problem.row(row).run(&mut fast, problem.host(layout, 1, 0), 8)).collect();
            for path in paths {
                let mut backend = backend(2, path);
                for rows in 1..=40 {
                    let first = Problem { rows, x: problem.x[..rows * k].to_vec(), ..problem.clone() };
                    let together = first.run(&mut backend, problem.host(layout, 1, 0), 8);
                    let path = backend.describe().path;
                    assert_eq!(together, alone[..rows].concat(), "{path}: {rows} rows of {n}x{k} {dtype}");
                }
            }
        }
    }
}

/// Blocks of rows, tiles of outputs and chunks of long segments: sizes beyond each.
#[test]
fn large_products_add_like_small_ones() {
    for (rows, n, k) in [(600, 70, 96), (33, 130, 9000), (5, 300, 4099), (258, 65, 1031)] {
        for layout in LAYOUTS {
            let problem = Problem::new(rows, n, k, DType::BF16);
            let mut backend = backend(3, CpuPath::Auto);
            let weight = backend.prepare(problem.host(layout, 1, 0)).expect("sound inputs");
            let together = problem.run_prepared(&mut backend, &weight, 8);
            for row in [0, 1, rows / 2, rows - 2, rows - 1] {
                let alone = problem.row(row).run_prepared(&mut backend, &weight, 8);
                assert_eq!(alone, together[row * n..(row + 1) * n], "row {row} of {rows}, {n}x{k}");
            }
        }
    }
}

/// Shards of `k` with a part of the segments each add up to the whole, by the same tree over the shards.
#[test]
fn shards_of_k_add_up_to_the_bits_of_the_whole() {
    let mut backend = backend(2, CpuPath::Auto);
    for (rows, n, k) in [(1, 9, 256), (3, 21, 1000), (17, 33, 264), (1, 5, 8)] {
        let problem = Problem::new(rows, n, k, DType::BF16);
        let whole = problem.plain(&mut backend, 8);
        for shards in [2, 4, 8] {
            let mut sums: Vec<Vec<f32>> = (0..shards)
                .map(|idx| {
                    let (start, len) = split_even(k, shards, idx);
                    let sums = problem.inputs(start, len).plain(&mut backend, 8 / shards);
                    sums.into_iter().map(f32::from_bits).collect()
                })
                .collect();
            while sums.len() > 1 {
                let pairs = sums.chunks(2);
                sums = pairs.map(|p| p[0].iter().zip(&p[1]).map(|(a, b)| a + b).collect()).collect();
            }
            let sums: Vec<u32> = sums[0].iter().map(|x| x.to_bits()).collect();
            assert_eq!(sums, whole, "{shards} shards of {k}");
        }
    }
}

/// `γ_m = m u / (1 − m u)` bounds the relative error of m roundings; Higham, "Accuracy and Stability of Numerical
/// Algorithms", section 3.1. The longest way of a product to the result: its chain, three additions over the lanes, at
/// most `log2` of the segments rounded up.
#[test]
fn sums_are_right_within_the_bound_of_their_order() {
    let mut backend = backend(2, CpuPath::Auto);
    let mut worst = 0.0_f64;
    for (rows, n, k) in [(1, 31, 2048), (3, 24, 2049), (7, 16, 8192), (40, 20, 333), (2, 3, 1), (6, 2, 7)] {
        for dtype in FLOATS {
            for layout in LAYOUTS {
                for segments in [1, 3, 8] {
                    let problem = Problem::new(rows, n, k, dtype);
                    let out = problem.run(&mut backend, problem.host(layout, 1, 0), segments);
                    let m = (div_ceil(div_ceil(k, segments), 8) + 3 + 3) as f64;
                    let u = f64::from(f32::EPSILON) / 2.0;
                    for (i, bits) in out.into_iter().enumerate() {
                        let (x, w) = (&problem.x[i / n * k..][..k], &problem.w[i % n * k..][..k]);
                        let products = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        let (sum, size) = (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                        let error = (f64::from(f32::from_bits(bits)) - sum).abs();
                        let bound = m * u / (1.0 - m * u) * size;
                        assert!(error <= bound, "{dtype} {rows}x{n}x{k}: {error} above {bound}");
                        worst = worst.max(error / bound);
                    }
                }
            }
        }
    }
    println!("largest error: {worst:.3} of the bound");
    assert!(worst > 0.0, "nothing was rounded: nothing was tested");
}

#[test]
fn logits_are_a_linear_of_eight_segments() {
    let mut backend = backend(2, CpuPath::Auto);
    let problem = Problem::new(3, 101, 96, DType::BF16);
    let head = backend.prepare(problem.host(Layout::Nk, 1, 0)).expect("sound inputs");
    let mut out = CpuBuf::from_slice("out", &[f32::NAN; 303]).expect("sound inputs");
    let x = CpuBuf::from_slice("x", &problem.x).expect("sound inputs");
    backend.logits(LogitsArgs { out: &mut out, x: &x, head: &head, rows: 3 }).expect("sound inputs");
    let logits: Vec<u32> = out.slice::<f32>().iter().map(|x| x.to_bits()).collect();
    assert_eq!(logits, problem.plain(&mut backend, 8));
}

/// Products that underflow leave lanes of −0, which the zeros behind a short segment turn into +0 on every way.
#[test]
fn the_sign_of_zero_is_the_same_on_every_way() {
    let mut backend = backend(2, CpuPath::Auto);
    for k in 1..=20 {
        for rows in [1, 2, 5, 9] {
            let w = vec![-1e-30; 5 * k];
            let problem = Problem { rows, n: 5, k, dtype: DType::F32, x: vec![1e-30; rows * k], w };
            let want = problem.row(0).plain(&mut backend, 2).repeat(rows);
            for layout in LAYOUTS {
                assert_eq!(
                    problem.run(&mut backend, problem.host(layout, 1, 0), 2),
                    want,
                    "{rows} rows of {k}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Layout, strides, alignment, parts, threads and instructions change nothing.
    #[test]
    fn bits_depend_on_values_alone(
        rows in 1_usize..24,
        n in 1_usize..80,
        k in prop_oneof![1_usize..20, 1_usize..600],
        segments in 1_usize..=8,
        dtype in prop::sample::select(FLOATS.to_vec()),
        layout in prop::sample::select(LAYOUTS.to_vec()),
        parts in 1_usize..4,
        gap in 0_usize..9,
        threads in 1_usize..=4,
        path in prop::sample::select(vec![CpuPath::Auto, CpuPath::Portable]),
    ) {
        let problem = Problem::new(rows, n, k, dtype);
        let want = problem.plain(&mut backend(1, CpuPath::Auto), segments);
        let mut backend = backend(threads, path);
        let got = problem.run(&mut backend, problem.host(layout, parts, gap), segments);
        prop_assert_eq!(got, want, "{}", backend.describe().path);
    }
}
