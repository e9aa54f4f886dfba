//! A device that computes nothing but remembers everything: what it draws is a hash of the tokens that it finds in its
//! cache, so that a wrong slot, a stale block or a token computed in the wrong place changes the output. Every batch
//! is checked for its form before it is run.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use dist_models::scheduler::Limits;
use dist_models::step::{InputToken, SampleAt, Sampled, StepBatch, StepOutput};

/// A cache of tokens in place of keys and values.
#[derive(Debug)]
pub(crate) struct FakeDevice {
    limits: Limits,
    n_vocab: u32,
    /// Token and position of each slot.
    cache: Vec<Option<(u32, u32)>>,
    /// What was drawn last for each sequence slot.
    last: Vec<Option<u32>>,
    next_step: u64,
}

impl FakeDevice {
    pub(crate) fn new(limits: Limits, n_vocab: usize) -> Self {
        let cache = vec![None; limits.n_blocks * limits.block_size];
        let last = vec![None; limits.max_seqs];
        Self { limits, n_vocab: n_vocab as u32, cache, last, next_step: 0 }
    }

    /// Runs a step: stores all rows, then samples.
    pub(crate) fn run(&mut self, batch: &StepBatch) -> StepOutput {
        self.check(batch);
        for row in 0..batch.rows() {
            let id = match batch.tokens[row] {
                InputToken::Known(id) => id,
                InputToken::Last(slot) => {
                    self.last[slot as usize].expect("something was drawn for this slot")
                }
            };
            self.cache[batch.slots[row] as usize] = Some((id, batch.positions[row]));
        }
        let sampled: Vec<Sampled> = batch.samples.iter().map(|sample| self.sample(batch, sample)).collect();
        for (sample, drawn) in batch.samples.iter().zip(&sampled) {
            if let Some(slot) = sample.seq_slot {
                self.last[slot as usize] = Some(drawn.id);
            }
        }
        StepOutput { step: batch.step, sampled }
    }

    /// The tokens of sequence `seq` of the batch up to its last row, as they stand in the cache.
    pub(crate) fn tokens(&self, batch: &StepBatch, seq: usize) -> Vec<u32> {
        let table = table(batch, seq);
        let at = |position: u32| {
            let (block, offset) =
                (position as usize / self.limits.block_size, position as usize % self.limits.block_size);
            let found = self.cache[table[block] as usize * self.limits.block_size + offset];
            let (id, found_position) = found.expect("a token that is seen was stored");
            assert_eq!(found_position, position, "a token stands at its own position");
            id
        };
        (0..batch.context_lens[seq]).map(at).collect()
    }

    fn sample(&self, batch: &StepBatch, sample: &SampleAt) -> Sampled {
        let seq = seq_of(batch, sample);
        let position = batch.positions[sample.row as usize];
        assert_eq!(sample.how.position, position + 1, "what is drawn follows its row");
        let mut tokens = self.tokens(batch, seq);
        tokens.truncate(position as usize + 1);
        let mut hasher = DefaultHasher::new();
        (&tokens, format!("{:?}", sample.how)).hash(&mut hasher);
        let hash = hasher.finish();
        let allowed = |id: &u32| !sample.how.banned.contains(id);
        let choices: Vec<u32> = (0..self.n_vocab).filter(allowed).collect();
        let drawn = choices[(hash % choices.len() as u64) as usize];
        let top = (0..sample.n_top).map(|i| (i, 0.0)).collect();
        Sampled { id: sample.how.target.unwrap_or(drawn), logprob: (hash >> 48) as f32, top }
    }

    fn check(&mut self, batch: &StepBatch) {
        assert_eq!(batch.step, self.next_step, "steps are numbered without gaps");
        self.next_step += 1;
        let (rows, n_seqs) = (batch.rows(), batch.n_seqs());
        assert!((1..=self.limits.max_batch_tokens).contains(&rows), "rows within the budget: {rows}");
        assert!(n_seqs <= self.limits.max_seqs);
        assert_eq!((batch.positions.len(), batch.slots.len()), (rows, rows));
        assert_eq!((batch.q_offsets.len(), batch.seq_slots.len()), (n_seqs + 1, n_seqs));
        assert_eq!((batch.q_offsets[0], batch.q_offsets[n_seqs]), (0, rows as u32));
        assert_eq!(batch.block_tables.len(), n_seqs * batch.max_blocks as usize);
        assert!(batch.max_blocks as usize <= self.limits.max_seq_len.div_ceil(self.limits.block_size));
        assert!(batch.seq_slots.iter().all(|&slot| (slot as usize) < self.limits.max_seqs));
        assert_eq!(
            batch.seq_slots.iter().collect::<BTreeSet<_>>().len(),
            n_seqs,
            "a slot belongs to one sequence"
        );
        for seq in 0..n_seqs {
            self.check_seq(batch, seq);
        }
        self.check_samples(batch);
        check_writes(batch);
        check_sharing(batch, self.limits.block_size);
    }

    fn check_seq(&self, batch: &StepBatch, seq: usize) {
        let (begin, end) = (batch.q_offsets[seq] as usize, batch.q_offsets[seq + 1] as usize);
        assert!(begin < end, "a sequence of the step has rows");
        let (context_len, table) = (batch.context_lens[seq], table(batch, seq));
        assert!(context_len as usize <= self.limits.max_seq_len);
        let n_blocks = (context_len as usize).div_ceil(self.limits.block_size);
        assert!(table[..n_blocks].iter().all(|&block| (block as usize) < self.limits.n_blocks));
        assert!(table[n_blocks..].iter().all(|&block| block == 0), "entries beyond the blocks are zero");
        for row in begin..end {
            let position = batch.positions[row] as usize;
            assert_eq!(
                position + end - row,
                context_len as usize,
                "positions are contiguous up to the context"
            );
            let block = table[position / self.limits.block_size] as usize;
            let slot = block * self.limits.block_size + position % self.limits.block_size;
            assert_eq!(batch.slots[row], slot as i32, "slots follow the block table");
            if let InputToken::Last(slot) = batch.tokens[row] {
                assert_eq!(
                    (slot, end - begin),
                    (batch.seq_slots[seq], 1),
                    "a sequence reads its own last token"
                );
            }
        }
    }

    fn check_samples(&self, batch: &StepBatch) {
        assert!(batch.samples.len() <= self.limits.max_sample_rows, "sampled rows within the budget");
        assert!(batch.samples.is_sorted_by(|a, b| a.row < b.row), "in order of rows");
        for sample in &batch.samples {
            let seq = seq_of(batch, sample);
            let expected_slot = sample.how.target.is_none().then_some(batch.seq_slots[seq]);
            assert_eq!(sample.seq_slot, expected_slot, "what is drawn is kept, a score is not");
            let is_last = sample.row + 1 == batch.q_offsets[seq + 1];
            assert!(is_last || sample.how.target.is_some(), "only the last row of a sequence draws");
        }
    }
}

/// The sequence that a sampled row is of.
fn seq_of(batch: &StepBatch, sample: &SampleAt) -> usize {
    let is_of = |&seq: &usize| sample.row < batch.q_offsets[seq + 1];
    (0..batch.n_seqs()).find(is_of).expect("a sampled row is a row of the step")
}

fn table(batch: &StepBatch, seq: usize) -> &[u32] {
    &batch.block_tables[seq * batch.max_blocks as usize..][..batch.max_blocks as usize]
}

/// No row is written where another one of the step is. Rows of a shared block are checked by what is drawn: a foreign
/// token in it changes the hash.
fn check_writes(batch: &StepBatch) {
    let slots: BTreeSet<i32> = batch.slots.iter().copied().collect();
    assert_eq!(slots.len(), batch.rows(), "a slot is written once a step");
}

/// A block stands in two tables of the step only if it is whole in both and at the same place.
fn check_sharing(batch: &StepBatch, block_size: usize) {
    let mut places: BTreeMap<u32, usize> = BTreeMap::new();
    for seq in 0..batch.n_seqs() {
        let context_len = batch.context_lens[seq] as usize;
        for (place, &block) in table(batch, seq)[..context_len.div_ceil(block_size)].iter().enumerate() {
            if let Some(other) = places.insert(block, place) {
                assert_eq!(other, place, "block {block} is shared at one place");
                assert!((place + 1) * block_size <= context_len, "block {block} is shared whole");
            }
        }
    }
}
