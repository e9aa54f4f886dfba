//! Rows for the sampling tests and a plain reading of what they ask for.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.
#![allow(dead_code)] // Each test file uses its part.

use std::time::Duration;

use dist_core::philox::{NormalTable, stream_key};
use dist_kernels::Backend;
use dist_kernels::args::{SampleArgs, SampleRow};
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};

pub(crate) fn backend(path: CpuPath, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path, spin: Duration::from_micros(20) }).unwrap()
}

/// Draws from the model's own distribution.
pub(crate) fn plain(position: u32) -> SampleRow {
    SampleRow {
        target: None,
        counts: vec![],
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: vec![],
        banned: vec![],
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1234,
        sample_idx: 0,
        position,
    }
}

pub(crate) fn greedy() -> SampleRow {
    SampleRow { temperature: 0.0, ..plain(0) }
}

pub(crate) fn logits(name: &str, n: usize, std_dev: f64) -> Vec<f32> {
    let (table, key) = (NormalTable::new(std_dev), stream_key(9, name));
    (0..n).map(|i| table.at(key, i as u64)).collect()
}

/// What a row gave.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) id: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

/// Samples rows, each with its own logits; the padding columns would win if anybody looked at them.
pub(crate) fn sample(
    backend: &mut CpuBackend,
    rows: &[SampleRow],
    logits: &[&[f32]],
    n_top: usize,
) -> Vec<Outcome> {
    let n_vocab = logits[0].len();
    let ld = n_vocab + 3;
    let mut padded = vec![1e30; rows.len() * ld];
    for (padded, logits) in padded.chunks_mut(ld).zip(logits) {
        padded[..n_vocab].copy_from_slice(logits);
    }
    let floats = |n: usize| CpuBuf::from_slice("test", &vec![f32::NAN; n]).unwrap();
    let words = |n: usize| CpuBuf::from_slice("test", &vec![u32::MAX; n]).unwrap();
    let (mut ids, mut logprobs) = (words(rows.len()), floats(rows.len()));
    let (mut top_ids, mut top_logprobs) = (words(rows.len() * n_top), floats(rows.len() * n_top));
    let mut logits = CpuBuf::from_slice("test", &padded).unwrap();
    backend
        .sample(SampleArgs {
            logits: &mut logits,
            n_vocab,
            ld,
            rows,
            ids: &mut ids,
            logprobs: &mut logprobs,
            n_top,
            top_ids: &mut top_ids,
            top_logprobs: &mut top_logprobs,
        })
        .unwrap();
    (0..rows.len())
        .map(|row| Outcome {
            id: ids.slice::<u32>()[row],
            logprob: logprobs.slice::<f32>()[row],
            top: (row * n_top..(row + 1) * n_top)
                .map(|at| (top_ids.slice::<u32>()[at], top_logprobs.slice::<f32>()[at]))
                .collect(),
        })
        .collect()
}

/// Samples one row.
pub(crate) fn sample_one(backend: &mut CpuBackend, row: &SampleRow, logits: &[f32], n_top: usize) -> Outcome {
    sample(backend, std::slice::from_ref(row), &[logits], n_top).remove(0)
}

/// All tokens, likeliest first, lowest id first among equals.
pub(crate) fn ranked(logits: &[f32]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    ids
}

/// The probability with which each token is drawn, filters applied one after another as their docs say.
pub(crate) fn probabilities(row: &SampleRow, logits: &[f32]) -> Vec<f64> {
    let ranked = ranked(logits);
    let weight = |id: usize| {
        let below = f64::from(logits[id]) - f64::from(logits[ranked[0]]);
        (below / f64::from(row.temperature)).exp()
    };
    let mut kept = ranked.clone();
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    if row.top_p < 1.0 {
        let mut sum = 0.0;
        let n_before = kept
            .iter()
            .take_while(|&&id| {
                sum += weight(id);
                sum < f64::from(row.top_p) * total
            })
            .count();
        kept.truncate(n_before + 1);
    }
    kept.retain(|&id| weight(id) >= f64::from(row.min_p));
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    let mut probabilities = vec![0.0; logits.len()];
    for id in kept {
        probabilities[id] = weight(id) / total;
    }
    probabilities
}
