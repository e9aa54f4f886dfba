//! `linear` at the shapes of GPT-3 1.3B: one row is bound by reading weights, many rows by multiply-adds.
//!
//! `cargo bench -p dist-kernels --bench linear [-- FILTER]`, for instance `-- qkv` or `-- rows=1/`.

use std::time::Duration;

use criterion::Criterion;
use dist_core::DType;
use dist_kernels::args::{Epilogue, K_SEGMENTS, LinearArgs, Prologue, Then};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout, Weight};

mod ceilings;
use ceilings::{Ceilings, Line, POOL_BYTES, Samples, activations, backend, gemm_f32, print_table, weights};

/// Name, outputs, inputs.
const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 6144, 2048),
    ("proj", 2048, 2048),
    ("fc1", 8192, 2048),
    ("fc2", 2048, 8192),
    ("head", 50257, 2048),
];
const ROWS: [usize; 6] = [1, 4, 8, 16, 32, 512];

#[derive(Clone, Copy)]
struct Case {
    shape: (&'static str, usize, usize),
    rows: usize,
    dtype: DType,
    layout: Layout,
}

impl Case {
    fn name(self) -> String {
        let (name, n, k) = self.shape;
        let layout = if self.layout == Layout::Nk { "nk" } else { "kn" };
        format!("{name}/{n}x{k}/{}/{layout}/rows={}/", self.dtype, self.rows)
    }

    fn bytes(self) -> usize {
        self.shape.1 * self.shape.2 * self.dtype.bytes()
    }
}

/// Everything in bf16 and `[n, k]`, then spot checks of the other types and the other layout.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in SHAPES {
        for rows in ROWS.into_iter().filter(|&rows| rows < 512 || shape.0 != "head") {
            cases.push(Case { shape, rows, dtype: DType::BF16, layout: Layout::Nk });
        }
    }
    for (shape, rows) in [(0, 1), (0, 8), (1, 1), (2, 1), (3, 1), (3, 8), (0, 32), (0, 512)] {
        cases.push(Case { shape: SHAPES[shape], rows, dtype: DType::BF16, layout: Layout::Kn });
    }
    for dtype in [DType::F32, DType::F16] {
        for rows in [1, 8, 512] {
            cases.push(Case { shape: SHAPES[0], rows, dtype, layout: Layout::Nk });
        }
    }
    cases
}

/// As many copies of a weight as memory has room for.
fn prepare(backend: &mut CpuBackend, bytes: &HostBytes, case: Case) -> Vec<Weight<CpuBuf>> {
    let (_, n, k) = case.shape;
    let ld = if case.layout == Layout::Nk { k } else { n };
    let mut weight = |idx: usize| {
        let part = HostPart { bytes: bytes.clone(), offset: idx * case.bytes(), n, ld };
        let weight = HostWeight { parts: vec![part], dtype: case.dtype, layout: case.layout, k };
        backend.prepare(weight).expect("a weight")
    };
    (0..POOL_BYTES / case.bytes()).map(&mut weight).collect()
}

/// The same product by the `gemm` crate in f32.
struct Reference {
    w: Vec<f32>,
    out: Vec<f32>,
    samples: Samples,
}

impl Reference {
    fn new(case: Case) -> Self {
        let (_, n, k) = case.shape;
        let w = activations(n * k).slice::<f32>().to_vec();
        Self { w, out: vec![0.0; case.rows * n], samples: Samples::default() }
    }

    fn run(&mut self, case: Case, x: &CpuBuf, threads: usize) {
        let shape = [case.rows, case.shape.1, case.shape.2];
        self.samples.time(|| gemm_f32(&mut self.out, x.slice(), &self.w, shape, threads));
    }
}

fn bench(c: &mut Criterion, backend: &mut CpuBackend, bytes: &HostBytes, case: Case) -> Option<Line> {
    let (_, n, k) = case.shape;
    let weights = prepare(backend, bytes, case);
    let x = activations(case.rows * k);
    let mut out = backend.alloc("out", DType::F32, case.rows * n).expect("memory for the output");
    let (mut samples, mut ceilings, mut next) = (Samples::default(), Ceilings::default(), 0);
    let mut reference = None;
    c.bench_function(&case.name(), |b| {
        b.iter_custom(|iters| {
            ceilings.measure(backend, bytes);
            if case.rows == 512 {
                let threads = backend.describe().threads;
                reference.get_or_insert_with(|| Reference::new(case)).run(case, &x, threads);
            }
            let mut total = Duration::ZERO;
            for _ in 0..iters {
                next = (next + 1) % weights.len();
                let args = LinearArgs {
                    out: &mut out,
                    x: &x,
                    weight: &weights[next],
                    rows: case.rows,
                    k_segments: K_SEGMENTS,
                    prologue: Prologue::None,
                    epilogue: Epilogue { bias: None, then: Then::Store },
                };
                total += samples.time(|| backend.linear(args).expect("linear"));
            }
            total
        });
    });
    let seconds = samples.median();
    let gemm = reference.map(|reference| reference.samples.median());
    let flop = 2.0 * (case.rows * n * k) as f64;
    let line = Line { name: case.name(), seconds, bytes: case.bytes() as f64, flop, ceilings, gemm };
    seconds.is_finite().then_some(line)
}

fn main() {
    let mut c = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .configure_from_args();
    let mut backend = backend();
    let mut lines = Vec::new();
    let mut bytes: Option<(DType, HostBytes)> = None;
    for case in cases() {
        if bytes.as_ref().is_none_or(|(dtype, _)| *dtype != case.dtype) {
            bytes = Some((case.dtype, weights(&mut backend, case.dtype, POOL_BYTES)));
        }
        let (_, bytes) = bytes.as_ref().expect("weights");
        lines.extend(bench(&mut c, &mut backend, bytes, case));
    }
    print_table(&backend, &lines);
    c.final_summary();
}
