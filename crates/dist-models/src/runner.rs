//! Runs steps on one rank: uploads the batch, runs the decoder, samples, hands out what was drawn. It never schedules.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytemuck::{cast_slice, cast_slice_mut};
use dist_comm::{CallName, Comm, CommError};
use dist_core::plan::Plan;
use dist_core::raw::RawBuf;
use dist_core::{DType, ModelConfig, Rank};
use dist_kernels::args::{GatherRowsArgs, KvLayer, SampleArgs, SampleRow};
use dist_kernels::{Backend, KernelError};
use serde::{Deserialize, Serialize};

use crate::decoder::{Context, Decoder};
use crate::step::{InputToken, Sampled, StepBatch, StepOutput};
use crate::workspace::{MAX_TOP, StepShape, Workspace};

/// Why a step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The device.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Another rank, or the way to it.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A batch that is larger than what was planned for.
    #[error("step {step} has {found} {what}, the plan allows {limit}")]
    TooLarge {
        /// Number of the step.
        step: u64,
        /// Which array.
        what: &'static str,
        /// Its size.
        found: usize,
        /// What was planned.
        limit: usize,
    },
}

/// A rank's groups, one a mesh axis.
pub struct Comms {
    /// The ranks that share each layer.
    pub tp: Comm,
    /// The stages, in order of their layers.
    pub pp: Comm,
}

/// One rank's device, weights, cache and workspace.
pub struct Runner<B: Backend> {
    // Fields drop top to bottom: what lives on the device before the device.
    workspace: Workspace<B>,
    kv: Vec<KvLayer<B::Buf>>,
    decoder: Decoder<B>,
    comms: Comms,
    backend: B,
    plan: Plan,
    n_vocab: usize,
    /// What was drawn last for each sequence slot.
    last: Vec<u32>,
    in_flight: VecDeque<StepBatch>,
    /// What the last stage drew and has not handed out.
    drawn: VecDeque<Drawn>,
    host: HostArrays,
    usage: Usage,
}

/// What a rank did with its time since somebody last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Computing and sampling.
    pub busy: Duration,
    /// In calls between ranks, which is mostly waiting for them.
    pub waiting: Duration,
}

/// Adds to `waited` what `wait` takes.
pub(crate) fn timed<T>(waited: &mut Duration, wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = wait();
    *waited += start.elapsed();
    result
}

/// Host copies of a step's arrays, kept between steps.
#[derive(Default)]
struct HostArrays {
    ids: Vec<u32>,
    logit_rows: Vec<u32>,
    gather_order: Vec<u32>,
    rows: Vec<SampleRow>,
}

impl<B: Backend> Runner<B> {
    /// Takes the cache and the workspace; the weights are in `decoder` already.
    pub fn new(
        mut backend: B,
        comms: Comms,
        decoder: Decoder<B>,
        config: &ModelConfig,
        plan: &Plan,
        rank: Rank,
    ) -> Result<Self, KernelError> {
        let layout = plan.kv_layout(rank);
        let cache_len = plan.kv.n_blocks * layout.block_len();
        let mut cache = |what| backend.alloc(what, layout.dtype, cache_len);
        let kv = (0..layout.n_layers_local)
            .map(|_| Ok(KvLayer { k: cache("key cache")?, v: cache("value cache")? }))
            .collect::<Result<_, KernelError>>()?;
        let workspace = Workspace::new(&mut backend, config, plan, rank)?;
        Ok(Self {
            workspace,
            kv,
            decoder,
            comms,
            backend,
            n_vocab: config.n_vocab,
            last: vec![0; plan.limits.max_seqs],
            in_flight: VecDeque::new(),
            drawn: VecDeque::new(),
            host: HostArrays::default(),
            usage: Usage::default(),
            plan: plan.clone(),
        })
    }

    /// The device.
    pub fn backend(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What this rank did since the last time that this was asked.
    pub fn take_usage(&mut self) -> Usage {
        std::mem::take(&mut self.usage)
    }

    /// Adds what `work` takes: what of it was no waiting was work.
    fn timed<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, RunError>) -> Result<T, RunError> {
        let (start, waited) = (Instant::now(), self.usage.waiting);
        let result = work(self);
        let waited = self.usage.waiting.saturating_sub(waited);
        self.usage.busy += start.elapsed().saturating_sub(waited);
        result
    }

    /// Starts a step. Its output comes from [`collect`](Self::collect), in order of the submissions.
    pub fn submit(&mut self, batch: &StepBatch) -> Result<(), RunError> {
        self.check(batch)?;
        self.timed(|runner| {
            runner.upload(batch)?;
            runner.forward(batch)?;
            if !runner.decoder.has_head() {
                return Ok(());
            }
            let n_top = runner.n_top(batch);
            runner.sample(batch, n_top)
        })?;
        self.in_flight.push_back(batch.clone());
        Ok(())
    }

    /// Waits for the oldest step that was submitted; `None` if there is none, or on stages that see no output.
    pub fn collect(&mut self) -> Result<Option<StepOutput>, RunError> {
        let Some(batch) = self.in_flight.pop_front() else { return Ok(None) };
        let is_last = self.decoder.has_head();
        if !is_last && self.comms.pp.rank() != Rank(0) {
            return Ok(None);
        }
        let (n, n_top) = (batch.samples.len(), self.n_top(&batch));
        let drawn = if is_last {
            self.drawn.pop_front().expect("every step of the last stage is sampled")
        } else {
            let (mut drawn, from) = (Drawn::new(n, n_top), Rank(self.comms.pp.world_size() - 1));
            let raw = RawBuf::Host { bytes: cast_slice_mut(&mut drawn.words), dtype: DType::U32 };
            let name = CallName::new("drawn tokens").step(batch.step);
            timed(&mut self.usage.waiting, || self.comms.pp.recv(raw, from, name))?;
            drawn
        };
        for (i, sample) in batch.samples.iter().enumerate() {
            if let Some(seq_slot) = sample.seq_slot {
                self.last[seq_slot as usize] = drawn.id(i);
            }
        }
        let sampled =
            batch.samples.iter().enumerate().map(|(i, sample)| drawn.sampled(i, sample.n_top as usize));
        Ok(Some(StepOutput { step: batch.step, sampled: sampled.collect() }))
    }

    /// How many of the likeliest tokens the step reports a row: as many as its most curious row.
    fn n_top(&self, batch: &StepBatch) -> usize {
        let most = batch.samples.iter().map(|sample| sample.n_top as usize).max().unwrap_or(0);
        most.min(MAX_TOP).min(self.n_vocab)
    }

    /// Runs a step without sampling and returns the logits of its sampled rows, `[samples, n_vocab]`; one rank only.
    pub fn logits(&mut self, batch: &StepBatch) -> Result<Vec<f32>, RunError> {
        assert_eq!(self.plan.mesh.world_size(), 1, "logits are whole on one rank only");
        self.check(batch)?;
        self.upload(batch)?;
        self.forward(batch)?;
        let mut logits = vec![0.0; batch.samples.len() * self.n_vocab];
        self.backend.download(&self.workspace.logits, 0, cast_slice_mut(&mut logits))?;
        Ok(logits)
    }

    fn forward(&mut self, batch: &StepBatch) -> Result<(), RunError> {
        let (step, comms) = (StepShape::of(batch), &mut self.comms);
        let mut ctx = Context {
            backend: &mut self.backend,
            tp: &mut comms.tp,
            pp: &mut comms.pp,
            step,
            waited: &mut self.usage.waiting,
        };
        self.decoder.forward(&mut ctx, &mut self.workspace, &mut self.kv)
    }

    fn check(&self, batch: &StepBatch) -> Result<(), RunError> {
        let limits = self.plan.limits;
        let max_blocks = limits.max_seq_len.div_ceil(self.plan.kv.block_size);
        let sizes = [
            ("rows", batch.rows(), limits.max_batch_tokens),
            ("sequences", batch.n_seqs(), limits.max_seqs),
            ("sampled rows", batch.samples.len(), limits.max_sample_rows),
            ("blocks a sequence", batch.max_blocks as usize, max_blocks),
        ];
        match sizes.into_iter().find(|(_, found, limit)| found > limit) {
            Some((what, found, limit)) => Err(RunError::TooLarge { step: batch.step, what, found, limit }),
            None => Ok(()),
        }
    }

    fn upload(&mut self, batch: &StepBatch) -> Result<(), KernelError> {
        let (ws, host, backend) = (&mut self.workspace, &mut self.host, &mut self.backend);
        host.ids.clear();
        host.ids.extend(batch.tokens.iter().map(|token| match *token {
            InputToken::Known(id) => id,
            InputToken::Last(seq_slot) => self.last[seq_slot as usize],
        }));
        host.logit_rows.clear();
        host.logit_rows.extend(batch.samples.iter().map(|sample| sample.row));
        backend.upload(&mut ws.ids, 0, cast_slice(&host.ids))?;
        backend.upload(&mut ws.positions, 0, cast_slice(&batch.positions))?;
        backend.upload(&mut ws.slots, 0, cast_slice(&batch.slots))?;
        backend.upload(&mut ws.q_offsets, 0, cast_slice(&batch.q_offsets))?;
        backend.upload(&mut ws.context_lens, 0, cast_slice(&batch.context_lens))?;
        backend.upload(&mut ws.block_tables, 0, cast_slice(&batch.block_tables))?;
        backend.upload(&mut ws.logit_rows, 0, cast_slice(&host.logit_rows))
    }

    /// Brings every rank's part of the vocabulary together, so that all ranks draw alike.
    fn gather_logits(&mut self, step: u64, n: usize) -> Result<(), RunError> {
        let (tp, vocab_local) = (self.plan.mesh.tp, self.n_vocab.div_ceil(self.plan.mesh.tp));
        let (ws, order) = (&mut self.workspace, &mut self.host.gather_order);
        let src = self.backend.raw(&mut ws.logits, n * vocab_local);
        let dst = self.backend.raw(&mut ws.gathered, tp * n * vocab_local);
        let name = CallName::new("logits").step(step);
        timed(&mut self.usage.waiting, || self.comms.tp.all_gather(src, dst, name))?;
        order.clear();
        order.extend((0..n).flat_map(|row| (0..tp).map(move |rank| (rank * n + row) as u32)));
        self.backend.upload(&mut ws.gather_order, 0, cast_slice(order))?;
        Ok(self.backend.gather_rows(GatherRowsArgs {
            out: &mut ws.whole,
            x: &ws.gathered,
            indices: &ws.gather_order,
            n_out: tp * n,
            rows: tp * n,
            d: vocab_local,
        })?)
    }

    /// Draws on the last stage, and sends what was drawn to the first one, which needs it next.
    fn sample(&mut self, batch: &StepBatch, n_top: usize) -> Result<(), RunError> {
        let (n, tp) = (batch.samples.len(), self.plan.mesh.tp);
        let mut drawn = Drawn::new(n, n_top);
        if n > 0 {
            if tp > 1 {
                self.gather_logits(batch.step, n)?;
            }
            let (ws, host) = (&mut self.workspace, &mut self.host);
            host.rows.clear();
            host.rows.extend(batch.samples.iter().map(|sample| sample.how.clone()));
            self.backend.sample(SampleArgs {
                logits: if tp > 1 { &mut ws.whole } else { &mut ws.logits },
                n_vocab: self.n_vocab,
                ld: self.n_vocab.div_ceil(tp) * tp,
                rows: &host.rows,
                ids: &mut ws.drawn,
                logprobs: &mut ws.logprobs,
                n_top,
                top_ids: &mut ws.top_ids,
                top_logprobs: &mut ws.top_logprobs,
            })?;
            let (ids, logprobs, top_ids, top_logprobs) = drawn.split();
            self.backend.download(&ws.drawn, 0, cast_slice_mut(ids))?;
            self.backend.download(&ws.logprobs, 0, cast_slice_mut(logprobs))?;
            self.backend.download(&ws.top_ids, 0, cast_slice_mut(top_ids))?;
            self.backend.download(&ws.top_logprobs, 0, cast_slice_mut(top_logprobs))?;
        }
        if self.comms.pp.world_size() > 1 {
            let raw = RawBuf::Host { bytes: cast_slice_mut(&mut drawn.words), dtype: DType::U32 };
            let name = CallName::new("drawn tokens").step(batch.step);
            timed(&mut self.usage.waiting, || self.comms.pp.send(raw, Rank(0), name))?;
        }
        self.drawn.push_back(drawn);
        Ok(())
    }
}

/// What a step drew, as words that go over a wire: ids, log-probabilities, likeliest ids, their log-probabilities.
struct Drawn {
    n: usize,
    n_top: usize,
    words: Vec<u32>,
}

impl Drawn {
    fn new(n: usize, n_top: usize) -> Self {
        Self { n, n_top, words: vec![0; n * (2 + 2 * n_top)] }
    }

    fn split(&mut self) -> (&mut [u32], &mut [u32], &mut [u32], &mut [u32]) {
        let (ids, rest) = self.words.split_at_mut(self.n);
        let (logprobs, rest) = rest.split_at_mut(self.n);
        let (top_ids, top_logprobs) = rest.split_at_mut(self.n * self.n_top);
        (ids, logprobs, top_ids, top_logprobs)
    }

    fn id(&self, i: usize) -> u32 {
        self.words[i]
    }

    fn sampled(&self, i: usize, n_top: usize) -> Sampled {
        let (logprobs, tops) = (self.n, 2 * self.n + i * self.n_top);
        let top = tops..tops + n_top.min(self.n_top);
        let top = top.map(|at| (self.words[at], f32::from_bits(self.words[at + self.n * self.n_top])));
        Sampled { id: self.id(i), logprob: f32::from_bits(self.words[logprobs + i]), top: top.collect() }
    }
}
