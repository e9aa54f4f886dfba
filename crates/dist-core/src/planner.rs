//! Decides how a model is split over devices: tries every mesh, refuses what does not fit, prices the rest, and keeps the
//! reason for each. Pure: the same inputs give the same report, to the last tie.

mod price;
mod reason;
mod stages;

use crate::plan::{
    KvPlan, Limits, MemoryBreakdown, Plan, PlanError, Predictions, SCHEMA_VERSION, check_mesh, check_model,
    check_stages, check_tp,
};
use crate::shape::{div_ceil, div_exact};
use crate::topology::{Topology, TopologyError};
use crate::{Coord, DType, Mesh, ModelConfig, Rank};

pub use reason::{Lost, Reason};

/// What will be asked of the model, as far as the price depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Requests that arrive at once.
    pub n_seqs: usize,
    /// Tokens of each prompt.
    pub prompt_len: usize,
    /// Tokens that each request gets.
    pub new_tokens: usize,
}

/// What the caller has decided already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanOptions {
    /// Type of activations.
    pub act_dtype: DType,
    /// Type of partial sums between ranks.
    pub wire_dtype: DType,
    /// Type of keys and values.
    pub kv_dtype: DType,
    /// Tokens of a cache block.
    pub block_size: usize,
    /// The sizes that memory is taken for.
    pub limits: Limits,
    /// How much of each device's memory may be taken, in percent.
    pub memory_percent: u32,
    /// Only this mesh.
    pub mesh: Option<Mesh>,
    /// Only these layers a stage.
    pub stages: Option<Vec<usize>>,
    /// Whether copies of the model (dp above 1) are tried as well.
    pub copies: bool,
}

/// A split that would run, but is not the best.
#[derive(Clone, Debug, PartialEq)]
pub struct Alternative {
    /// Its degrees.
    pub mesh: Mesh,
    /// Layers of each stage.
    pub stages: Vec<usize>,
    /// What it should cost.
    pub predictions: Predictions,
    /// Memory of its fullest rank.
    pub memory: MemoryBreakdown,
    /// Why it lost.
    pub lost: Lost,
}

/// A split that cannot run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Its degrees.
    pub mesh: Mesh,
    /// Why not.
    pub reason: Reason,
}

/// What the planner found.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    /// The cheapest split, if any runs.
    pub best: Option<Plan>,
    /// The others that run, cheapest first.
    pub alternatives: Vec<Alternative>,
    /// Those that do not, in the order in which they were tried: by ranks, then by tensor-parallel degree.
    pub rejected: Vec<Rejected>,
}

/// A request that no planner can answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The model or an option.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The devices.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The workload does not fit the model or the limits.
    #[error("{prompt_len} prompt and {new_tokens} new tokens, the limit is {max_seq_len}")]
    TooLong {
        /// Tokens of a prompt.
        prompt_len: usize,
        /// Tokens that follow it.
        new_tokens: usize,
        /// What a sequence may have.
        max_seq_len: usize,
    },
    /// A number that must not be zero, or a percentage above 100.
    #[error("{field} = {found}: must be 1 to {max}")]
    OutOfRange {
        /// Which one.
        field: &'static str,
        /// Its value.
        found: usize,
        /// The largest that is allowed.
        max: usize,
    },
}

/// Finds the cheapest way to run `model` on `topology` under `workload`.
///
/// Meshes of 1 to all devices are tried, rank `i` on device `i`. The price is the time from the first prompt to the
/// last token of the workload, in whole nanoseconds; ties go to fewer ranks, then fewer stages.
pub fn plan(
    model: &ModelConfig,
    topology: &Topology,
    workload: Workload,
    options: &PlanOptions,
) -> Result<PlanReport, RequestError> {
    check_request(model, topology, workload, options)?;
    let request = Request { model, topology, workload, options };
    let (mut priced, mut rejected) = (Vec::new(), Vec::new());
    for mesh in meshes(topology.devices.len(), options) {
        match request.candidate(mesh) {
            Ok(plan) => priced.push(plan),
            Err(reason) => rejected.push(Rejected { mesh, reason }),
        }
    }
    priced.sort_by_key(|plan| {
        let Mesh { tp, pp, dp } = plan.mesh;
        (price::nanoseconds(plan.predictions.total_s), plan.mesh.world_size(), pp, tp, dp)
    });
    let mut priced = priced.into_iter();
    let best = priced.next();
    let alternatives = priced.zip(best.iter().cycle()).map(|(plan, best)| alternative(plan, best)).collect();
    Ok(PlanReport { best, alternatives, rejected })
}

fn alternative(plan: Plan, best: &Plan) -> Alternative {
    let stage = |pp| plan.memory(plan.mesh.rank(Coord { tp: 0, pp, dp: 0 }));
    let fullest = (0..plan.mesh.pp).map(stage).max_by_key(|memory| memory.total());
    Alternative {
        mesh: plan.mesh,
        memory: fullest.expect("a mesh has a stage"),
        lost: Lost::between(&plan, best),
        predictions: plan.predictions,
        stages: plan.stages,
    }
}

/// The meshes to try, in order of their ranks.
fn meshes(n_devices: usize, options: &PlanOptions) -> Vec<Mesh> {
    if let Some(mesh) = options.mesh {
        return vec![mesh];
    }
    let mut meshes = Vec::new();
    for n_ranks in 1..=n_devices {
        for dp in (1..=n_ranks).filter(|&dp| dp == 1 || options.copies) {
            let Some(of_a_copy) = div_exact(n_ranks, dp) else { continue };
            let degrees = (1..=of_a_copy).filter_map(|tp| Some((tp, div_exact(of_a_copy, tp)?)));
            meshes.extend(degrees.map(|(tp, pp)| Mesh { tp, pp, dp }));
        }
    }
    meshes
}

fn check_request(
    model: &ModelConfig,
    topology: &Topology,
    workload: Workload,
    options: &PlanOptions,
) -> Result<(), RequestError> {
    check_model(model)?;
    topology.check()?;
    if let Some(mesh) = options.mesh {
        check_mesh(mesh)?;
    }
    let in_range = [
        ("devices", topology.devices.len(), 1024),
        ("n_seqs", workload.n_seqs, 1 << 20),
        ("prompt_len", workload.prompt_len, model.n_ctx),
        ("new_tokens", workload.new_tokens, model.n_ctx),
        ("memory_percent", options.memory_percent as usize, 100),
        ("block_size", options.block_size, 1 << 16),
        ("max_seqs", options.limits.max_seqs, 1 << 20),
        ("max_batch_tokens", options.limits.max_batch_tokens, 1 << 24),
        ("max_sample_rows", options.limits.max_sample_rows, 1 << 24),
        ("max_seq_len", options.limits.max_seq_len, model.n_ctx),
    ];
    for (field, found, max) in in_range {
        if found == 0 || found > max {
            return Err(RequestError::OutOfRange { field, found, max });
        }
    }
    let (Workload { prompt_len, new_tokens, .. }, max_seq_len) = (workload, options.limits.max_seq_len);
    if prompt_len + new_tokens > max_seq_len {
        return Err(RequestError::TooLong { prompt_len, new_tokens, max_seq_len });
    }
    Ok(())
}

/// What one call of the planner works with.
struct Request<'a> {
    model: &'a ModelConfig,
    topology: &'a Topology,
    workload: Workload,
    options: &'a PlanOptions,
}

impl Request<'_> {
    /// A priced plan for `mesh`, or why there is none.
    fn candidate(&self, mesh: Mesh) -> Result<Plan, Reason> {
        let (needed, there) = (mesh.world_size(), self.topology.devices.len());
        if needed > there {
            return Err(Reason::Devices { needed, there });
        }
        if mesh.pp > self.model.n_layers {
            return Err(Reason::Layers { pp: mesh.pp, n_layers: self.model.n_layers });
        }
        check_tp(self.model, mesh.tp)?;
        if let Some(stages) = &self.options.stages {
            check_stages(self.model, mesh.pp, stages)?;
            return self.fitted(mesh, stages.clone());
        }
        let by_time = self.stages_by_time(mesh);
        let result = self.fitted(mesh, by_time.clone());
        if matches!(result, Err(Reason::Memory { .. })) && mesh.pp > 1 {
            let by_memory = self.stages_by_memory(mesh);
            if by_memory != by_time {
                return self.fitted(mesh, by_memory);
            }
        }
        result
    }

    /// A priced plan with these stages, its cache filling the memory that is left.
    fn fitted(&self, mesh: Mesh, stages: Vec<usize>) -> Result<Plan, Reason> {
        let options = self.options;
        let needed_blocks = self.needed_blocks(mesh);
        let mut plan = Plan {
            schema_version: SCHEMA_VERSION,
            model: self.model.clone(),
            mesh,
            stages,
            act_dtype: options.act_dtype,
            wire_dtype: options.wire_dtype,
            kv: KvPlan { dtype: options.kv_dtype, block_size: options.block_size, n_blocks: needed_blocks },
            limits: options.limits,
            predictions: Predictions { ttft_s: 0.0, tpot_s: 0.0, total_s: 0.0, tokens_per_s: 0.0 },
        };
        plan.validate()?;
        let max_blocks = options.limits.max_seqs * div_ceil(options.limits.max_seq_len, options.block_size);
        plan.kv.n_blocks = self.fill(&plan)?.clamp(needed_blocks, max_blocks.max(needed_blocks));
        plan.predictions = self.price(&plan);
        plan.validate()?;
        Ok(plan)
    }

    /// Cache blocks that the workload takes in one copy of the model, at least one sequence of full length.
    fn needed_blocks(&self, mesh: Mesh) -> usize {
        let (w, options) = (self.workload, self.options);
        let a_seq = div_ceil(w.prompt_len + w.new_tokens, options.block_size);
        let longest = div_ceil(options.limits.max_seq_len, options.block_size);
        (self.n_running(mesh) * a_seq).max(longest)
    }

    /// Sequences that run at the same time in one copy of the model.
    fn n_running(&self, mesh: Mesh) -> usize {
        div_ceil(self.workload.n_seqs, mesh.dp).min(self.options.limits.max_seqs)
    }

    /// Blocks that fit beside weights and workspace on every rank.
    fn fill(&self, plan: &Plan) -> Result<usize, Reason> {
        let mut n_blocks = usize::MAX;
        for pp in 0..plan.mesh.pp {
            // Rank 0 of the tensor-parallel ones holds the longest share of every cut.
            let first = plan.mesh.rank(Coord { tp: 0, pp, dp: 0 });
            let (needed, layout) = (plan.memory(first), plan.kv_layout(first));
            for (tp, dp) in (0..plan.mesh.dp).flat_map(|dp| (0..plan.mesh.tp).map(move |tp| (tp, dp))) {
                let rank = plan.mesh.rank(Coord { tp, pp, dp });
                let available = self.available(rank);
                if needed.total() > available {
                    let device = self.topology.devices[rank.0].name.clone();
                    return Err(Reason::Memory { rank, device, needed, available });
                }
                let for_kv = available - needed.weights - needed.workspace;
                n_blocks = n_blocks.min((for_kv / layout.bytes_per_block() as u64) as usize);
            }
        }
        Ok(n_blocks)
    }

    /// Bytes that `rank` may take of its device.
    fn available(&self, rank: Rank) -> u64 {
        let of_all = u128::from(self.topology.devices[rank.0].memory_bytes);
        (of_all * u128::from(self.options.memory_percent) / 100) as u64
    }
}

#[cfg(test)]
mod tests;
