//! Runs steps on one rank: uploads the batch, runs the decoder, samples, hands out what was drawn. It never schedules.

mod arrays;
mod drawn;
mod error;
mod graphs;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytemuck::cast_slice_mut;
use dist_comm::{CallName, Comm};
use dist_core::plan::Plan;
use dist_core::raw::RawBuf;
use dist_core::{DType, ModelConfig, Rank};
use dist_kernels::args::{GatherRowsArgs, KvLayer, SampleArgs};
use dist_kernels::{Backend, KernelError};
use serde::{Deserialize, Serialize};

use crate::decoder::{Context, Decoder};
use crate::step::{StepBatch, StepOutput};
use crate::workspace::{MAX_TOP, StepShape, Workspace};
use arrays::{Arrays, Lasts};
use drawn::{Drawn, Draws, Flight, arrive};
use graphs::{Graphs, sizes};

pub(crate) use error::with_causes;
pub use error::{RunError, Suspect, Suspects};

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
    graphs: Graphs<B>,
    workspace: Workspace<B>,
    kv: Vec<KvLayer<B::Buf>>,
    decoder: Decoder<B>,
    comms: Comms,
    backend: B,
    plan: Plan,
    rank: Rank,
    n_vocab: usize,
    /// What was drawn last for each sequence slot.
    last: Vec<u32>,
    in_flight: VecDeque<Flight<B>>,
    arrays: Arrays,
    gather_order: Vec<u32>,
    usage: Usage,
    /// What went wrong first: what a step then did not store or draw, no later one can go on from.
    broken: Option<String>,
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

impl<B: Backend> Runner<B> {
    /// Takes the cache and the workspace; the weights are in `decoder` already.
    pub fn new(
        mut backend: B,
        comms: Comms,
        decoder: Decoder<B>,
        config: &ModelConfig,
        plan: &Plan,
        rank: Rank,
    ) -> Result<Self, RunError> {
        let layout = plan.kv_layout(rank);
        let cache_len = plan.kv.n_blocks * layout.block_len();
        let mut cache = |what| backend.alloc(what, layout.dtype, cache_len);
        let kv = (0..layout.n_layers_local)
            .map(|_| Ok(KvLayer { k: cache("key cache")?, v: cache("value cache")? }))
            .collect::<Result<_, KernelError>>()?;
        let workspace = Workspace::new(&mut backend, config, plan, rank)?;
        let mut runner = Self {
            graphs: Graphs::new(plan.limits.max_seq_len.div_ceil(plan.kv.block_size)),
            workspace,
            kv,
            decoder,
            comms,
            backend,
            rank,
            n_vocab: config.n_vocab,
            last: vec![0; plan.limits.max_seqs],
            in_flight: VecDeque::new(),
            arrays: Arrays::default(),
            gather_order: Vec::new(),
            usage: Usage::default(),
            broken: None,
            plan: plan.clone(),
        };
        runner.record()?;
        Ok(runner)
    }

    /// Decode steps become graphs where the device has such, largest first: what all of them use is taken then.
    fn record(&mut self) -> Result<(), RunError> {
        let limits = self.plan.limits;
        if B::STEPS_AHEAD == 0 || self.plan.mesh.world_size() > 1 {
            return Ok(());
        }
        let n_max = limits.max_seqs.min(limits.max_batch_tokens).min(limits.max_sample_rows);
        for rows in sizes(n_max).into_iter().rev() {
            let shape = self.graphs.shape_of(rows);
            let rank = self.rank;
            let graph = self.record_one(shape).map_err(|error| match error {
                RunError::Kernel(source) => RunError::Record { rows, rank, source },
                other => other,
            })?;
            let Some(graph) = graph else { break };
            self.graphs.keep(rows, graph);
        }
        tracing::debug!(n = self.graphs().count(), "decode steps recorded");
        Ok(())
    }

    fn record_one(&mut self, shape: StepShape) -> Result<Option<B::Graph>, RunError> {
        let nobody = StepBatch::empty();
        self.arrays.fill(&nobody, &shape, &Lasts::<B> { seen: &[], before: None });
        self.arrays.upload(&mut self.backend, &mut self.workspace)?;
        self.capture(shape)
    }

    fn capture(&mut self, shape: StepShape) -> Result<Option<B::Graph>, RunError> {
        let Self { backend, comms, decoder, workspace, kv, arrays, usage, n_vocab, .. } = self;
        let mut other = None;
        let graph = backend.capture(&mut |backend| {
            let (tp, pp, waited) = (&mut comms.tp, &mut comms.pp, &mut usage.waiting);
            let mut ctx = Context { backend, tp, pp, step: shape, waited };
            match decoder.forward(&mut ctx, workspace, kv) {
                Ok(()) => draw(ctx.backend, workspace, arrays, (1, *n_vocab, 0)),
                Err(RunError::Kernel(error)) => Err(error),
                Err(error) => {
                    other = Some(error);
                    Ok(())
                }
            }
        })?;
        other.map_or(Ok(graph), Err)
    }

    /// The decode steps that are recorded: their rows, and the recording.
    pub fn graphs(&self) -> impl Iterator<Item = (usize, &B::Graph)> {
        self.graphs.iter()
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

    /// Runs `work`, unless something went wrong before; what goes wrong in it is kept.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, RunError>) -> Result<T, RunError> {
        if let Some(first) = &self.broken {
            return Err(RunError::Broken { first: first.clone() });
        }
        let result = work(self);
        self.broken = result.as_ref().err().map(|error| with_causes(error));
        result
    }

    /// Starts a step. Its output comes from [`collect`](Self::collect), in order of the submissions. After an error there
    /// are only errors.
    pub fn submit(&mut self, batch: &StepBatch) -> Result<(), RunError> {
        self.check(batch)?;
        self.guarded(|runner| {
            let flight = runner.timed(|runner| runner.start(batch)).map_err(|error| {
                let own = Suspect { step: batch.step, graph_rows: runner.graph_rows(batch) };
                error.of(own, runner.in_flight.iter().map(Flight::suspect), runner.rank)
            })?;
            runner.in_flight.push_back(flight);
            Ok(())
        })
    }

    fn start(&mut self, batch: &StepBatch) -> Result<Flight<B>, RunError> {
        let n_top = self.n_top(batch);
        let shape = self.upload(batch)?;
        let graph_rows = match self.graphs.fits(batch) {
            Some((_, graph)) if n_top == 0 => {
                self.backend.replay(graph, &self.arrays.rows)?;
                Some(shape.rows)
            }
            _ => {
                self.forward(shape)?;
                if self.decoder.has_head() {
                    self.sample(shape, n_top)?;
                }
                None
            }
        };
        let draws = if self.decoder.has_head() { self.fetch(batch, n_top)? } else { Draws::Elsewhere };
        Ok(Flight::of(batch, graph_rows, n_top, draws))
    }

    /// Rows of the graph that a step runs as; `None` where its kernels are launched one by one, as they are for whoever
    /// wants likeliest tokens.
    fn graph_rows(&self, batch: &StepBatch) -> Option<usize> {
        let fitting = if self.n_top(batch) == 0 { self.graphs.fits(batch) } else { None };
        fitting.map(|(shape, _)| shape.rows)
    }

    /// Waits for the oldest step that was submitted; `None` if there is none, or on stages that see no output.
    pub fn collect(&mut self) -> Result<Option<StepOutput>, RunError> {
        self.guarded(Self::collect_oldest)
    }

    fn collect_oldest(&mut self) -> Result<Option<StepOutput>, RunError> {
        let Some(flight) = self.in_flight.pop_front() else { return Ok(None) };
        let suspect = flight.suspect();
        let Flight { step, rows, n_top, draws, .. } = flight;
        let drawn = match draws {
            Draws::Here(drawn) => drawn,
            Draws::Asked(fetch) => {
                let drawn = self.timed(|runner| Ok(arrive(&mut runner.backend, fetch, rows.len(), n_top)?));
                drawn.map_err(|error| {
                    error.of(suspect, self.in_flight.iter().map(Flight::suspect), self.rank)
                })?
            }
            Draws::Elsewhere if self.comms.pp.rank() != Rank(0) => return Ok(None),
            Draws::Elsewhere => {
                let (mut drawn, from) = (Drawn::new(rows.len(), n_top), Rank(self.comms.pp.world_size() - 1));
                let raw = RawBuf::Host { bytes: cast_slice_mut(&mut drawn.words), dtype: DType::U32 };
                let name = CallName::new("drawn tokens").step(step);
                timed(&mut self.usage.waiting, || self.comms.pp.recv(raw, from, name))?;
                drawn
            }
        };
        for (i, (seq_slot, _)) in rows.iter().enumerate() {
            if let Some(seq_slot) = seq_slot {
                self.last[*seq_slot as usize] = drawn.id(i);
            }
        }
        let sampled = rows.iter().enumerate().map(|(i, (_, n_top))| drawn.sampled(i, *n_top));
        Ok(Some(StepOutput { step, sampled: sampled.collect() }))
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
        self.guarded(|runner| {
            let shape = runner.upload(batch)?;
            runner.forward(shape)?;
            let mut logits = vec![0.0; batch.samples.len() * runner.n_vocab];
            runner.backend.download(&runner.workspace.logits, 0, cast_slice_mut(&mut logits))?;
            Ok(logits)
        })
    }

    fn forward(&mut self, step: StepShape) -> Result<(), RunError> {
        let comms = &mut self.comms;
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

    /// Brings the step's arrays to the device, filled up to the size of a recorded step where one fits.
    fn upload(&mut self, batch: &StepBatch) -> Result<StepShape, KernelError> {
        let shape = self.graphs.fits(batch).map_or_else(|| StepShape::of(batch), |(shape, _)| shape);
        // On several stages a sequence is in one step at a time: what it drew last has been seen.
        let before = self.in_flight.back().filter(|_| self.plan.mesh.pp == 1);
        self.arrays.fill(batch, &shape, &Lasts { seen: &self.last, before });
        self.arrays.upload(&mut self.backend, &mut self.workspace)?;
        Ok(shape)
    }

    /// Brings every rank's part of the vocabulary together, so that all ranks draw alike.
    fn gather_logits(&mut self, step: u64, n: usize) -> Result<(), RunError> {
        let (tp, vocab_local) = (self.plan.mesh.tp, self.n_vocab.div_ceil(self.plan.mesh.tp));
        let (ws, order) = (&mut self.workspace, &mut self.gather_order);
        let src = self.backend.raw(&mut ws.logits, n * vocab_local);
        let dst = self.backend.raw(&mut ws.gathered, tp * n * vocab_local);
        let name = CallName::new("logits").step(step);
        timed(&mut self.usage.waiting, || self.comms.tp.all_gather(src, dst, name))?;
        order.clear();
        order.extend((0..n).flat_map(|row| (0..tp).map(move |rank| (rank * n + row) as u32)));
        self.backend.upload(&mut ws.gather_order, 0, bytemuck::cast_slice(order))?;
        Ok(self.backend.gather_rows(GatherRowsArgs {
            out: &mut ws.whole,
            x: &ws.gathered,
            indices: &ws.gather_order,
            n_out: tp * n,
            rows: tp * n,
            d: vocab_local,
        })?)
    }

    /// Draws, on the last stage.
    fn sample(&mut self, shape: StepShape, n_top: usize) -> Result<(), RunError> {
        let tp = self.plan.mesh.tp;
        if shape.n_logits == 0 {
            return Ok(());
        }
        if tp > 1 {
            self.gather_logits(shape.number, shape.n_logits)?;
        }
        let (arrays, n_vocab) = (&self.arrays, self.n_vocab);
        Ok(draw(&mut self.backend, &mut self.workspace, arrays, (tp, n_vocab, n_top))?)
    }

    /// Asks for what a step drew; where there are several stages, sends it to the first one, which needs it next.
    fn fetch(&mut self, batch: &StepBatch, n_top: usize) -> Result<Draws<B>, RunError> {
        let (n, ws) = (batch.samples.len(), &self.workspace);
        let tops = n * n_top;
        let pieces = [(&ws.drawn, n), (&ws.logprobs, n), (&ws.top_ids, tops), (&ws.top_logprobs, tops)];
        let fetch = self.backend.fetch(&pieces)?;
        if self.comms.pp.world_size() == 1 {
            return Ok(Draws::Asked(fetch));
        }
        let mut drawn = arrive(&mut self.backend, fetch, n, n_top)?;
        let raw = RawBuf::Host { bytes: cast_slice_mut(&mut drawn.words), dtype: DType::U32 };
        let name = CallName::new("drawn tokens").step(batch.step);
        timed(&mut self.usage.waiting, || self.comms.pp.send(raw, Rank(0), name))?;
        Ok(Draws::Here(drawn))
    }
}

/// Draws from the logits of the step, or from those of all `tp` ranks.
fn draw<B: Backend>(
    backend: &mut B,
    ws: &mut Workspace<B>,
    arrays: &Arrays,
    (tp, n_vocab, n_top): (usize, usize, usize),
) -> Result<(), KernelError> {
    backend.sample(SampleArgs {
        logits: if tp > 1 { &mut ws.whole } else { &mut ws.logits },
        n_vocab,
        ld: n_vocab.div_ceil(tp) * tp,
        rows: &arrays.rows,
        ids: &mut ws.drawn,
        logprobs: &mut ws.logprobs,
        n_top,
        top_ids: &mut ws.top_ids,
        top_logprobs: &mut ws.top_logprobs,
    })
}
