//! Draws: their frequencies, what filters leave, and that nothing but the request decides.

mod sample_case;

use dist_kernels::args::SampleRow;
use dist_kernels::cpu::CpuPath;
use sample_case::{backend, greedy, logits, plain, probabilities, sample, sample_one};

const DRAWS: u32 = 8_000;

/// Draws at many positions and holds the frequencies against the probabilities: no token without one, and Pearson's
/// statistic within five standard deviations, √(2 n), of its mean n, the number of tokens less one. The seed is fixed.
/// That the other path draws the same tokens is for `nothing_but_the_request_decides`.
fn check(row: &SampleRow, logits: &[f32]) {
    let expected = probabilities(row, logits);
    let rows: Vec<SampleRow> = (0..DRAWS).map(|position| SampleRow { position, ..row.clone() }).collect();
    let mut backend = backend(CpuPath::Auto, 2);
    let path = backend.describe().path;
    let mut counts = vec![0.0; logits.len()];
    for outcome in sample(&mut backend, &rows, &vec![logits; rows.len()], 0) {
        counts[outcome.id as usize] += 1.0;
    }
    let (mut statistic, mut n, mut rare) = (0.0, 0.0_f64, (0.0, 0.0_f64));
    for (&count, &probability) in counts.iter().zip(&expected) {
        assert!(probability > 0.0 || count == 0.0, "a token that was left out was drawn: {row:?}, {path}");
        let mean = probability * f64::from(DRAWS);
        if mean < 5.0 {
            rare = (rare.0 + count, rare.1 + mean);
        } else {
            statistic += (count - mean).powi(2) / mean;
            n += 1.0;
        }
    }
    if rare.1 > 0.0 {
        statistic += (rare.0 - rare.1).powi(2) / rare.1;
        n += 1.0;
    }
    let bound = n - 1.0 + 5.0 * (2.0 * (n - 1.0)).sqrt();
    assert!(statistic <= bound, "statistic {statistic} of {n} tokens on path {path}: {row:?}");
}

#[test]
fn frequencies_follow_the_probabilities() {
    let logits = logits("peaked", 300, 2.0);
    for temperature in [0.3, 1.0, 2.5, 1e9] {
        check(&SampleRow { temperature, ..plain(0) }, &logits);
    }
}

#[test]
fn filters_leave_what_they_say() {
    let logits = logits("filtered", 300, 2.0);
    for top_k in [1, 2, 17, 299, 300, 1000] {
        check(&SampleRow { top_k, ..plain(0) }, &logits);
    }
    for top_p in [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999] {
        check(&SampleRow { top_p, ..plain(0) }, &logits);
    }
    for min_p in [1e-6, 0.01, 0.3, 1.0] {
        check(&SampleRow { min_p, ..plain(0) }, &logits);
    }
    for (temperature, top_k, top_p, min_p) in [(0.7, 40, 0.9, 0.02), (1.5, 100, 0.7, 0.0), (2.0, 5, 1.0, 0.5)]
    {
        check(&SampleRow { temperature, top_k, top_p, min_p, ..plain(0) }, &logits);
    }
}

#[test]
fn ties_at_the_border_go_to_the_lowest_ids() {
    let logits: Vec<f32> = (0..64).map(|id| if id % 2 == 0 { 1.0 } else { 0.0 }).collect();
    for (top_k, top_p) in [(5, 1.0), (40, 1.0), (0, 0.25), (0, 0.9), (33, 0.99)] {
        check(&SampleRow { top_k, top_p, ..plain(0) }, &logits);
    }
}

#[test]
fn distant_logits_are_still_in_order() {
    // Beyond 32 below the greatest all tokens share a bucket, and their weights fade to zero.
    let logits: Vec<f32> = (0..100).map(|id| -3.0 * id as f32).collect();
    for top_k in [1, 3, 20, 60] {
        check(&SampleRow { top_k, ..plain(0) }, &logits);
    }
    check(&SampleRow { temperature: 50.0, top_k: 30, ..plain(0) }, &logits);
}

#[test]
fn a_large_vocabulary_is_drawn_alike() {
    let logits = logits("large", 50_257, 1.0);
    for (top_k, top_p) in [(50, 1.0), (0, 0.001)] {
        let row = SampleRow { top_k, top_p, ..plain(0) };
        let expected = probabilities(&row, &logits);
        let rows: Vec<SampleRow> = (0..200).map(|position| SampleRow { position, ..row.clone() }).collect();
        for outcome in sample(&mut backend(CpuPath::Auto, 2), &rows, &vec![&logits[..]; rows.len()], 0) {
            assert!(expected[outcome.id as usize] > 0.0, "path auto: {} of {row:?}", outcome.id);
        }
    }
}

#[test]
fn nothing_but_the_request_decides() {
    let all: Vec<Vec<f32>> = (0..40).map(|row| logits(&format!("row {row}"), 1003, 3.0)).collect();
    let rows: Vec<SampleRow> = (0..40)
        .map(|idx| match idx % 4 {
            0 => greedy(),
            1 => SampleRow { top_p: 0.9, seed: idx, ..plain(7) },
            2 => SampleRow { top_k: 20, min_p: 0.1, sample_idx: idx as u32, ..plain(9) },
            _ => SampleRow { temperature: 1.3, ..plain(idx as u32) },
        })
        .collect();
    let slices: Vec<&[f32]> = all.iter().map(|logits| &logits[..]).collect();
    let bits = |outcome: &sample_case::Outcome| {
        let top: Vec<_> = outcome.top.iter().map(|&(id, logprob)| (id, logprob.to_bits())).collect();
        (outcome.id, outcome.logprob.to_bits(), top)
    };
    let expected: Vec<_> =
        sample(&mut backend(CpuPath::Auto, 1), &rows, &slices, 5).iter().map(bits).collect();
    for (path, threads) in
        [(CpuPath::Portable, 1), (CpuPath::Auto, 2), (CpuPath::Auto, 4), (CpuPath::Portable, 3)]
    {
        let mut backend = backend(path, threads);
        let together: Vec<_> = sample(&mut backend, &rows, &slices, 5).iter().map(bits).collect();
        assert!(together == expected, "{threads} threads on path {path:?}");
        for ((row, logits), expected) in rows.iter().zip(&slices).zip(&expected) {
            let alone = sample_one(&mut backend, row, logits, 5);
            assert!(bits(&alone) == *expected, "alone on path {path:?}: {row:?}");
        }
    }
}

#[test]
fn seed_sample_and_position_each_change_the_draw() {
    let logits = vec![0.0; 1000];
    let mut backend = backend(CpuPath::Auto, 1);
    let mut draw = |seed: u64, sample_idx: u32, position: u32| {
        sample_one(&mut backend, &SampleRow { seed, sample_idx, position, ..plain(0) }, &logits, 0).id
    };
    let draws = [draw(1, 0, 0), draw(1 << 32, 0, 0), draw(1, 1, 0), draw(1, 0, 1), draw(1, 1, 1)];
    let distinct: std::collections::HashSet<u32> = draws.into_iter().collect();
    assert_eq!(distinct.len(), draws.len(), "{draws:?}");
    assert_eq!(draw(1, 0, 0), draws[0]);
}
