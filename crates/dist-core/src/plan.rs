//! The plan of a run as one immutable value: who holds what, in which types, and what that should cost.
//!
//! A plan is made once, by the [planner](crate::planner) or read from a file, and then obeyed: execution makes no choice
//! that is not here. It reads and writes no file itself; it is serialisable, and reading one checks it, since it may
//! come from anywhere.

mod hash;
mod memory;
mod validate;

use std::ops::Range;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{DType, KvLayout, Mesh, ModelConfig, Owner, Placement, Rank, TensorSpec, decoder_specs};

pub use hash::{PlanHash, PlanHashError};

pub(crate) use memory::WeightBytes;
pub use memory::{MAX_TOP, MemoryBreakdown};
pub use validate::{PlanError, check_split, check_tp};
pub(crate) use validate::{mesh as check_mesh, model as check_model, stages as check_stages};

/// Version of the plan's serialised form and of what its hash covers.
pub const SCHEMA_VERSION: u32 = 1;

/// Segments in which the CPU's `linear` sums over a whole `k`; degrees 1, 2, 4 and 8 then add alike.
pub const K_SEGMENTS: usize = 8;

/// The table that a tied head shares.
pub const TOKEN_TABLE: &str = "embed.tokens.weight";

/// How the KV cache is kept, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvPlan {
    /// Type of keys and values.
    pub dtype: DType,
    /// Tokens of one block.
    pub block_size: usize,
    /// Blocks of every rank's cache.
    pub n_blocks: usize,
}

/// The largest step and the longest sequence, for one copy of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Prompt and new tokens of one sequence.
    pub max_seq_len: usize,
    /// Sequences that run at the same time.
    pub max_seqs: usize,
    /// Rows (tokens) of one step.
    pub max_batch_tokens: usize,
    /// Rows of one step whose logits are wanted.
    pub max_sample_rows: usize,
}

/// What the cost model expects of the workload that was planned for. Not part of the plan's hash.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Predictions {
    /// Seconds from a single prompt of the workload to its first token, nothing else running.
    pub ttft_s: f64,
    /// Seconds between two tokens of one sequence, all sequences of the workload running.
    pub tpot_s: f64,
    /// Seconds for all prompts and all new tokens of the workload.
    pub total_s: f64,
    /// New tokens a second, all sequences and all copies together, while decoding.
    pub tokens_per_s: f64,
}

/// What every rank agrees on before it touches memory.
///
/// ```
/// use dist_core::plan::{KvPlan, Limits, Plan, Predictions, SCHEMA_VERSION};
/// use dist_core::{DType, Mesh, Rank, presets};
///
/// let plan = Plan {
///     schema_version: SCHEMA_VERSION,
///     model: presets::preset("gpt3-125m", None).expect("listed"),
///     mesh: Mesh { tp: 2, pp: 1, dp: 1 },
///     stages: vec![12],
///     act_dtype: DType::F32,
///     wire_dtype: DType::F32,
///     kv: KvPlan { dtype: DType::F32, block_size: 16, n_blocks: 128 },
///     limits: Limits { max_seq_len: 2048, max_seqs: 1, max_batch_tokens: 512, max_sample_rows: 1 },
///     predictions: Predictions { ttft_s: 0.1, tpot_s: 0.01, total_s: 1.0, tokens_per_s: 100.0 },
/// };
/// assert_eq!(plan.validate(), Ok(()));
/// assert_eq!(plan.n_heads_local(Rank(1)), 6);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct Plan {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The model.
    pub model: ModelConfig,
    /// The degrees of the split.
    pub mesh: Mesh,
    /// Layers of each pipeline stage, first stage first.
    pub stages: Vec<usize>,
    /// Type of activations.
    pub act_dtype: DType,
    /// Type of partial sums on their way between ranks.
    pub wire_dtype: DType,
    /// The KV cache.
    pub kv: KvPlan,
    /// The sizes that memory is taken for.
    pub limits: Limits,
    /// What this should cost.
    pub predictions: Predictions,
}

// `remote = "Self"` makes the derived functions inherent, so that reading can check what it read.
impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Plan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let plan = Self::deserialize(deserializer)?;
        plan.validate().map_err(serde::de::Error::custom)?;
        Ok(plan)
    }
}

impl Plan {
    /// SHA-256 over everything that ranks must agree on: all but the predictions and the model's name, and the table
    /// of shards that this version of the program derives from it.
    #[must_use]
    pub fn hash(&self) -> PlanHash {
        hash::of(self)
    }

    /// Whether every number fits the others; a plan that was read from outside has passed this.
    pub fn validate(&self) -> Result<(), PlanError> {
        validate::plan(self)
    }

    /// Layers of pipeline stage `stage`, by their numbers in the whole model.
    #[must_use]
    pub fn layers(&self, stage: usize) -> Range<usize> {
        let start = self.stages[..stage].iter().sum();
        start..start + self.stages[stage]
    }

    /// Query heads of `rank`.
    #[must_use]
    pub fn n_heads_local(&self, rank: Rank) -> usize {
        heads_local(&self.model, self.mesh.tp, self.mesh.coord(rank).tp).0
    }

    /// Key and value heads of `rank`.
    #[must_use]
    pub fn n_kv_heads_local(&self, rank: Rank) -> usize {
        heads_local(&self.model, self.mesh.tp, self.mesh.coord(rank).tp).1
    }

    /// Geometry of the part of the KV cache that `rank` keeps.
    #[must_use]
    pub fn kv_layout(&self, rank: Rank) -> KvLayout {
        KvLayout {
            n_layers_local: self.layers(self.mesh.coord(rank).pp).len(),
            n_kv_heads_local: self.n_kv_heads_local(rank),
            d_head: self.model.d_head,
            dtype: self.kv.dtype,
            block_size: self.kv.block_size,
        }
    }

    /// The tensors that `rank` holds a part of, in canonical order, with their global shapes.
    ///
    /// A tied token embedding is read by the first stage, as the table, and by the last one, as the head.
    #[must_use]
    pub fn specs(&self, rank: Rank) -> Vec<TensorSpec> {
        stage_specs(&self.model, &self.stages, self.mesh.coord(rank).pp)
    }

    /// Segments in which a rank sums over its part of a row-parallel `k`: the whole's eight over the degree where it
    /// divides them, so that degrees 1, 2, 4 and 8 add in the same tree; else eight.
    #[must_use]
    pub const fn k_segments(&self) -> usize {
        match crate::shape::div_exact(K_SEGMENTS, self.mesh.tp) {
            Some(segments) => segments,
            None => K_SEGMENTS,
        }
    }

    /// What `rank` takes of its device's memory.
    #[must_use]
    pub fn memory(&self, rank: Rank) -> MemoryBreakdown {
        memory::of(self, rank)
    }
}

/// The pipeline stages that hold `spec`, first one first.
///
/// A tied token embedding is in the first stage, as the table, and in the last one, as the head.
#[must_use]
pub fn stages_of(model: &ModelConfig, stages: &[usize], spec: &TensorSpec) -> Vec<usize> {
    let last = stages.len() - 1;
    match spec.owner {
        Owner::Embed if last > 0 && model.tied_head && spec.name == TOKEN_TABLE => vec![0, last],
        Owner::Embed => vec![0],
        Owner::Layer(layer) => {
            let mut end = 0;
            let holds = |n: &usize| {
                end += n;
                layer < end
            };
            stages.iter().position(holds).into_iter().collect()
        }
        Owner::Head => vec![last],
    }
}

/// The tensors of pipeline stage `stage`, in canonical order, with their global shapes.
#[must_use]
pub fn stage_specs(model: &ModelConfig, stages: &[usize], stage: usize) -> Vec<TensorSpec> {
    let mut specs = decoder_specs(model);
    specs.retain(|spec| stages_of(model, stages, spec).contains(&stage));
    specs
}

/// Query heads and KV heads of `tp_rank` of `tp`, by the one function that cuts.
pub(crate) fn heads_local(model: &ModelConfig, tp: usize, tp_rank: usize) -> (usize, usize) {
    let one_layer = ModelConfig { n_layers: 1, windows: vec![None], ..model.clone() };
    let specs = decoder_specs(&one_layer);
    let is_fused =
        |spec: &&TensorSpec| matches!(&spec.placement, Placement::Sharded { parts, .. } if parts.len() == 3);
    let qkv = specs.iter().find(is_fused).expect("every layer has a fused q, k, v");
    let slice = qkv.slice(tp, tp_rank);
    (slice.ranges[0].len() / model.d_head, slice.ranges[1].len() / model.d_head)
}

#[cfg(test)]
mod tests;
