//! Attention against a plain double-precision computation, over head sizes, groups, windows, blocks and cache types.

mod attention_case;

use attention_case::{Blocks, Heads, Seq, attend, backend, number, query, stored};
use dist_core::DType;
use dist_kernels::cpu::CpuPath;

/// One row of one head, as the textbook says.
fn textbook(heads: Heads, id: u32, position: usize, head: usize) -> Vec<f64> {
    let Heads { n_heads, n_kv_heads, d_head, window, dtype } = heads;
    let kv_head = head / (n_heads / n_kv_heads);
    let cached = |kind, at, element| f64::from(stored(dtype, number(kind, id, at, kv_head, element)));
    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
    let scores: Vec<f64> = (first..=position)
        .map(|at| {
            let dot: f64 = (0..d_head)
                .map(|element| f64::from(query(id, position, head, element)) * cached(1, at, element))
                .sum();
            dot * f64::from(heads.scale())
        })
        .collect();
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - greatest).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..d_head)
        .map(|element| {
            let sum: f64 =
                weights.iter().zip(first..).map(|(weight, at)| weight * cached(2, at, element)).sum();
            sum / total
        })
        .collect()
}

/// Greatest absolute error of a batch; values lie in [−1, 1).
fn error(path: CpuPath, heads: Heads, blocks: Blocks, seqs: &[Seq]) -> f64 {
    let mut backend = backend(path, 2);
    let mut worst = 0.0_f64;
    for (seq, out) in seqs.iter().zip(attend(&mut backend, heads, blocks, seqs)) {
        for (idx, out) in out.chunks_exact(heads.d_head).enumerate() {
            let (row, head) = (idx / heads.n_heads, idx % heads.n_heads);
            let exact = textbook(heads, seq.id, seq.context - seq.rows + row, head);
            for (&ours, exact) in out.iter().zip(exact) {
                assert!(!ours.is_nan(), "{}: NaN in {heads:?} {seq:?}", backend.describe().path);
                worst = worst.max((f64::from(ours) - exact).abs());
            }
        }
    }
    worst
}

/// Measured over all cases of this file: 6.1e-7 at most. The greatest scores are near 10, which `f32` holds to 5e-7; the
/// exponential makes that the relative error of weights, and values are at most one.
const BOUND: f64 = 1e-6;

fn check(heads: Heads, blocks: Blocks, seqs: &[Seq]) {
    for path in [CpuPath::Auto, CpuPath::Portable] {
        let error = error(path, heads, blocks, seqs);
        assert!(error < BOUND, "path {path:?}: error {error:e} in {heads:?} {blocks:?} {seqs:?}");
    }
}

fn seq(id: u32, rows: usize, context: usize) -> Seq {
    Seq { id, rows, context }
}

#[test]
fn every_head_size() {
    for d_head in [1, 4, 8, 12, 16, 20, 24, 64, 80, 96, 128] {
        check(Heads::new(2, 2, d_head), Blocks::InOrder(16), &[seq(0, 9, 9), seq(1, 1, 37), seq(2, 7, 40)]);
    }
}

#[test]
fn grouped_query_heads() {
    for (n_heads, n_kv_heads) in [(4, 1), (6, 2), (12, 4), (40, 1)] {
        check(Heads::new(n_heads, n_kv_heads, 16), Blocks::Scattered(16), &[seq(0, 5, 21), seq(1, 1, 33)]);
    }
}

#[test]
fn windows_of_all_widths() {
    for window in [1, 2, 7, 8, 16, 31, 32, 33, 64, 1000] {
        let heads = Heads { window: Some(window), ..Heads::new(2, 1, 8) };
        check(heads, Blocks::Scattered(16), &[seq(0, 50, 50), seq(1, 1, 100), seq(2, 3, 65), seq(3, 1, 1)]);
    }
}

#[test]
fn blocks_of_any_size_end_anywhere() {
    for block_size in [1, 3, 4, 16, 32, 48] {
        for context in [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49] {
            let rows = context.min(4);
            check(Heads::new(1, 1, 12), Blocks::Scattered(block_size), &[seq(0, rows, context)]);
        }
    }
}

#[test]
fn a_cache_in_half_precision() {
    for dtype in [DType::F16, DType::BF16] {
        let heads = Heads { dtype, ..Heads::new(2, 1, 20) };
        check(heads, Blocks::InOrder(16), &[seq(0, 20, 20), seq(1, 1, 65)]);
    }
}

#[test]
fn a_long_context() {
    check(Heads::new(2, 2, 64), Blocks::Scattered(16), &[seq(0, 2, 1500), seq(1, 40, 600)]);
}
