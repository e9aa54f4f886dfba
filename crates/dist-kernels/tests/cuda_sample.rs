//! Sampling on the GPU against the CPU: the same tokens from the same seeds, for every mixture of what a request may
//! ask. Without a GPU the tests say so and pass.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

mod cuda_case;

use cuda_case::{Random, cpu, get, get_words, gpu, poisoned, put, words};
use dist_core::DType;
use dist_kernels::Backend;
use dist_kernels::args::{SampleArgs, SampleRow, TokenCount};

struct Outcome {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    top_ids: Vec<u32>,
    top_logprobs: Vec<f32>,
}

/// Rows of `n_vocab` logits, `ld` apart.
fn sample<B: Backend>(
    backend: &mut B,
    rows: &[SampleRow],
    logits: &[f32],
    (n_vocab, ld): (usize, usize),
    n_top: usize,
) -> Outcome {
    let n = rows.len();
    let mut logits = put(backend, DType::F32, logits);
    let (mut ids, mut top_ids) =
        (words(backend, &vec![u32::MAX; n]), words(backend, &vec![u32::MAX; n * n_top]));
    let mut logprobs = poisoned(backend, DType::F32, n);
    let mut top_logprobs = poisoned(backend, DType::F32, n * n_top);
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
    Outcome {
        ids: get_words(backend, &ids),
        logprobs: get(backend, &logprobs),
        top_ids: get_words(backend, &top_ids),
        top_logprobs: get(backend, &top_logprobs),
    }
}

/// Any of what a request may ask.
fn any_row(random: &mut Random, n_vocab: usize) -> SampleRow {
    let mut counts = vec![];
    if random.below(3) == 0 {
        let mut ids: Vec<u32> =
            (0..random.pick(&[1, 40, 2500])).map(|_| random.below(n_vocab + 3) as u32).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut count =
            |id| TokenCount { id, n_prompt: random.below(3) as u32, n_output: random.below(3) as u32 };
        counts = ids.into_iter().map(&mut count).collect();
    }
    let n_biases = random.pick(&[0, 0, 1, 300]);
    let n_banned = random.pick(&[0, 0, 5, 200]);
    SampleRow {
        target: (random.below(6) == 0).then(|| random.below(n_vocab) as u32),
        counts,
        repetition_penalty: random.pick(&[1.0, 1.3, 0.8]),
        presence_penalty: random.pick(&[0.0, 0.5]),
        frequency_penalty: random.pick(&[0.0, 0.7]),
        logit_bias: (0..n_biases)
            .map(|_| (random.below(n_vocab) as u32, random.below(100) as f32 / 7.0 - 7.0))
            .collect(),
        banned: (0..n_banned).map(|_| random.below(n_vocab.min(300)) as u32).collect(),
        temperature: random.pick(&[0.0, 0.0, 0.2, 0.7, 1.0, 1.5, 30.0, f32::INFINITY]),
        top_k: random.pick(&[0, 0, 1, 5, 50, 3000, n_vocab as u32, n_vocab as u32 + 5]),
        top_p: random.pick(&[1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.95, 0.999]),
        min_p: random.pick(&[0.0, 0.0, 0.05, 0.5, 2.0]),
        seed: ((random.below(1 << 31) as u64) << 33) | random.below(1 << 31) as u64,
        sample_idx: random.below(4) as u32,
        position: random.below(5000) as u32,
    }
}

/// Logits as models give them, and as they should never be.
fn any_logits(random: &mut Random, n: usize) -> Vec<f32> {
    let (scale, offset) = (random.pick(&[0.3, 2.5, 5.0, 30.0]), random.pick(&[0.0, -35.0, 10.0]));
    // A second draw makes equal numbers rare.
    let mut logits = random.normal(n, scale, DType::F32);
    let fine = random.normal(n, 1e-4, DType::F32);
    logits.iter_mut().zip(&fine).for_each(|(logit, fine)| *logit += offset + fine);
    match random.below(12) {
        0 => logits.fill(1.25),
        1 => logits.iter_mut().for_each(|logit| *logit = (*logit * 2.0).round() / 2.0),
        2 => logits.iter_mut().step_by(3).for_each(|logit| *logit = f32::NAN),
        3 => logits[n / 2] = f32::INFINITY,
        4 => logits.fill(f32::NEG_INFINITY),
        5 => logits.iter_mut().step_by(2).for_each(|logit| *logit = -0.0),
        _ => {}
    }
    logits
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        // Infinities are equal in their bits.
        let is_close = found.to_bits() == expected.to_bits()
            || (found - expected).abs() <= 2e-6 * expected.abs().max(1.0);
        assert!(is_close, "{what}: {i}: {found}, not {expected}");
    }
}

#[test]
fn the_gpu_draws_what_the_cpu_draws() {
    let Some((_one, mut gpu)) = gpu("the_gpu_draws_what_the_cpu_draws") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    for (n_vocab, padding, n_rows, n_top) in [
        (1, 3, 9, 1),
        (7, 0, 33, 3),
        (300, 1, 64, 300),
        (8192, 0, 40, 0),
        (8193, 3, 40, 5),
        (50257, 3, 40, 20),
        (50272, 0, 40, 64),
        (262_144, 0, 9, 0),
        (400_003, 1, 5, 1000),
    ] {
        let ld = n_vocab + padding;
        let rows: Vec<_> = (0..n_rows).map(|_| any_row(&mut random, n_vocab)).collect();
        let mut logits = vec![];
        for _ in 0..n_rows {
            logits.extend(any_logits(&mut random, n_vocab));
            // These would win if anybody looked at them.
            logits.extend(vec![1e30; padding]);
        }
        let expected = sample(&mut cpu, &rows, &logits, (n_vocab, ld), n_top);
        let found = sample(&mut gpu, &rows, &logits, (n_vocab, ld), n_top);
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(found.ids[i], expected.ids[i], "row {i} of {n_vocab}: {row:?}");
        }
        assert_eq!(found.top_ids, expected.top_ids, "{n_vocab}");
        assert_close("log-probabilities", &found.logprobs, &expected.logprobs);
        assert_close("likeliest", &found.top_logprobs, &expected.top_logprobs);
        // A row alone draws what it draws among others.
        let at = random.below(n_rows);
        let own = &logits[at * ld..][..ld];
        let alone = sample(&mut gpu, &rows[at..=at], own, (n_vocab, ld), n_top);
        assert_eq!(
            (alone.ids[0], alone.logprobs[0].to_bits()),
            (found.ids[at], found.logprobs[at].to_bits())
        );
    }
}
