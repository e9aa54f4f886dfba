//! From an open model to an engine that is ready: a plan that fits this machine, the device, the weights.

use std::time::{Duration, Instant};

use dist_comm::{Comm, Solo};
use dist_core::plan::{Limits, Plan};
use dist_core::planner::{PlanOptions, PlanReport, Reason, Workload, plan};
use dist_core::{DType, Device, DeviceKind, Link, Mesh, ModelConfig, Rank, Topology};
use dist_kernels::cpu::{CpuBackend, CpuOptions};
use dist_models::decoder::LoadProgress;
use dist_models::engine::{Engine, Followers, start_rank};
use dist_models::runner::Comms;

use crate::flags::{DeviceRequest, LimitArgs};
use crate::machine::{self, gigabytes};
use crate::model::{Holding, Model};
use crate::problem::Problem;

/// Tokens of a KV block.
pub const BLOCK_SIZE: usize = 16;
/// Sequences at once, unless told otherwise.
const MAX_SEQS: usize = 16;
/// Prompt tokens that are scored in one step.
const SCORED_ROWS: usize = 64;
/// How long idle threads spin: long enough to reach the next layer's step.
const SPIN: Duration = Duration::from_micros(50);
/// How much of the free memory may be taken.
pub const MEMORY_PERCENT: u32 = 90;

/// What a device can do, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Rate of reading memory.
    pub read_bytes_per_s: f64,
    /// Rate of multiplying.
    pub flops_per_s: f64,
}

impl Rates {
    /// Nobody has measured: any will do where nothing depends on them.
    pub const UNKNOWN: Self = Self { read_bytes_per_s: 20e9, flops_per_s: 100e9 };
}

/// What the device is, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// The processor.
    pub name: String,
    /// Threads that compute.
    pub threads: usize,
    /// Its instructions.
    pub path: &'static str,
}

/// Threads and instructions, before any model.
pub fn backend(request: DeviceRequest) -> anyhow::Result<(CpuBackend, DeviceReport)> {
    let options = CpuOptions { threads: request.threads, path: request.path, spin: SPIN };
    let backend = CpuBackend::new(options).map_err(|error| {
        Problem::failed("the CPU cannot be used as asked").help("try --cpu-path auto").because(error)
    })?;
    let described = backend.describe();
    let report = DeviceReport { name: machine::cpu_name(), threads: described.threads, path: described.path };
    Ok((backend, report))
}

/// What a run asks of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Samples of all prompts.
    pub n_samples: usize,
    /// Samples of the prompt that has most.
    pub n_most: usize,
    /// Tokens of the longest prompt.
    pub prompt_len: usize,
    /// New tokens of the longest answer.
    pub new_tokens: usize,
    /// Whether prompts are scored.
    pub scores_prompts: bool,
}

/// Tokens of the longest sequence: what was asked for, or all that the model knows.
pub fn max_seq_len(asked: &LimitArgs, config: &ModelConfig) -> anyhow::Result<usize> {
    match asked.max_seq_len {
        Some(asked) if asked > config.n_ctx => {
            let (name, n_ctx) = (&config.name, config.n_ctx);
            let problem = Problem::failed(format!("--max-seq-len {asked}: {name} knows {n_ctx} positions"));
            Err(problem.help(format!("use at most --max-seq-len {n_ctx}")).into())
        }
        asked => Ok(asked.unwrap_or(config.n_ctx)),
    }
}

/// The sizes that memory is taken for.
pub fn limits(asked: &LimitArgs, max_seq_len: usize, demand: Demand) -> Limits {
    let max_seqs = asked.max_seqs.unwrap_or_else(|| demand.n_samples.min(MAX_SEQS).max(demand.n_most));
    let scored = if demand.scores_prompts { SCORED_ROWS.min(asked.max_batch_tokens) } else { 0 };
    Limits {
        max_seq_len,
        max_seqs,
        max_batch_tokens: asked.max_batch_tokens,
        max_sample_rows: max_seqs.max(scored),
    }
}

/// What the planner works with on this machine.
pub struct Setting<'a> {
    /// The model.
    pub model: &'a Model,
    /// The device.
    pub device: &'a DeviceReport,
    /// What it can do.
    pub rates: Rates,
    /// The sizes that memory is taken for.
    pub limits: Limits,
}

impl Setting<'_> {
    fn report(&self, workload: Workload, memory_bytes: u64) -> anyhow::Result<PlanReport> {
        let device = Device {
            kind: DeviceKind::Cpu,
            name: self.device.name.clone(),
            host: 0,
            memory_bytes,
            read_bytes_per_s: self.rates.read_bytes_per_s,
            flops_per_s: self.rates.flops_per_s,
        };
        let nowhere = Link { latency_s: 0.0, bytes_per_s: f64::MAX };
        let options = PlanOptions {
            act_dtype: DType::F32,
            wire_dtype: DType::F32,
            kv_dtype: DType::F32,
            block_size: BLOCK_SIZE,
            limits: self.limits,
            memory_percent: MEMORY_PERCENT,
            mesh: Some(Mesh::SOLO),
            stages: None,
            copies: false,
        };
        Ok(plan(self.model.config(), &Topology::uniform(&device, 1, nowhere), workload, &options)?)
    }

    /// A plan that fits the memory that is free now, and what to say about it beside.
    ///
    /// The pages of a mapped file can be dropped and read again, so that only what must stay has to fit.
    pub fn plan(&self, workload: Workload) -> anyhow::Result<(Plan, Option<String>)> {
        let Some(available) = machine::available_bytes() else {
            return Ok((self.best(self.report(workload, u64::MAX)?, u64::MAX)?, None));
        };
        let report = self.report(workload, available)?;
        let evictable = match self.model.holding {
            Holding::Mapped | Holding::Embedded => self.model.checkpoint.weight_bytes(),
            Holding::Read | Holding::Random => 0,
        };
        if report.best.is_some() || evictable == 0 {
            return Ok((self.best(report, available)?, None));
        }
        // In percent as the planner takes it.
        let beside = evictable.saturating_mul(100) / u64::from(MEMORY_PERCENT);
        let report = self.report(workload, available.saturating_add(beside))?;
        let plan = self.best(report, available)?;
        let warning = format!(
            "the weights ({}) and what is kept beside them do not fit the free memory ({}): parts will be read from \
             disk at every token",
            gigabytes(evictable),
            gigabytes(available)
        );
        Ok((plan, Some(warning)))
    }

    fn best(&self, report: PlanReport, available: u64) -> anyhow::Result<Plan> {
        if let Some(best) = report.best {
            return Ok(best);
        }
        let name = &self.model.name;
        match report.rejected.into_iter().next().map(|rejected| rejected.reason) {
            Some(Reason::Memory { needed, .. }) => {
                let what = format!(
                    "{name} needs {} of memory, {} are available",
                    gigabytes(needed.total()),
                    gigabytes(available)
                );
                let parts = anyhow::anyhow!(
                    "weights {}, KV cache {}, workspace {}; at most {MEMORY_PERCENT} % of what is available is taken",
                    gigabytes(needed.weights),
                    gigabytes(needed.kv),
                    gigabytes(needed.workspace)
                );
                let help =
                    "take a smaller model, or less at once: --max-seq-len, --max-seqs, --max-batch-tokens";
                Err(Problem::failed(what).because(parts).help(help).into())
            }
            Some(reason) => Err(Problem::failed(format!("{name} cannot run here")).because(reason).into()),
            None => Err(Problem::failed(format!("{name} cannot run here")).into()),
        }
    }
}

/// An engine that is ready.
pub struct Session {
    /// The engine.
    pub engine: Engine<CpuBackend>,
    /// What taking in the weights took.
    pub load: Duration,
}

impl Session {
    /// Takes the weights in and all memory that the plan allows.
    pub fn start(
        backend: CpuBackend,
        model: &Model,
        plan: &Plan,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> anyhow::Result<Self> {
        let start = Instant::now();
        let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
        let runner = start_rank(backend, comms, &model.checkpoint, plan, Rank(0), progress)?;
        let engine = Engine::new(runner, Followers::None, plan, model.tokenizer.clone());
        Ok(Self { engine, load: start.elapsed() })
    }
}
