//! Decides what every step computes. Pure: no clock, no device, no hash map; the same calls give the same batches.
//!
//! Continuous batching, first come first served. A step takes the next row of every running sequence that continues
//! its output, then chunks of prompts as far as the budgets reach, then admits who waits. A sequence is admitted when
//! all tokens that it has by then fit the free blocks. When a running sequence needs a block and none is free, the
//! sequence that arrived last gives up its blocks and waits at the front; its tokens are kept and computed again.
//! The sequence that arrived first can always go on, since [`Scheduler::add`] refuses what could never fit alone.
//!
//! [`Scheduler::schedule`] may be called again before the [`Scheduler::commit`] of the batches before, which then come
//! in order. A decode row whose token is still in flight reads [`InputToken::Last`]; that a sample has ended is then
//! found late, and what its surplus rows gave is thrown away. Memory that is given back early is safe: a device runs
//! batches in order, so that whoever gets a block or a slot next writes it after its last reader. A request with
//! penalties is not run ahead, since they count tokens that the host has to see.
//!
//! [`InputToken::Last`]: crate::step::InputToken::Last

mod batch;
mod events;
mod refusal;
mod sequence;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use crate::kv_blocks::{BlockPool, BlockTable};
use crate::request::{FinishReason, Request, RequestId, TokenLogprob};
use crate::step::{Sampled, StepBatch, StepOutput};
use batch::{BatchWriter, InFlight, Owner};
use sequence::{Seat, SeqKey, Sequence};

pub use events::{Commit, Stats};
pub use refusal::{MAX_LOGPROBS, RequestError};

/// What the plan allows a step and a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once.
    pub max_seqs: usize,
    /// Rows of a step.
    pub max_batch_tokens: usize,
    /// Prompt and new tokens of a sequence.
    pub max_seq_len: usize,
    /// Rows of a step whose logits are wanted.
    pub max_sample_rows: usize,
    /// Blocks of the KV cache.
    pub n_blocks: usize,
    /// Tokens of a block.
    pub block_size: usize,
}

#[derive(Debug)]
struct Running {
    seq: Sequence,
    seat: Seat,
}

/// The state machine between requests and steps.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    eos_ids: Vec<u32>,
    n_vocab: usize,
    pool: BlockPool,
    /// In order of arrival, all before those in `waiting`: the front is admitted, the back is preempted.
    running: Vec<Running>,
    waiting: VecDeque<Sequence>,
    in_flight: VecDeque<InFlight>,
    /// Ends that no step brings about, until somebody asks.
    ended: Vec<Commit>,
    free_seq_slots: BTreeSet<u32>,
    n_arrived: u64,
    n_steps: u64,
    n_preemptions: u64,
    n_stages: usize,
}

impl Scheduler {
    /// A scheduler with nothing to do. `eos_ids` are the model's own stop tokens.
    pub fn new(limits: Limits, eos_ids: Vec<u32>, n_vocab: usize) -> Self {
        // A sequence that decodes needs a row and a sampled row: whoever could get none should not hold blocks.
        let n_seats = limits.max_seqs.min(limits.max_batch_tokens).min(limits.max_sample_rows);
        assert!(n_seats > 0, "a step needs a row: {limits:?}");
        Self {
            pool: BlockPool::new(limits.n_blocks, limits.block_size),
            free_seq_slots: (0..n_seats as u32).collect(),
            running: Vec::new(),
            waiting: VecDeque::new(),
            in_flight: VecDeque::new(),
            ended: Vec::new(),
            n_arrived: 0,
            n_steps: 0,
            n_preemptions: 0,
            n_stages: 1,
            limits,
            eos_ids,
            n_vocab,
        }
    }

    /// For a pipeline of `n_stages`, each of which has a batch: sequences are dealt to that many batches, and none is
    /// in two of them, since the first stage learns what was drawn only from the last one.
    #[must_use]
    pub fn for_stages(self, n_stages: usize) -> Self {
        Self { n_stages, ..self }
    }

    /// Takes a request in, or says why it cannot be served. A refused request leaves no trace.
    pub fn add(&mut self, request: Request) -> Result<(), RequestError> {
        if self.is_here(request.id) {
            return Err(RequestError::DuplicateId { id: request.id });
        }
        refusal::check(&request, &self.limits, &self.pool, self.n_vocab)?;
        let stop_ids: Arc<[u32]> = self.stop_ids(&request).into();
        let (request, arrival) = (Arc::new(request), self.n_arrived);
        self.n_arrived += 1;
        for sample_idx in 0..request.sampling.n {
            let key = SeqKey { arrival, sample_idx };
            let mut seq = Sequence::new(key, Arc::clone(&request), Arc::clone(&stop_ids), &self.limits);
            seq.sees_all |= self.n_stages > 1;
            // Where only the prompt is scored, the first sample does it all, and one token has nothing to score.
            match seq.finish_reason() {
                Some(reason) => self.ended.push(Commit::Finished { id: request.id, sample_idx, reason }),
                None => self.waiting.push_back(seq),
            }
        }
        Ok(())
    }

    /// Takes a request back; whether it was there. The ends of its samples come with the next commits.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let of_request = self.sequences().filter(|seq| seq.request.id == id);
        let keys: Vec<SeqKey> = of_request.map(|seq| seq.key).collect();
        for &key in &keys {
            self.remove(key);
            let (sample_idx, reason) = (key.sample_idx, FinishReason::Cancelled);
            self.ended.push(Commit::Finished { id, sample_idx, reason });
        }
        !keys.is_empty()
    }

    /// Ends a sample whose text says so; whether it had not ended yet. No commit follows: the caller knows.
    pub fn finish(&mut self, id: RequestId, sample_idx: u32, reason: FinishReason) -> bool {
        let is_it = |seq: &&Sequence| seq.request.id == id && seq.key.sample_idx == sample_idx;
        let Some(key) = self.sequences().find(is_it).map(|seq| seq.key) else { return false };
        tracing::debug!(request = id.0, sample_idx, ?reason, "sample ended by its text");
        self.remove(key);
        true
    }

    /// The next step; `None` if there is nothing to do before a batch in flight is committed, or at all.
    pub fn schedule(&mut self) -> Option<StepBatch> {
        let Limits { max_batch_tokens, max_sample_rows, .. } = self.limits;
        let mut writer = BatchWriter::new(self.n_steps, max_batch_tokens, max_sample_rows);
        let n_preemptions = self.n_preemptions;
        self.decode(&mut writer);
        self.prefill(&mut writer);
        // Who has just given up blocks would take them again at once.
        if n_preemptions == self.n_preemptions {
            self.admit(&mut writer);
        }
        let (batch, in_flight) = writer.finish()?;
        self.n_steps += 1;
        self.in_flight.push_back(in_flight);
        Some(batch)
    }

    /// Takes in what a batch gave, in the order of the batches, and tells what it means.
    pub fn commit(&mut self, batch: &StepBatch, output: &StepOutput) -> Vec<Commit> {
        let InFlight { step, owners } = self.in_flight.pop_front().expect("a batch was scheduled");
        assert_eq!((step, step), (batch.step, output.step), "steps are committed in order");
        assert_eq!(owners.len(), output.sampled.len(), "every sampled row gives one token");
        let mut commits = self.take_ended();
        for (owner, sampled) in owners.into_iter().zip(&output.sampled) {
            self.commit_sample(owner, sampled, &mut commits);
        }
        commits
    }

    /// Ends that came about without a step: cancelled samples, and those that had nothing to compute.
    /// [`commit`](Self::commit) hands them out too; ask here when [`schedule`](Self::schedule) gives nothing.
    pub fn take_ended(&mut self) -> Vec<Commit> {
        std::mem::take(&mut self.ended)
    }

    /// Whether every request has ended, every batch is committed and every end handed out.
    pub fn is_idle(&self) -> bool {
        self.sequences().next().is_none() && self.in_flight.is_empty() && self.ended.is_empty()
    }

    /// How busy it is.
    pub fn stats(&self) -> Stats {
        Stats {
            n_running: self.running.len(),
            n_waiting: self.waiting.len(),
            n_free_blocks: self.pool.n_free(),
            n_preemptions: self.n_preemptions,
        }
    }

    /// One row for every sequence that continues its output, in order of arrival; a stage's share of them at most.
    fn decode(&mut self, writer: &mut BatchWriter) {
        let mut n_left = self.running.len().div_ceil(self.n_stages);
        let mut i = 0;
        // Preemption takes sequences off the end.
        while i < self.running.len() && n_left > 0 {
            let is_decoding = self.running[i].seq.is_decoding(&self.running[i].seat);
            if is_decoding && self.make_room(i) {
                let Running { seq, seat } = &mut self.running[i];
                writer.push(&self.pool, seq, seat, 1);
                n_left -= 1;
            }
            i += 1;
        }
    }

    /// Room for one more token of the running sequence `i`, at the cost of those that arrived after it. The last of
    /// all gains nothing by preempting itself: it keeps its blocks and pauses until it can go on or another needs them.
    fn make_room(&mut self, i: usize) -> bool {
        loop {
            let seat = &mut self.running[i].seat;
            if seat.table.grow(&mut self.pool, seat.n_cached + 1) {
                return true;
            }
            if i + 1 == self.running.len() {
                return false;
            }
            self.preempt_last();
        }
    }

    fn preempt_last(&mut self) {
        let Running { seq, seat } =
            self.running.pop().expect("somebody arrived after the one that needs room");
        tracing::debug!(request = seq.request.id.0, sample_idx = seq.key.sample_idx, "sequence preempted");
        self.release(seat);
        self.waiting.push_front(seq);
        self.n_preemptions += 1;
    }

    /// The next chunk of every running sequence that is not decoding; its blocks were taken at admission.
    fn prefill(&mut self, writer: &mut BatchWriter) {
        for Running { seq, seat } in &mut self.running {
            // A row that has just been written may have a next one, but not in the same step.
            if seq.is_decoding(seat) {
                continue;
            }
            let n_rows = seq.n_rows_within(seat.n_cached, writer.rows_left, writer.samples_left);
            if n_rows > 0 {
                writer.push(&self.pool, seq, seat, n_rows);
            }
        }
    }

    /// Admits from the front of the queue as long as budgets, seats and blocks reach. Nobody overtakes.
    fn admit(&mut self, writer: &mut BatchWriter) {
        while let Some((n_shared, n_rows)) = self.next_admission(writer) {
            let mut seq = self.waiting.pop_front().expect("the front is admitted");
            let source = self.prompt_source(seq.key).map(|i| &self.running[i].seat.table);
            let mut table =
                source.map_or_else(BlockTable::default, |table| table.fork(&mut self.pool, n_shared));
            let n_cached = n_shared * self.pool.block_size();
            let has_room = table.grow(&mut self.pool, n_cached + seq.n_rows_wanted(n_cached));
            assert!(has_room, "free blocks were counted before");
            let seq_slot = self.free_seq_slots.pop_first().expect("free seats were counted before");
            let mut seat = Seat { seq_slot, table, n_cached };
            writer.push(&self.pool, &mut seq, &mut seat, n_rows);
            self.running.push(Running { seq, seat });
        }
    }

    /// Blocks that the front of the queue shares and rows that it computes in this step, if it can be admitted.
    fn next_admission(&self, writer: &BatchWriter) -> Option<(usize, usize)> {
        let seq = self.waiting.front()?;
        // A preempted sequence is computed again when all of its tokens are known.
        if self.free_seq_slots.is_empty() || seq.n_drawing > 0 {
            return None;
        }
        let n_shared = match self.prompt_source(seq.key) {
            // The first sample is on its way through the prompt: what it computes is not computed twice.
            Some(i) if self.running[i].seat.n_cached < seq.prompt_len() => return None,
            // The row of the last prompt token draws, so that its block is always the sample's own.
            Some(_) => (seq.prompt_len() - 1) / self.pool.block_size(),
            None => 0,
        };
        let n_cached = n_shared * self.pool.block_size();
        let n_blocks = self.pool.blocks_for(n_cached + seq.n_rows_wanted(n_cached)) - n_shared;
        let n_rows = seq.n_rows_within(n_cached, writer.rows_left, writer.samples_left);
        (n_rows > 0 && n_blocks <= self.pool.n_free()).then_some((n_shared, n_rows))
    }

    /// The first running sample of the same prompt. That the prompt is in its cache may be this very step's work: a
    /// layer stores the keys and values of all rows before any row attends.
    fn prompt_source(&self, key: SeqKey) -> Option<usize> {
        self.running.iter().position(|other| other.seq.key.arrival == key.arrival)
    }

    fn commit_sample(&mut self, owner: Owner, sampled: &Sampled, commits: &mut Vec<Commit>) {
        // Whoever has ended since has surplus rows in flight.
        let Some(seq) = self.sequence_mut(owner.key) else { return };
        let (id, sample_idx) = (seq.request.id, owner.key.sample_idx);
        let token = TokenLogprob { id: sampled.id, logprob: sampled.logprob, top: sampled.top.clone() };
        if owner.draws {
            seq.push(sampled.id);
            commits.push(Commit::Token { id, sample_idx, token, is_stop: seq.ends_with_stop() });
        } else {
            seq.n_scored += 1;
            match commits.last_mut() {
                Some(Commit::Prompt { id: last, logprobs }) if *last == id => logprobs.push(token),
                _ => commits.push(Commit::Prompt { id, logprobs: vec![token] }),
            }
        }
        if let Some(reason) = seq.finish_reason() {
            self.remove(owner.key);
            commits.push(Commit::Finished { id, sample_idx, reason });
        }
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().map(|running| &running.seq).chain(&self.waiting)
    }

    fn find_running(&self, key: SeqKey) -> Option<usize> {
        self.running.binary_search_by_key(&key, |running| running.seq.key).ok()
    }

    fn sequence_mut(&mut self, key: SeqKey) -> Option<&mut Sequence> {
        if let Some(i) = self.find_running(key) {
            return Some(&mut self.running[i].seq);
        }
        let i = self.waiting.binary_search_by_key(&key, |seq| seq.key).ok()?;
        self.waiting.get_mut(i)
    }

    fn remove(&mut self, key: SeqKey) {
        match self.find_running(key) {
            Some(i) => {
                let Running { seat, .. } = self.running.remove(i);
                self.release(seat);
            }
            None => self.waiting.retain(|seq| seq.key != key),
        }
    }

    fn release(&mut self, mut seat: Seat) {
        seat.table.clear(&mut self.pool);
        self.free_seq_slots.insert(seat.seq_slot);
    }

    fn is_here(&self, id: RequestId) -> bool {
        let is_end = |commit: &Commit| matches!(commit, Commit::Finished { id: ended, .. } if *ended == id);
        self.sequences().any(|seq| seq.request.id == id) || self.ended.iter().any(is_end)
    }

    fn stop_ids(&self, request: &Request) -> Vec<u32> {
        let sampling = &request.sampling;
        let own = if sampling.ignore_eos { &[][..] } else { &self.eos_ids };
        // A vocabulary may be cut below the model's end of text, as in tests; it is never drawn then.
        let own = own.iter().filter(|&&id| (id as usize) < self.n_vocab);
        let ids: BTreeSet<u32> = own.chain(&sampling.stop_ids).copied().collect();
        ids.into_iter().collect()
    }
}
