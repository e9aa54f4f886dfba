//! One value per step with everything that every rank needs, and what comes back. Plain data, nothing callable.

use dist_kernels::args::SampleRow;
use serde::{Deserialize, Serialize};

/// The token at a row of the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InputToken {
    /// This token.
    Known(u32),
    /// What was drawn last for this sequence slot: read where it was drawn, before the host has seen it.
    Last(u32),
}

/// A row of the step whose logits are wanted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleAt {
    /// Row of the step.
    pub row: u32,
    /// Sequence slot that keeps the drawn token; `None` for rows that only score a prompt token.
    pub seq_slot: Option<u32>,
    /// How to draw or what to score.
    pub how: SampleRow,
    /// How many of the likeliest tokens to report.
    pub n_top: u32,
}

/// Everything every rank needs for one step. Flat ragged arrays, ready to upload.
///
/// Prefill chunks and decode rows share a batch; rows of a sequence are neighbours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepBatch {
    /// Membership that the step belongs to.
    pub generation: u64,
    /// Number of the step within the generation.
    pub step: u64,
    /// `[rows]`.
    pub tokens: Vec<InputToken>,
    /// `[rows]`, counted from zero in each sequence.
    pub positions: Vec<u32>,
    /// `[rows]`, place in the KV cache; −1 marks padding: compute it, do not store it.
    pub slots: Vec<i32>,
    /// `[n_seqs + 1]`, first row of each sequence.
    pub q_offsets: Vec<u32>,
    /// `[n_seqs]`, tokens in the cache including this step's.
    pub context_lens: Vec<u32>,
    /// `[n_seqs]`, where a sequence's last token is kept between steps.
    pub seq_slots: Vec<u32>,
    /// `[n_seqs, max_blocks]`; entries beyond a sequence's blocks are zero.
    pub block_tables: Vec<u32>,
    /// Width of `block_tables`.
    pub max_blocks: u32,
    /// Rows whose logits are wanted, in order of rows.
    pub samples: Vec<SampleAt>,
}

impl StepBatch {
    /// A step without rows.
    pub(crate) fn empty() -> Self {
        Self {
            generation: 0,
            step: 0,
            tokens: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            q_offsets: vec![0],
            context_lens: Vec::new(),
            seq_slots: Vec::new(),
            block_tables: Vec::new(),
            max_blocks: 0,
            samples: Vec::new(),
        }
    }

    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Sequences of the step.
    pub fn n_seqs(&self) -> usize {
        self.context_lens.len()
    }
}

/// What one sampled row gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampled {
    /// The token drawn or scored.
    pub id: u32,
    /// Its log-probability under the model.
    pub logprob: f32,
    /// The likeliest tokens with theirs, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a step gave: one entry for each of the batch's `samples`, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepOutput {
    /// Number of the step.
    pub step: u64,
    /// One a sampled row.
    pub sampled: Vec<Sampled>,
}
