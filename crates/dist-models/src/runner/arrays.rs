//! A step's arrays as they go to the device, filled up to the shape of a recorded step.

use bytemuck::cast_slice;
use dist_kernels::args::{DRAWN, SampleRow};
use dist_kernels::{Backend, KernelError};

use super::drawn::Flight;
use crate::step::{InputToken, StepBatch};
use crate::workspace::{StepShape, Workspace};

/// Host copies of a step's arrays, kept between steps.
#[derive(Debug, Default)]
pub(super) struct Arrays {
    ids: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<i32>,
    q_offsets: Vec<u32>,
    context_lens: Vec<u32>,
    block_tables: Vec<u32>,
    logit_rows: Vec<u32>,
    /// How each row is sampled.
    pub(super) rows: Vec<SampleRow>,
}

/// Where the token that a sequence drew last is.
pub(super) struct Lasts<'a, B: Backend> {
    /// What the host has seen, by sequence slot.
    pub(super) seen: &'a [u32],
    /// The step before, if its draws are still on the device.
    pub(super) before: Option<&'a Flight<B>>,
}

impl<B: Backend> Lasts<'_, B> {
    fn id(&self, token: InputToken) -> u32 {
        match token {
            InputToken::Known(id) => id,
            InputToken::Last(slot) => match self.before.and_then(|flight| flight.row_of(slot)) {
                Some(row) => DRAWN | row as u32,
                None => self.seen[slot as usize],
            },
        }
    }
}

impl Arrays {
    /// Takes in `batch`, filled up to `shape`: rows that store nothing, and sequences without rows.
    pub(super) fn fill<B: Backend>(&mut self, batch: &StepBatch, shape: &StepShape, lasts: &Lasts<'_, B>) {
        refill(&mut self.ids, batch.tokens.iter().map(|&token| lasts.id(token)), shape.rows, 0);
        refill(&mut self.positions, batch.positions.iter().copied(), shape.rows, 0);
        refill(&mut self.slots, batch.slots.iter().copied(), shape.rows, -1);
        let end = batch.rows() as u32;
        refill(&mut self.q_offsets, batch.q_offsets.iter().copied(), shape.n_seqs + 1, end);
        refill(&mut self.context_lens, batch.context_lens.iter().copied(), shape.n_seqs, 0);
        let sampled = batch.samples.iter().map(|sample| sample.row);
        refill(&mut self.logit_rows, sampled, shape.n_logits, 0);
        let how = batch.samples.iter().map(|sample| sample.how.clone());
        refill(&mut self.rows, how, shape.n_logits, padding_row());
        let (from, to) = (batch.max_blocks as usize, shape.max_blocks);
        self.block_tables.clear();
        for table in batch.block_tables.chunks(from.max(1)) {
            self.block_tables.extend_from_slice(table);
            self.block_tables.extend(std::iter::repeat_n(0, to - from));
        }
        self.block_tables.resize(shape.n_seqs * to, 0);
    }

    /// Sends it all.
    pub(super) fn upload<B: Backend>(
        &self,
        backend: &mut B,
        ws: &mut Workspace<B>,
    ) -> Result<(), KernelError> {
        backend.upload(&mut ws.ids, 0, cast_slice(&self.ids))?;
        backend.upload(&mut ws.positions, 0, cast_slice(&self.positions))?;
        backend.upload(&mut ws.slots, 0, cast_slice(&self.slots))?;
        backend.upload(&mut ws.q_offsets, 0, cast_slice(&self.q_offsets))?;
        backend.upload(&mut ws.context_lens, 0, cast_slice(&self.context_lens))?;
        backend.upload(&mut ws.block_tables, 0, cast_slice(&self.block_tables))?;
        backend.upload(&mut ws.logit_rows, 0, cast_slice(&self.logit_rows))
    }
}

/// `to` holds `values`, and `padding` behind them up to `len`.
fn refill<T: Clone>(to: &mut Vec<T>, values: impl Iterator<Item = T>, len: usize, padding: T) {
    to.clear();
    to.extend(values);
    debug_assert!(to.len() <= len, "{} elements in a shape of {len}", to.len());
    to.resize(len, padding);
}

/// The cheapest way to draw, for rows that nobody asks for.
fn padding_row() -> SampleRow {
    SampleRow {
        target: Some(0),
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
        seed: 0,
        sample_idx: 0,
        position: 0,
    }
}
