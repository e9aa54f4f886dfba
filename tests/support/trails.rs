//! What requests gave, log-probabilities as bits, so that runs can be compared bit by bit or by their largest difference.

#![allow(dead_code, reason = "each test binary takes what it needs")]

use dist_kernels::cpu::CpuBackend;
use dist_models::engine::Engine;
use dist_models::request::{Event, Request, RequestId, Sampling, TokenLogprob};

use super::fixtures::{Case, greedy};

/// Everything that a request gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Trail {
    /// Log-probabilities of the prompt's tokens after the first.
    pub(crate) prompt: Vec<u32>,
    /// The new tokens with theirs.
    pub(crate) tokens: Vec<(u32, u32)>,
    /// The likeliest tokens of every place, if they were asked for.
    pub(crate) likeliest: Vec<(u32, u32)>,
}

impl Trail {
    /// The new tokens.
    pub(crate) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|&(id, _)| id).collect()
    }

    /// Largest difference of two log-probabilities; infinite where the trails are of different lengths.
    ///
    /// The likeliest are compared by value, in their order: two that are equal but for noise may change places.
    pub(crate) fn max_diff(&self, other: &Self) -> f32 {
        let bits = |trail: &Self| -> Vec<f32> {
            let pairs = trail.tokens.iter().chain(&trail.likeliest).map(|&(_, bits)| bits);
            trail.prompt.iter().copied().chain(pairs).map(f32::from_bits).collect()
        };
        let (ours, theirs) = (bits(self), bits(other));
        if ours.len() != theirs.len() {
            return f32::INFINITY;
        }
        ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    fn keep_likeliest(&mut self, token: &TokenLogprob) {
        self.likeliest.extend(token.top.iter().map(|&(id, logprob)| (id, logprob.to_bits())));
    }
}

/// Largest difference of all trails of two runs.
pub(crate) fn max_diff(ours: &[Trail], theirs: &[Trail]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(ours, theirs)| ours.max_diff(theirs)).fold(0.0, f32::max)
}

/// Requests of many lengths, half of them drawn and half greedy.
pub(crate) fn requests(n: usize, n_vocab: u32) -> Vec<Request> {
    let request = |i: usize| {
        let len = 1 + (i * 7) % 40;
        let prompt = (0..len).map(|j| (3 + i * 31 + j * j * 17 + j) as u32 % n_vocab).collect();
        let drawn = Sampling { temperature: 0.9, top_k: 50, top_p: 0.95, seed: i as u64, ..greedy(20) };
        Request {
            id: RequestId(i as u64),
            prompt,
            sampling: if i.is_multiple_of(2) { greedy(20) } else { drawn },
        }
    };
    (0..n).map(request).collect()
}

/// The prompts of a fixture's golden cases, greedy as there, with the twenty likeliest tokens of every place.
pub(crate) fn golden_requests(cases: &[Case]) -> Vec<Request> {
    let sampling = Sampling { logprobs: Some(20), ..greedy(12) };
    let request = |(i, case): (usize, &Case)| Request {
        id: RequestId(i as u64),
        prompt: case.ids.clone(),
        sampling: sampling.clone(),
    };
    cases.iter().enumerate().map(request).collect()
}

/// Runs what the engine has been given to its end; request ids are below `n`.
pub(crate) fn drain(engine: &mut Engine<CpuBackend>, n: usize) -> Vec<Trail> {
    let mut trails = vec![Trail::default(); n];
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            match event {
                Event::Prompt { id, logprobs } => {
                    let trail = &mut trails[id.0 as usize];
                    for token in &logprobs {
                        trail.prompt.push(token.logprob.to_bits());
                        trail.keep_likeliest(token);
                    }
                }
                Event::Token { id, token, .. } => {
                    let trail = &mut trails[id.0 as usize];
                    trail.tokens.push((token.id, token.logprob.to_bits()));
                    trail.keep_likeliest(&token);
                }
                Event::Finished { .. } => {}
            }
        }
    }
    trails
}
