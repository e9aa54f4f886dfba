//! The engine: a scheduler that decides, a runner that computes, and the text of what they made. Four lines a step.

mod text;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{SendError, Sender};
use std::time::Instant;

use dist_comm::ControlError;
use dist_core::plan::Plan;
use dist_core::{Rank, TensorSpec};
use dist_kernels::{Backend, KernelError};

use crate::checkpoint::Checkpoint;
use crate::decoder::{Decoder, LoadError, OnProgress};
use crate::rank::Leader;
use crate::request::{Event, Request, RequestId};
use crate::runner::{Comms, RunError, Runner, Usage, with_causes};
use crate::scheduler::{Limits, RequestError, Scheduler, Stats};
use crate::step::StepBatch;
use crate::tokenizer::Tokenizer;
use text::Texts;

/// Why the engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The weights could not be taken in.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Cache or workspace could not be taken.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A step failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A rank is gone, or the way to it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A follower ended.
    #[error("a follower rank ended before step {step}")]
    FollowerLost {
        /// The step that could not be sent.
        step: u64,
    },
    /// A step failed before: the ranks are in the middle of it, and what it drew is lost.
    #[error("the engine has failed and runs no more steps, build a new one: {first}")]
    Broken {
        /// What went wrong first.
        first: String,
    },
}

/// The ranks that run the same steps as the leader.
#[derive(Default)]
pub enum Followers {
    /// None: the leader is alone.
    #[default]
    None,
    /// Threads of this process.
    Threads(Vec<Sender<Arc<StepBatch>>>),
    /// Processes, on this machine or others.
    Ranks(Box<Leader>),
}

impl Followers {
    /// `collects` steps have been collected since the last broadcast.
    fn broadcast(&mut self, batch: &StepBatch, collects: u32) -> Result<(), EngineError> {
        let senders = match self {
            Self::None => return Ok(()),
            Self::Ranks(leader) => return Ok(leader.step(batch, collects)?),
            Self::Threads(senders) => senders,
        };
        let shared = Arc::new(batch.clone());
        let lost =
            |SendError(batch): SendError<Arc<StepBatch>>| EngineError::FollowerLost { step: batch.step };
        senders.iter().try_for_each(|sender| sender.send(Arc::clone(&shared)).map_err(lost))
    }
}

/// Runs requests on the leading rank.
pub struct Engine<B: Backend> {
    runner: Runner<B>,
    followers: Followers,
    scheduler: Scheduler,
    texts: Texts,
    /// Steps that were submitted and not committed, oldest first.
    in_flight: VecDeque<StepBatch>,
    depth: usize,
    /// Steps collected since the last one was submitted.
    collects: u32,
    /// What went wrong first: then there is nothing to wait for, and nothing to go on from.
    broken: Option<String>,
}

/// Loads what `rank` holds under `plan` and takes all memory of its steps.
pub fn start_rank<B: Backend>(
    mut backend: B,
    comms: Comms,
    checkpoint: &Checkpoint,
    plan: &Plan,
    rank: Rank,
    progress: OnProgress<'_>,
) -> Result<Runner<B>, EngineError> {
    let start = Instant::now();
    let decoder = Decoder::load(&mut backend, checkpoint, plan, rank, progress)?;
    backend.synchronize()?;
    let seconds = start.elapsed().as_secs_f64();
    let local = |spec: &TensorSpec| spec.byte_ranges(plan.mesh.tp, plan.mesh.coord(rank).tp);
    let n_bytes: usize = plan.specs(rank).iter().flat_map(local).map(|range| range.len()).sum();
    tracing::info!(gigabytes_per_s = n_bytes as f64 / 1e9 / seconds, seconds, "weights taken in");
    // Before the cache takes what is free.
    let limits = plan.limits;
    backend.tune(&decoder.products(), limits.max_batch_tokens)?;
    backend.tune(&decoder.head_products(), limits.max_sample_rows)?;
    Ok(Runner::new(backend, comms, decoder, checkpoint.config(), plan, rank)?)
}

impl<B: Backend> Engine<B> {
    /// An engine over a rank that is ready. Without a tokenizer events carry no text and stop strings never match.
    pub fn new(
        runner: Runner<B>,
        followers: Followers,
        plan: &Plan,
        tokenizer: Option<Arc<Tokenizer>>,
    ) -> Self {
        let limits = Limits {
            max_seqs: plan.limits.max_seqs,
            max_batch_tokens: plan.limits.max_batch_tokens,
            max_seq_len: plan.limits.max_seq_len,
            max_sample_rows: plan.limits.max_sample_rows,
            n_blocks: plan.kv.n_blocks,
            block_size: plan.kv.block_size,
        };
        let stages = plan.mesh.pp;
        // Stages are kept busy by as many steps; one stage by the step after the one that it is at, if its device is one
        // that only has to be asked.
        let depth = if stages > 1 { stages } else { 1 + B::STEPS_AHEAD };
        let scheduler =
            Scheduler::new(limits, plan.model.eos_ids.clone(), plan.model.n_vocab).for_stages(stages);
        let texts = Texts::new(tokenizer);
        Self {
            runner,
            followers,
            scheduler,
            texts,
            in_flight: VecDeque::new(),
            depth,
            collects: 0,
            broken: None,
        }
    }

    /// Takes a request in, or says why it never could be served.
    pub fn add(&mut self, request: Request) -> Result<(), RequestError> {
        if let Some(first) = &self.broken {
            return Err(RequestError::EngineFailed { first: first.clone() });
        }
        self.texts.check(&request)?;
        let (id, sampling) = (request.id, request.sampling.clone());
        self.scheduler.add(request)?;
        self.texts.begin(id, &sampling);
        Ok(())
    }

    /// Takes a request back; whether it was there. Its samples end with the next step's events.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.scheduler.cancel(id)
    }

    /// Keeps every stage busy, then waits for the oldest step and tells what it did; nothing to do is no event. After an
    /// error there are only errors: build a new engine.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        self.guarded(|engine| {
            engine.try_step().inspect_err(|error| {
                if let Followers::Ranks(leader) = &engine.followers
                    && error.lost().is_none()
                {
                    leader.fail(&with_causes(error));
                }
            })
        })
    }

    /// Runs `work`, unless something went wrong before; what goes wrong in it is kept.
    fn guarded<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        if let Some(first) = &self.broken {
            return Err(EngineError::Broken { first: first.clone() });
        }
        let result = work(self);
        self.broken = result.as_ref().err().map(|error| with_causes(error));
        result
    }

    fn try_step(&mut self) -> Result<Vec<Event>, EngineError> {
        while self.in_flight.len() < self.depth {
            let Some(batch) = self.scheduler.schedule() else { break };
            self.followers.broadcast(&batch, std::mem::take(&mut self.collects))?;
            self.runner.submit(&batch)?;
            self.in_flight.push_back(batch);
        }
        let Some(batch) = self.in_flight.pop_front() else { return Ok(self.ended()) };
        let output = self.runner.collect()?.expect("a step was submitted");
        self.collects += 1;
        let commits = self.scheduler.commit(&batch, &output);
        Ok(self.texts.events(commits, &mut self.scheduler))
    }

    /// Samples that ended without a step.
    fn ended(&mut self) -> Vec<Event> {
        let commits = self.scheduler.take_ended();
        self.texts.events(commits, &mut self.scheduler)
    }

    /// Whether every request has ended.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// What is running and waiting.
    pub fn stats(&self) -> Stats {
        self.scheduler.stats()
    }

    /// What every rank process did since the last time that this was asked, this one first.
    pub fn usage(&mut self) -> Result<Vec<Usage>, EngineError> {
        self.guarded(|engine| {
            let mut usage = vec![engine.runner.take_usage()];
            if let Followers::Ranks(leader) = &mut engine.followers {
                usage.extend(leader.reports()?);
            }
            Ok(usage)
        })
    }

    /// The device.
    pub fn backend(&mut self) -> &mut B {
        self.runner.backend()
    }
}

/// Followers are in the middle of what was submitted: they are let through it before they are told to stop.
impl<B: Backend> Drop for Engine<B> {
    fn drop(&mut self) {
        let Followers::Ranks(leader) = &mut self.followers else { return };
        if self.broken.is_some() || std::thread::panicking() {
            return;
        }
        while self.in_flight.pop_front().is_some() {
            if self.runner.collect().is_err() {
                return;
            }
        }
        leader.stop();
    }
}
