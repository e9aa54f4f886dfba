//! `linear` and `logits`: for few rows the weight is read, for many it is multiplied.

use std::iter;

use dist_core::DType;
use dist_kernels::Backend;
use dist_kernels::Result;
use dist_kernels::args::{Epilogue, K_SEGMENTS, LinearArgs, LogitsArgs, Prologue, Then};
use dist_kernels::cuda::plans::{Winner, bucket};
use dist_kernels::cuda::{CudaBackend, CudaBuf, EpilogueKind, ProductShape};
use dist_kernels::weight::Weight;
use serde_json::json;

use crate::gpu::{DTYPE, Gpu, Graph, medians_in_turn, n_launches, n_rotating, recorded};
use crate::report::{Bar, Line, Report, Work};

/// Widths of GPT-3.
pub(crate) const MODELS: [(&str, usize); 3] = [("1.3b", 2048), ("6.7b", 4096), ("13b", 5120)];
pub(crate) const N_VOCAB: usize = 50_257;
const FEW_ROWS: [usize; 5] = [1, 8, 16, 32, 64];
const MANY_ROWS: [usize; 6] = [128, 256, 512, 1024, 2048, 8192];
/// Weights that are larger than this shall be read at the first rate, down to the next at the second one.
const RATES: [(usize, f64); 2] = [(64_000_001, 2.9e12), (16_000_000, 2.6e12)];
/// The least share of the library's speed with few rows, and with many.
const LIBRARY_SHARES: (f64, f64) = (1.0, 0.9);

#[derive(Clone, Copy)]
struct Shape {
    model: &'static str,
    op: &'static str,
    n: usize,
    k: usize,
}

fn shapes() -> impl Iterator<Item = Shape> {
    MODELS.into_iter().flat_map(|(model, d)| {
        let ops =
            [("qkv", 3 * d, d), ("proj", d, d), ("fc1", 4 * d, d), ("fc2", d, 4 * d), ("head", N_VOCAB, d)];
        ops.into_iter().map(move |(op, n, k)| Shape { model, op, n, k })
    })
}

impl Shape {
    fn is_head(self) -> bool {
        self.op == "head"
    }

    fn out_type(self) -> DType {
        if self.is_head() { DType::F32 } else { DTYPE }
    }

    fn n_bytes(self) -> usize {
        self.n * self.k * DTYPE.bytes()
    }

    fn name(self, rows: usize) -> String {
        let Self { model, op, n, k } = self;
        let few = if FEW_ROWS.contains(&rows) { "few" } else { "many" };
        format!("linear/{few}/{model}/{op}/{n}x{k}/rows={rows}/")
    }

    /// What is to be reached with `rows` rows.
    fn bars(self, rows: usize) -> Vec<Bar> {
        if !FEW_ROWS.contains(&rows) {
            return vec![Bar::Library(LIBRARY_SHARES.1)];
        }
        let rate = RATES.iter().find(|(least, _)| self.n_bytes() >= *least);
        rate.map(|&(_, rate)| Bar::Read(rate)).into_iter().chain([Bar::Library(LIBRARY_SHARES.0)]).collect()
    }

    fn work(self, rows: usize) -> Work {
        if FEW_ROWS.contains(&rows) {
            Work::Read(self.n_bytes())
        } else {
            Work::Multiply(2.0 * (rows * self.n * self.k) as f64)
        }
    }
}

/// A product and nothing else.
pub(crate) fn plain<'a>(
    out: &'a mut CudaBuf,
    x: &'a CudaBuf,
    weight: &'a Weight<CudaBuf>,
    rows: usize,
) -> LinearArgs<'a, CudaBackend> {
    let epilogue = Epilogue { bias: None, then: Then::Store };
    LinearArgs { out, x, weight, rows, k_segments: K_SEGMENTS, prologue: Prologue::None, epilogue }
}

/// Memory of a product with as many rows as any case of its shape has.
struct Operands {
    x: CudaBuf,
    weights: Vec<Weight<CudaBuf>>,
    out: CudaBuf,
}

impl Operands {
    fn new(gpu: &mut Gpu, shape: Shape, rows_max: usize) -> Result<Self> {
        let weights = (0..n_rotating(shape.n_bytes())).map(|_| gpu.weight(shape.n, shape.k));
        let weights = weights.collect::<Result<_>>()?;
        let x = gpu.activations(rows_max * shape.k)?;
        let out = gpu.output(shape.out_type(), rows_max * shape.n)?;
        Ok(Self { x, weights, out })
    }

    /// Products one after another.
    fn n_launches(&self, shape: Shape, rows: usize) -> usize {
        let flop = 2.0 * (rows * shape.n * shape.k) as f64;
        n_launches(shape.n_bytes(), flop, self.weights.len())
    }

    /// A graph of them.
    fn record(&mut self, backend: &mut CudaBackend, shape: Shape, rows: usize) -> Result<Graph> {
        let n = self.n_launches(shape, rows);
        let Self { x, weights, out } = self;
        recorded(backend, n, |backend, idx| {
            let weight = &weights[idx % weights.len()];
            if shape.is_head() {
                return backend.logits(LogitsArgs { out, x, head: weight, rows });
            }
            backend.linear(plain(out, x, weight, rows))
        })
    }
}

/// Lets the library's fastest algorithms be found, and tells which of the two is the faster one for each bucket of rows.
fn plans(backend: &mut CudaBackend, shape: Shape, rows: &[usize]) -> Result<Vec<(usize, &'static str)>> {
    let Some(&rows_max) = rows.iter().filter(|&&rows| bucket(rows).is_some()).max() else {
        return Ok(vec![]);
    };
    let (n, k, dtype) = (shape.n, shape.k, DTYPE);
    let product = ProductShape { n, k, ld: k, dtype, out_f32: shape.is_head(), epilogue: EpilogueKind::None };
    let winner = |winner| if winner == Winner::Own { "own" } else { "library" };
    let report = backend.tune_shapes(&[product], rows_max)?;
    Ok(report.plans.iter().map(|(key, plan)| (key.rows, winner(plan.winner()))).collect())
}

pub(crate) fn run(gpu: &mut Gpu, takes: &dyn Fn(&str) -> bool, report: &mut Report) -> Result<()> {
    // All that reads before all that multiplies: who has just multiplied at full power reads more slowly for a while.
    for rows in [&FEW_ROWS[..], &MANY_ROWS[..]] {
        for shape in shapes() {
            let rows: Vec<usize> = rows.iter().copied().filter(|&rows| takes(&shape.name(rows))).collect();
            run_shape(gpu, shape, &rows, report)?;
        }
    }
    Ok(())
}

fn run_shape(gpu: &mut Gpu, shape: Shape, rows_of_shape: &[usize], report: &mut Report) -> Result<()> {
    let Some(&rows_max) = rows_of_shape.iter().max() else { return Ok(()) };
    let mut operands = Operands::new(gpu, shape, rows_max)?;
    let planned = gpu.others.iter_mut().map(|column| plans(&mut column.backend, shape, rows_of_shape));
    let planned = planned.collect::<Result<Vec<_>>>()?.concat();
    for &rows in rows_of_shape {
        let names = gpu.others.iter().map(|column| column.name).collect::<Vec<_>>();
        let backends =
            iter::once(&mut gpu.backend).chain(gpu.others.iter_mut().map(|column| &mut column.backend));
        let graphs = backends.map(|backend| {
            let graph = operands.record(backend, shape, rows)?;
            Ok((backend, graph))
        });
        let mut graphs = graphs.collect::<Result<Vec<_>>>()?;
        let medians = medians_in_turn(&mut graphs, operands.n_launches(shape, rows))?;
        let Shape { model, op, n, k } = shape;
        report.push(Line {
            name: shape.name(rows),
            shape: json!({ "op": op, "model": model, "rows": rows, "n": n, "k": k }),
            seconds: medians[0],
            work: shape.work(rows),
            beside: names.into_iter().zip(medians[1..].iter().copied()).collect(),
            runs: planned.iter().find(|plan| Some(plan.0) == bucket(rows)).map(|plan| plan.1),
            bars: shape.bars(rows),
        });
    }
    Ok(())
}
