//! From an open model to an engine that is ready: a plan that fits this machine, the device, the weights.

mod device;
mod ranks;

use std::time::Duration;

use dist_core::plan::{Limits, Plan};
use dist_core::planner::{PlanOptions, PlanReport, Reason, Workload, plan};
use dist_core::{DType, Device as PlannedDevice, DeviceKind, Link, ModelConfig, Topology};
use dist_models::engine::Engine;

pub use device::{Device, for_ranks};
pub use ranks::{Crew, Facts, follow};

use crate::flags::LimitArgs;
use crate::launch::{LocalRanks, Split};
use crate::machine::gigabytes;
use crate::model::Model;
use crate::problem::Problem;
use crate::render::Console;

/// Tokens of a KV block.
pub const BLOCK_SIZE: usize = 16;

/// Sequences at once, unless told otherwise.
fn max_seqs(kind: DeviceKind) -> usize {
    match kind {
        DeviceKind::Cpu => 16,
        DeviceKind::Cuda => 256,
    }
}

/// Tokens of a step, unless told otherwise: enough to keep the device at its best, and no more.
pub fn batch_tokens(kind: DeviceKind) -> usize {
    match kind {
        DeviceKind::Cpu => 512,
        DeviceKind::Cuda => 8192,
    }
}

/// Prompt tokens that are scored in one step.
const SCORED_ROWS: usize = 64;
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
    /// A processor or a GPU.
    pub kind: DeviceKind,
    /// Its name.
    pub name: String,
    /// Threads that compute.
    pub threads: usize,
    /// Its instructions.
    pub path: &'static str,
    /// What a GPU makes of weights in `f32`.
    pub cast: Option<DType>,
}

impl DeviceReport {
    /// The type of activations, vectors and cache for weights of `stored`.
    fn computes_in(&self, stored: DType) -> DType {
        match self.kind {
            DeviceKind::Cpu => DType::F32,
            DeviceKind::Cuda if stored == DType::F32 => self.cast.unwrap_or(DType::BF16),
            DeviceKind::Cuda => stored,
        }
    }
}

/// Says that a GPU does not compute with the weights as they are stored, if that is so.
pub fn tell_cast(console: &Console, model: &Model, device: &DeviceReport) {
    if let (Some(cast), DType::F32) = (device.cast, model.config().weight_dtype) {
        console.note(&format!(
            "weights in f32 are rounded to {cast} on the GPU; --device cpu takes them as they are"
        ));
    }
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
pub fn limits(asked: &LimitArgs, max_seq_len: usize, demand: Demand, kind: DeviceKind) -> Limits {
    let of_device = || demand.n_samples.min(max_seqs(kind)).max(demand.n_most);
    let max_seqs = asked.max_seqs.unwrap_or_else(of_device);
    let max_batch_tokens = asked.max_batch_tokens.unwrap_or_else(|| batch_tokens(kind));
    let scored = if demand.scores_prompts { SCORED_ROWS.min(max_batch_tokens) } else { 0 };
    Limits { max_seq_len, max_seqs, max_batch_tokens, max_sample_rows: max_seqs.max(scored) }
}

/// Between ranks, where nobody has measured.
const LINK: Link = Link { latency_s: 20e-6, bytes_per_s: 10e9 };

/// What the planner works with.
pub struct Setting<'a> {
    /// The model.
    pub model: &'a Model,
    /// The device of each rank.
    pub device: &'a DeviceReport,
    /// What it can do.
    pub rates: Rates,
    /// The sizes that memory is taken for.
    pub limits: Limits,
    /// How the model is split.
    pub split: &'a Split,
    /// What each rank has.
    pub ranks: &'a [Facts],
}

/// The plan that follows from model and split alone: what ranks compare before they know what each of them has.
pub fn split_plan(model: &Model, split: &Split) -> anyhow::Result<Plan> {
    let name = "device".to_owned();
    let device = DeviceReport { kind: DeviceKind::Cpu, name, threads: 1, path: "any", cast: None };
    let max_seq_len = model.config().n_ctx;
    let limits = Limits { max_seq_len, max_seqs: 1, max_batch_tokens: 1, max_sample_rows: 1 };
    let ranks = vec![Facts { available: u64::MAX, evictable: 0 }; split.mesh.world_size()];
    let setting = Setting { model, device: &device, rates: Rates::UNKNOWN, limits, split, ranks: &ranks };
    let workload = Workload { n_seqs: 1, prompt_len: 1, new_tokens: 1 };
    setting.best(setting.report(workload, |facts| facts.available)?)
}

impl Setting<'_> {
    fn report(&self, workload: Workload, memory: impl Fn(&Facts) -> u64) -> anyhow::Result<PlanReport> {
        let device = |facts| PlannedDevice {
            kind: self.device.kind,
            name: self.device.name.clone(),
            host: 0,
            memory_bytes: memory(facts),
            read_bytes_per_s: self.rates.read_bytes_per_s,
            flops_per_s: self.rates.flops_per_s,
            overhead: None,
        };
        let devices = self.ranks.iter().map(device).collect();
        let topology = Topology { devices, same_host: LINK, other_host: LINK, pairs: Vec::new() };
        let dtype = self.device.computes_in(self.model.config().weight_dtype);
        let options = PlanOptions {
            act_dtype: dtype,
            wire_dtype: dtype,
            kv_dtype: dtype,
            block_size: BLOCK_SIZE,
            limits: self.limits,
            memory_percent: MEMORY_PERCENT,
            mesh: Some(self.split.mesh),
            stages: self.stages(),
            copies: false,
        };
        Ok(plan(self.model.config(), &topology, workload, &options)?)
    }

    /// A plan that fits the memory that is free now, and what to say about it beside.
    ///
    /// The pages of a mapped file can be dropped and read again, so that only what must stay has to fit.
    pub fn plan(&self, workload: Workload) -> anyhow::Result<(Plan, Option<String>)> {
        let report = self.report(workload, |facts| facts.available)?;
        if report.best.is_some() || self.ranks.iter().all(|facts| facts.evictable == 0) {
            return Ok((self.best(report)?, None));
        }
        // In percent as the planner takes it.
        let beside = |facts: &Facts| facts.evictable.saturating_mul(100) / u64::from(MEMORY_PERCENT);
        let report = self.report(workload, |facts| facts.available.saturating_add(beside(facts)))?;
        let plan = self.best(report)?;
        let sum = |of: fn(&Facts) -> u64| self.ranks.iter().map(of).fold(0, u64::saturating_add);
        let warning = format!(
            "the weights ({}) and what is kept beside them do not fit the free memory ({}): parts will be read from \
             disk at every token",
            gigabytes(sum(|facts| facts.evictable)),
            gigabytes(sum(|facts| facts.available))
        );
        Ok((plan, Some(warning)))
    }

    /// Those that were asked for, or those that the files are cut for already.
    fn stages(&self) -> Option<Vec<usize>> {
        let of_files = || {
            let split = self.model.checkpoint.manifest()?.split.as_ref()?;
            (split.mesh() == self.split.mesh).then(|| split.stages.clone())
        };
        self.split.stages.clone().or_else(of_files)
    }

    fn best(&self, report: PlanReport) -> anyhow::Result<Plan> {
        if let Some(best) = report.best {
            return Ok(best);
        }
        let name = &self.model.name;
        match report.rejected.into_iter().next().map(|rejected| rejected.reason) {
            Some(Reason::Memory { rank, needed, .. }) => {
                let of_rank = if self.ranks.len() > 1 { format!(" on {rank}") } else { String::new() };
                let what = format!(
                    "{name} needs {} of memory{of_rank}, {} are available",
                    gigabytes(needed.total()),
                    gigabytes(self.ranks[rank.0].available)
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
            Some(reason) if self.ranks.len() > 1 => {
                let what = format!("{name} cannot be split as {}", self.split.mesh);
                Err(Problem::failed(what)
                    .because(reason)
                    .help("choose other degrees: --tp, --pp, --stages")
                    .into())
            }
            Some(reason) => Err(Problem::failed(format!("{name} cannot run here")).because(reason).into()),
            None => Err(Problem::failed(format!("{name} cannot run here")).into()),
        }
    }
}

/// An engine that is ready.
pub struct Session<B: Device> {
    /// The engine. It ends the ranks that follow it, so it goes before them.
    pub engine: Engine<B>,
    /// What taking in the weights took.
    pub load: Duration,
    /// The ranks that this process has started.
    pub locals: LocalRanks,
}
