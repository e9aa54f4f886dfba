//! Log-probabilities, greedy choice, penalties, biases, bans, and logits that no model should give.

mod sample_case;

use dist_kernels::args::{SampleRow, TokenCount};
use dist_kernels::cpu::CpuPath;
use proptest::prelude::*;
use sample_case::{Outcome, backend, greedy, logits, plain, ranked, sample, sample_one};

const PATHS: [CpuPath; 2] = [CpuPath::Auto, CpuPath::Portable];

/// Samples on both paths, which must agree.
fn outcome(row: &SampleRow, logits: &[f32], n_top: usize) -> Outcome {
    let [auto, portable] = PATHS.map(|path| sample_one(&mut backend(path, 1), row, logits, n_top));
    assert_eq!(format!("{auto:?}"), format!("{portable:?}"), "auto and portable differ: {row:?}");
    auto
}

/// The twenty best lie above −8, where half a unit in the last place is 2.4e-7. Measured: 1.6e-7.
#[test]
fn log_probabilities_are_those_of_the_model() {
    for n in [1, 7, 300, 50_257] {
        let logits = logits("logprobs", n, 3.0);
        let exact: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
        let n_top = n.min(20);
        // What is asked of the draw has no influence on them.
        let row = SampleRow { repetition_penalty: 2.0, top_k: 3, logit_bias: vec![(0, 5.0)], ..plain(3) };
        for row in [greedy(), row] {
            let outcome = outcome(&row, &logits, n_top);
            let ranked = ranked(&logits);
            for (&(id, logprob), &expected) in outcome.top.iter().zip(&ranked) {
                assert_eq!(id as usize, expected, "{n} tokens");
                let error = (f64::from(logprob) - (f64::from(logits[expected]) - exact)).abs();
                assert!(error < 2.5e-7, "{n} tokens: {logprob} is off by {error:e}");
            }
            for (id, logprob) in outcome.top {
                assert!(id != outcome.id || logprob.to_bits() == outcome.logprob.to_bits(), "{n} tokens");
            }
        }
    }
}

#[test]
fn a_target_is_scored_and_not_drawn() {
    let logits = logits("target", 100, 3.0);
    let all = outcome(&greedy(), &logits, 100).top;
    for target in [0, 42, 99] {
        let row = SampleRow { target: Some(target), banned: vec![target], ..plain(0) };
        let outcome = outcome(&row, &logits, 3);
        let listed = all.iter().find(|&&(id, _)| id == target).unwrap().1;
        assert_eq!((outcome.id, outcome.logprob.to_bits()), (target, listed.to_bits()));
        assert_eq!(outcome.top, all[..3]);
    }
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    assert_eq!(outcome(&greedy(), &[1.0, 3.0, 3.0, 2.0, 3.0], 0).id, 1);
    assert_eq!(outcome(&greedy(), &[-0.0, 0.0], 2).top[0].0, 0);
    assert_eq!(outcome(&greedy(), &[0.0, -0.0], 2).top[0].0, 0);
    let top: Vec<u32> = outcome(&greedy(), &[0.0; 200], 100).top.iter().map(|top| top.0).collect();
    assert_eq!(top, (0..100).collect::<Vec<_>>());
}

#[test]
fn penalties_are_those_of_their_papers() {
    let count = |id, n_prompt, n_output| TokenCount { id, n_prompt, n_output };
    let winner = |row: SampleRow, logits: &[f32]| outcome(&row, logits, 0).id;
    let seen = vec![count(0, 1, 0), count(1, 0, 2)];
    let repetition = |repetition_penalty| SampleRow { repetition_penalty, counts: seen.clone(), ..greedy() };
    // Positive logits are divided, negative ones multiplied, for the prompt's tokens too.
    assert_eq!(winner(repetition(2.0), &[4.0, 4.1, 2.04]), 1);
    assert_eq!(winner(repetition(2.0), &[4.0, 4.1, 2.06]), 2);
    assert_eq!(winner(repetition(2.0), &[-1.0, -1.1, -2.05]), 0);
    assert_eq!(winner(repetition(2.0), &[-1.0, -1.1, -1.95]), 2);
    // Presence and frequency count the output only.
    let presence = SampleRow { presence_penalty: 1.0, counts: seen.clone(), ..greedy() };
    assert_eq!(winner(presence.clone(), &[2.0, 2.9, 0.0]), 0);
    assert_eq!(winner(presence, &[2.0, 3.1, 0.0]), 1);
    let frequency = SampleRow { frequency_penalty: 1.0, counts: seen.clone(), ..greedy() };
    assert_eq!(winner(frequency.clone(), &[2.0, 3.9, 0.0]), 0);
    assert_eq!(winner(frequency, &[2.0, 4.1, 0.0]), 1);
    // The repetition penalty comes first: (4 / 2) − 1 = 1, not (4 − 1) / 2 = 1.5.
    let both = SampleRow { repetition_penalty: 2.0, presence_penalty: 1.0, counts: seen, ..greedy() };
    assert_eq!(winner(both, &[-9.0, 4.0, 1.25]), 2);
    let bias = SampleRow { logit_bias: vec![(2, 5.0), (0, -5.0), (77, 9.0)], ..greedy() };
    assert_eq!(winner(bias, &[4.0, 1.0, 0.0]), 2);
}

#[test]
fn a_banned_token_is_never_chosen() {
    let logits = logits("banned", 50, 2.0);
    let banned: Vec<u32> = ranked(&logits).iter().take(10).map(|&id| id as u32).collect();
    let bias = banned.iter().map(|&id| (id, 100.0)).collect();
    let row = SampleRow { banned: banned.clone(), logit_bias: bias, ..plain(0) };
    let mut rows: Vec<SampleRow> = (0..2000).map(|position| SampleRow { position, ..row.clone() }).collect();
    rows.push(SampleRow { temperature: 0.0, ..row });
    for path in PATHS {
        for outcome in sample(&mut backend(path, 2), &rows, &vec![&logits[..]; rows.len()], 0) {
            assert!(!banned.contains(&outcome.id), "{} on path {path:?}", outcome.id);
        }
    }
}

#[test]
fn impossible_logits_do_no_harm() {
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let filtered = SampleRow { top_k: 2, top_p: 0.9, min_p: 0.1, ..plain(0) };
    for row in [greedy(), plain(0), filtered] {
        assert_eq!(outcome(&row, &[NAN; 5], 5).id, 0);
        assert_eq!(outcome(&row, &[-INF; 5], 5).logprob.to_bits(), (-INF).to_bits());
        assert_eq!(outcome(&row, &[NAN, -INF, 3.0, NAN], 4).id, 2);
        assert_eq!(outcome(&row, &[0.0, INF, 5.0], 3).id, 1);
        let all_but_two = SampleRow { banned: vec![0, 1, 3], ..row.clone() };
        assert_eq!(outcome(&all_but_two, &[NAN; 4], 0).id, 2);
        assert_eq!(outcome(&SampleRow { banned: vec![0, 1], ..row }, &[1.0, 2.0], 0).id, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, a token of the vocabulary comes out, the same one twice, and no log-probability is NaN.
    #[test]
    fn any_row_gives_a_token(
        logits in proptest::collection::vec(any::<f32>(), 1..200),
        floats in proptest::array::uniform6(any::<f32>()),
        top_k in any::<u32>(),
        bias in proptest::collection::vec((0..300_u32, any::<f32>()), 0..4),
        banned in proptest::collection::vec(0..300_u32, 0..4),
        counts in proptest::collection::vec((0..300_u32, 0..3_u32, 0..3_u32), 0..4),
    ) {
        let [repetition_penalty, presence_penalty, frequency_penalty, temperature, top_p, min_p] = floats;
        let counts = counts.iter().map(|&(id, n_prompt, n_output)| TokenCount { id, n_prompt, n_output }).collect();
        let row = SampleRow {
            counts, repetition_penalty, presence_penalty, frequency_penalty, logit_bias: bias, banned, temperature,
            top_k, top_p, min_p, ..plain(5)
        };
        let n_top = logits.len().min(7);
        let mut backend = backend(CpuPath::Auto, 1);
        let outcomes = [0, 1].map(|_| sample_one(&mut backend, &row, &logits, n_top));
        prop_assert_eq!(format!("{:?}", outcomes[0]), format!("{:?}", outcomes[1]));
        prop_assert!((outcomes[0].id as usize) < logits.len());
        prop_assert!(!outcomes[0].logprob.is_nan());
        prop_assert!(outcomes[0].top.iter().all(|top| !top.1.is_nan()));
    }
}
