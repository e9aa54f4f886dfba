//! The small steps at `d_model` 2048 and GPT-3's vocabulary: all are bound by memory, or by the caches of one core.
//!
//! `cargo bench -p dist-kernels --bench ops [-- FILTER]`, for instance `-- sample`.

use std::time::Duration;

use criterion::Criterion;
use dist_core::DType;
use dist_kernels::args::{AddBiasNormArgs, EmbedArgs, Lookup, Norm, Residual, SampleArgs, SampleRow};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};

mod ceilings;
use ceilings::{Ceilings, Line, POOL_BYTES, Samples, activations, backend, print_table, weights};

const D: usize = 2048;
const N_VOCAB: usize = 50_257;

/// What the benches share.
struct Bench<'a> {
    c: &'a mut Criterion,
    backend: CpuBackend,
    /// bf16 weights, beyond every cache.
    pool: HostBytes,
    lines: Vec<Line>,
}

impl Bench<'_> {
    /// Times `step(backend, iteration)`, which must read or write `bytes`.
    fn run(&mut self, name: &str, bytes: usize, mut step: impl FnMut(&mut CpuBackend, usize)) {
        let (mut samples, mut ceilings, mut next) = (Samples::default(), Ceilings::default(), 0);
        let (backend, pool) = (&mut self.backend, &self.pool);
        self.c.bench_function(name, |b| {
            b.iter_custom(|iters| {
                ceilings.measure(backend, pool);
                let mut total = Duration::ZERO;
                for _ in 0..iters {
                    next += 1;
                    total += samples.time(|| step(backend, next));
                }
                total
            });
        });
        let seconds = samples.median();
        if seconds.is_finite() {
            let line =
                Line { name: name.into(), seconds, bytes: bytes as f64, flop: 0.0, ceilings, gemm: None };
            self.lines.push(line);
        }
    }
}

/// A residual stream that fits the caches for few rows, as it does in a model.
fn norm(bench: &mut Bench<'_>, rows: usize) {
    let (weight, bias, delta) = (activations(D), activations(D), activations(rows * D));
    let (mut residual, mut normed) = (activations(rows * D), activations(rows * D));
    let name = format!("add_bias_norm/layer/{rows}x{D}/");
    bench.run(&name, 5 * rows * D * 4, |backend, iteration| {
        // Sums must not run away over the iterations.
        let bias = if iteration % 2 == 0 { None } else { Some(&bias) };
        let args = AddBiasNormArgs {
            normed: &mut normed,
            residual: &mut residual,
            delta: Some(&delta),
            bias,
            norm: Norm::Layer { weight: &weight, bias: &weight, eps: 1e-5 },
            keep: Residual::Normed,
            rows,
            d: D,
        };
        backend.add_bias_norm(args).expect("add_bias_norm");
    });
}

fn embed(bench: &mut Bench<'_>, rows: usize) {
    let part = HostPart { bytes: bench.pool.clone(), offset: 0, n: N_VOCAB, ld: D };
    let table = HostWeight { parts: vec![part], dtype: DType::BF16, layout: Layout::Nk, k: D };
    let table = bench.backend.prepare(table).expect("a table");
    let mut out = activations(rows * D);
    let name = format!("embed/bf16/{rows}x{D}/");
    bench.run(&name, rows * D * (2 * 2 + 4), |backend, iteration| {
        let ids = |stride: usize| {
            let ids: Vec<u32> = (0..rows).map(|row| ((row + iteration) * stride % N_VOCAB) as u32).collect();
            CpuBuf::from_slice("ids", &ids).expect("memory for ids")
        };
        let (tokens, positions) = (ids(7919), ids(1));
        let lookup = |ids| Lookup { ids, table: &table, offset: 0, first: 0 };
        let (tokens, positions) = (Some(lookup(&tokens)), Some(lookup(&positions)));
        let args = EmbedArgs { out: &mut out, rows, d: D, tokens, positions, drawn: None };
        backend.embed(args).expect("embed");
    });
}

fn sample(bench: &mut Bench<'_>, rows: usize, name: &str, n_top: usize, row: &SampleRow) {
    let rows = vec![row.clone(); rows];
    let mut logits = activations(rows.len() * N_VOCAB);
    let words = |n: usize| CpuBuf::from_slice("ids", &vec![0_u32; n]).expect("memory for ids");
    let (mut ids, mut top_ids) = (words(rows.len()), words(rows.len() * n_top));
    let (mut logprobs, mut top_logprobs) = (activations(rows.len()), activations(rows.len() * n_top));
    let name = format!("sample/{name}/{}x{N_VOCAB}/", rows.len());
    bench.run(&name, rows.len() * N_VOCAB * 4, |backend, _| {
        let args = SampleArgs {
            logits: &mut logits,
            n_vocab: N_VOCAB,
            ld: N_VOCAB,
            rows: &rows,
            ids: &mut ids,
            logprobs: &mut logprobs,
            n_top,
            top_ids: &mut top_ids,
            top_logprobs: &mut top_logprobs,
        };
        backend.sample(args).expect("sample");
    });
}

fn samples(bench: &mut Bench<'_>) {
    let greedy = SampleRow {
        target: None,
        counts: vec![],
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: vec![],
        banned: vec![],
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        sample_idx: 0,
        position: 1,
    };
    let drawn = SampleRow { temperature: 0.8, ..greedy.clone() };
    for rows in [1, 32] {
        sample(bench, rows, "greedy", 0, &greedy);
        sample(bench, rows, "greedy+top=5", 5, &greedy);
        sample(bench, rows, "temperature", 0, &drawn);
        sample(bench, rows, "top_k=50", 0, &SampleRow { top_k: 50, ..drawn.clone() });
        sample(bench, rows, "top_p=0.95", 0, &SampleRow { top_p: 0.95, ..drawn.clone() });
    }
}

fn main() {
    let mut c = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .configure_from_args();
    let mut backend = backend();
    let pool = weights(&mut backend, DType::BF16, POOL_BYTES);
    let mut bench = Bench { c: &mut c, backend, pool, lines: Vec::new() };
    for rows in [1, 32, 512] {
        norm(&mut bench, rows);
        embed(&mut bench, rows);
    }
    samples(&mut bench);
    print_table(&bench.backend, &bench.lines);
    c.final_summary();
}
