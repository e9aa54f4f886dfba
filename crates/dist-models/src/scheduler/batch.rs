//! Writes a step: the rows that were decided become flat arrays.

use crate::kv_blocks::{BlockPool, BlockTable};
use crate::scheduler::sequence::{Seat, SeqKey, Sequence};
use crate::step::{SampleAt, StepBatch};

/// Whose a sampled row of a batch in flight is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    pub(crate) key: SeqKey,
    pub(crate) draws: bool,
}

/// A batch whose output has not come back.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) step: u64,
    /// One for each of the batch's samples.
    pub(crate) owners: Vec<Owner>,
}

/// A step being written, with what is left of its budgets.
#[derive(Debug)]
pub(crate) struct BatchWriter {
    pub(crate) rows_left: usize,
    pub(crate) samples_left: usize,
    batch: StepBatch,
    owners: Vec<Owner>,
    /// Tables of the step's sequences, whose common width is known at the end only.
    tables: Vec<Vec<u32>>,
}

impl BatchWriter {
    pub(crate) fn new(step: u64, max_rows: usize, max_samples: usize) -> Self {
        let batch = StepBatch { step, ..StepBatch::empty() };
        let (owners, tables) = (Vec::new(), Vec::new());
        Self { rows_left: max_rows, samples_left: max_samples, batch, owners, tables }
    }

    /// The next `n_rows` rows of a sequence, whose table has room for them.
    pub(crate) fn push(&mut self, pool: &BlockPool, seq: &mut Sequence, seat: &mut Seat, n_rows: usize) {
        for position in seat.n_cached..seat.n_cached + n_rows {
            self.push_sample(seq, seat.seq_slot, position);
            self.batch.tokens.push(seq.input(position, seat.seq_slot));
            self.batch.positions.push(position as u32);
            self.batch.slots.push(seat.table.slot(pool, position));
        }
        seat.n_cached += n_rows;
        self.rows_left -= n_rows;
        self.batch.q_offsets.push(self.batch.tokens.len() as u32);
        self.batch.context_lens.push(seat.n_cached as u32);
        self.batch.seq_slots.push(seat.seq_slot);
        self.tables.push(used_blocks(pool, &seat.table, seat.n_cached));
    }

    fn push_sample(&mut self, seq: &mut Sequence, seq_slot: u32, position: usize) {
        let Some(how) = seq.sample_row(position) else { return };
        let draws = how.target.is_none();
        self.batch.samples.push(SampleAt {
            row: self.batch.tokens.len() as u32,
            seq_slot: draws.then_some(seq_slot),
            how,
            n_top: seq.request.sampling.logprobs.unwrap_or(0),
        });
        self.owners.push(Owner { key: seq.key, draws });
        self.samples_left -= 1;
        if draws {
            seq.n_drawing += 1;
        } else {
            seq.n_scoring += 1;
        }
    }

    /// The step, or nothing if it has no rows.
    pub(crate) fn finish(mut self) -> Option<(StepBatch, InFlight)> {
        if self.batch.tokens.is_empty() {
            return None;
        }
        let max_blocks = self.tables.iter().map(Vec::len).max().unwrap_or(0);
        for mut table in self.tables {
            table.resize(max_blocks, 0);
            self.batch.block_tables.append(&mut table);
        }
        self.batch.max_blocks = max_blocks as u32;
        let in_flight = InFlight { step: self.batch.step, owners: self.owners };
        Some((self.batch, in_flight))
    }
}

/// Blocks that hold the first `n_tokens` tokens: what was reserved beyond is nobody else's business.
fn used_blocks(pool: &BlockPool, table: &BlockTable, n_tokens: usize) -> Vec<u32> {
    table.blocks()[..pool.blocks_for(n_tokens)].iter().map(|block| block.0).collect()
}
