//! What a step drew, on its way from the device to whoever asked.

use dist_kernels::{Backend, KernelError};

use super::error::Suspect;
use crate::step::{SampleAt, Sampled, StepBatch};

/// What a step drew, as words that go over a wire: ids, log-probabilities, likeliest ids, their log-probabilities.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) words: Vec<u32>,
    n: usize,
    n_top: usize,
}

impl Drawn {
    pub(super) fn new(n: usize, n_top: usize) -> Self {
        Self { n, n_top, words: vec![0; n * (2 + 2 * n_top)] }
    }

    pub(super) fn id(&self, i: usize) -> u32 {
        self.words[i]
    }

    pub(super) fn sampled(&self, i: usize, n_top: usize) -> Sampled {
        let (logprobs, tops) = (self.n, 2 * self.n + i * self.n_top);
        let top = tops..tops + n_top.min(self.n_top);
        let top = top.map(|at| (self.words[at], f32::from_bits(self.words[at + self.n * self.n_top])));
        Sampled { id: self.id(i), logprob: f32::from_bits(self.words[logprobs + i]), top: top.collect() }
    }
}

/// Where the draws of a step are.
#[derive(Debug)]
pub(super) enum Draws<B: Backend> {
    /// On the device, or on the way from there.
    Asked(B::Fetch),
    /// Here.
    Here(Drawn),
    /// On the last stage, which sends them.
    Elsewhere,
}

/// A step that was submitted and not collected.
#[derive(Debug)]
pub(super) struct Flight<B: Backend> {
    pub(super) step: u64,
    /// Rows of the graph that it runs as, if it is a recorded step.
    pub(super) graph_rows: Option<usize>,
    /// Each sampled row's sequence slot, and how many likeliest tokens it wants.
    pub(super) rows: Vec<(Option<u32>, usize)>,
    /// The most that one of them wants.
    pub(super) n_top: usize,
    pub(super) draws: Draws<B>,
}

impl<B: Backend> Flight<B> {
    pub(super) fn of(batch: &StepBatch, graph_rows: Option<usize>, n_top: usize, draws: Draws<B>) -> Self {
        let row = |sample: &SampleAt| (sample.seq_slot, sample.n_top as usize);
        Self { step: batch.step, graph_rows, rows: batch.samples.iter().map(row).collect(), n_top, draws }
    }

    /// What may be to blame for an error.
    pub(super) fn suspect(&self) -> Suspect {
        Suspect { step: self.step, graph_rows: self.graph_rows }
    }

    /// The row that draws for `seq_slot`.
    pub(super) fn row_of(&self, seq_slot: u32) -> Option<usize> {
        self.rows.iter().position(|row| row.0 == Some(seq_slot))
    }
}

/// Waits for what a step of `n` rows drew.
pub(super) fn arrive<B: Backend>(
    backend: &mut B,
    fetch: B::Fetch,
    n: usize,
    n_top: usize,
) -> Result<Drawn, KernelError> {
    let mut drawn = Drawn::new(n, n_top);
    backend.finish(fetch, bytemuck::cast_slice_mut(&mut drawn.words))?;
    Ok(drawn)
}
