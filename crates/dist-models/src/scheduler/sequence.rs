//! One sample of a request on its way: what it has, what it wants next, what of that is still in flight.

use std::sync::Arc;

use dist_kernels::args::{SampleRow, TokenCount};

use crate::kv_blocks::BlockTable;
use crate::request::{FinishReason, Request};
use crate::scheduler::Limits;
use crate::step::InputToken;

/// Names a sequence for good, unlike its request's id, which may come again. Ordered by arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SeqKey {
    pub(crate) arrival: u64,
    pub(crate) sample_idx: u32,
}

/// What a running sequence holds beside its tokens.
#[derive(Debug)]
pub(crate) struct Seat {
    pub(crate) seq_slot: u32,
    pub(crate) table: BlockTable,
    /// Tokens whose keys and values are in the cache once the batches in flight are done.
    pub(crate) n_cached: usize,
}

/// A sequence, running or waiting.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) key: SeqKey,
    pub(crate) request: Arc<Request>,
    /// Prompt and committed new tokens.
    pub(crate) tokens: Vec<u32>,
    /// Tokens that batches in flight draw.
    pub(crate) n_drawing: usize,
    /// New tokens at most, the context considered.
    max_new_tokens: usize,
    /// Prompt tokens that are scored in the end.
    n_to_score: usize,
    /// Of those, the ones that a batch has scored, in flight or committed: none is scored twice.
    pub(crate) n_scoring: usize,
    /// Of those, the ones that are committed.
    pub(crate) n_scored: usize,
    /// Whether every token has to be known before the next row is computed.
    pub(crate) sees_all: bool,
    /// Kept only if a penalty needs it; sorted by token.
    counts: Option<Vec<TokenCount>>,
    /// Tokens that end the sample, sorted.
    stop_ids: Arc<[u32]>,
}

/// Tokens of one sample that are ever in the cache: its last one has no successor, so that it is never computed.
pub(crate) fn n_rows_max(request: &Request, limits: &Limits) -> usize {
    let n_tokens = request.prompt.len().saturating_add(request.sampling.max_new_tokens);
    n_tokens.min(limits.max_seq_len) - 1
}

impl Sequence {
    /// A sequence that has not begun. The first sample scores the prompt for all of them.
    pub(crate) fn new(key: SeqKey, request: Arc<Request>, stop_ids: Arc<[u32]>, limits: &Limits) -> Self {
        let (sampling, prompt_len) = (&request.sampling, request.prompt.len());
        let scores = sampling.prompt_logprobs && key.sample_idx == 0;
        // Off is one exact value.
        #[expect(clippy::float_cmp, reason = "a penalty is off at one exact value")]
        let is_penalised = sampling.repetition_penalty != 1.0
            || sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0;
        let mut seq = Self {
            key,
            tokens: request.prompt.clone(),
            n_drawing: 0,
            max_new_tokens: sampling.max_new_tokens.min(limits.max_seq_len - prompt_len),
            n_to_score: if scores { prompt_len - 1 } else { 0 },
            n_scoring: 0,
            n_scored: 0,
            // Penalties count every token before.
            sees_all: is_penalised,
            counts: is_penalised.then(Vec::new),
            stop_ids,
            request,
        };
        for i in 0..prompt_len {
            seq.count(seq.tokens[i], |count| count.n_prompt += 1);
        }
        seq
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// Committed new tokens.
    fn n_new(&self) -> usize {
        self.tokens.len() - self.prompt_len()
    }

    /// Tokens, counted as if what is in flight had been drawn.
    fn len_ahead(&self) -> usize {
        self.tokens.len() + self.n_drawing
    }

    /// Rows that may be computed now, `n_cached` tokens being in the cache already.
    pub(crate) fn n_rows_wanted(&self, n_cached: usize) -> usize {
        if self.max_new_tokens == 0 {
            // Scores only: the row of the last prompt token is of no use.
            let is_done = self.n_scoring == self.n_to_score;
            return if is_done { 0 } else { self.prompt_len() - 1 - n_cached };
        }
        let is_full = self.n_new() + self.n_drawing >= self.max_new_tokens;
        let must_see = self.sees_all && self.n_drawing > 0;
        if is_full || must_see { 0 } else { self.len_ahead() - n_cached }
    }

    /// Whether the next row continues the output; else tokens are known that are not in the cache yet.
    pub(crate) fn is_decoding(&self, seat: &Seat) -> bool {
        self.n_rows_wanted(seat.n_cached) == 1 && seat.n_cached >= self.prompt_len()
    }

    /// The most rows within the budgets.
    pub(crate) fn n_rows_within(&self, n_cached: usize, max_rows: usize, max_samples: usize) -> usize {
        let n_wanted = self.n_rows_wanted(n_cached);
        let fits = |&n_rows: &usize| self.n_samples(n_cached, n_rows, n_wanted) <= max_samples;
        (1..=n_wanted.min(max_rows)).rev().find(fits).unwrap_or(0)
    }

    /// Rows among the next `n_rows` of `n_wanted` whose logits are wanted.
    fn n_samples(&self, n_cached: usize, n_rows: usize, n_wanted: usize) -> usize {
        let end = (n_cached + n_rows).min(self.n_to_score);
        let draws = n_rows == n_wanted && self.max_new_tokens > 0;
        end.saturating_sub(self.n_scoring.max(n_cached)) + usize::from(draws)
    }

    /// The token at `position`, which the device may know before the host does.
    pub(crate) fn input(&self, position: usize, seq_slot: u32) -> InputToken {
        self.tokens.get(position).map_or(InputToken::Last(seq_slot), |&id| InputToken::Known(id))
    }

    /// What is done with the logits of the row at `position`, which is the next one: scores, draws, or nothing.
    pub(crate) fn sample_row(&self, position: usize) -> Option<SampleRow> {
        if (self.n_scoring..self.n_to_score).contains(&position) {
            return Some(self.score_row(position + 1));
        }
        let draws = self.max_new_tokens > 0 && position + 1 == self.len_ahead();
        draws.then(|| self.draw_row(position + 1))
    }

    fn draw_row(&self, position: usize) -> SampleRow {
        let sampling = &self.request.sampling;
        let is_short = position - self.prompt_len() < sampling.min_new_tokens;
        SampleRow {
            target: None,
            counts: self.counts.clone().unwrap_or_default(),
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.clone(),
            banned: if is_short { self.stop_ids.to_vec() } else { Vec::new() },
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            sample_idx: self.key.sample_idx,
            position: position as u32,
        }
    }

    /// Scores are the model's own, so that nothing of the request's sampling takes part.
    fn score_row(&self, position: usize) -> SampleRow {
        SampleRow {
            target: Some(self.tokens[position]),
            counts: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            banned: Vec::new(),
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: self.request.sampling.seed,
            sample_idx: self.key.sample_idx,
            position: position as u32,
        }
    }

    /// Takes in a token that was drawn.
    pub(crate) fn push(&mut self, id: u32) {
        self.n_drawing -= 1;
        self.tokens.push(id);
        self.count(id, |count| count.n_output += 1);
    }

    fn count(&mut self, id: u32, add: impl FnOnce(&mut TokenCount)) {
        let Some(counts) = &mut self.counts else { return };
        let at = counts.binary_search_by_key(&id, |count| count.id).unwrap_or_else(|at| {
            counts.insert(at, TokenCount { id, n_prompt: 0, n_output: 0 });
            at
        });
        add(&mut counts[at]);
    }

    /// Whether the last committed token is one that ends the sample.
    pub(crate) fn ends_with_stop(&self) -> bool {
        let may_stop = self.n_new() > self.request.sampling.min_new_tokens;
        may_stop && self.tokens.last().is_some_and(|id| self.stop_ids.binary_search(id).is_ok())
    }

    /// Why the sample is over, if it is.
    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        let is_full = self.n_new() >= self.max_new_tokens && self.n_scored == self.n_to_score;
        if self.ends_with_stop() { Some(FinishReason::Stop) } else { is_full.then_some(FinishReason::Length) }
    }
}
