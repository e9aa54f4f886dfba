//! What a rank takes of its device's memory, in bytes, from a plan alone.

use serde::{Deserialize, Serialize};

use super::{Plan, TOKEN_TABLE};
use crate::shape::div_ceil;
use crate::{Coord, DType, ModelConfig, Owner, Rank, decoder_specs};

/// How many of the likeliest tokens a step can report a row.
pub const MAX_TOP: usize = 64;

/// Bytes of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBreakdown {
    /// Its parts of the weights; vectors (biases, norms) are kept in the type of the activations.
    pub weights: u64,
    /// Its part of the KV cache.
    pub kv: u64,
    /// Activations and inputs of the largest step.
    pub workspace: u64,
}

impl MemoryBreakdown {
    /// All of it.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.weights + self.kv + self.workspace
    }
}

/// What `rank` takes under `plan`.
pub(super) fn of(plan: &Plan, rank: Rank) -> MemoryBreakdown {
    let Coord { tp, pp: stage, .. } = plan.mesh.coord(rank);
    let bytes = WeightBytes::of(&plan.model, plan.mesh.tp, tp, plan.act_dtype);
    MemoryBreakdown {
        weights: bytes.beside_layers(stage, plan.mesh.pp) + plan.layers(stage).len() as u64 * bytes.layer,
        kv: plan.kv.n_blocks as u64 * plan.kv_layout(rank).bytes_per_block() as u64,
        workspace: workspace(plan, rank),
    }
}

/// Bytes in memory of what one rank of a stage holds, by owner; all layers are alike.
pub(crate) struct WeightBytes {
    embed: u64,
    /// Of one layer.
    pub(crate) layer: u64,
    head: u64,
    /// The token table where it is the head as well: held once more if the head is on another stage.
    tied: u64,
}

impl WeightBytes {
    pub(crate) fn of(model: &ModelConfig, tp: usize, tp_rank: usize, vectors: DType) -> Self {
        let one_layer = ModelConfig { n_layers: 1, windows: vec![None], ..model.clone() };
        let mut bytes = Self { embed: 0, layer: 0, head: 0, tied: 0 };
        for spec in decoder_specs(&one_layer) {
            let shape = spec.local_shape(tp, tp_rank);
            let dtype = if shape.len() == 1 { vectors } else { spec.dtype };
            let n = shape.iter().product::<usize>() as u64 * dtype.bytes() as u64;
            match spec.owner {
                Owner::Embed => bytes.embed += n,
                Owner::Layer(_) => bytes.layer += n,
                Owner::Head => bytes.head += n,
            }
            if model.tied_head && spec.name == TOKEN_TABLE {
                bytes.tied = n;
            }
        }
        bytes
    }

    /// What stage `stage` of `pp` holds beside its layers.
    pub(crate) fn beside_layers(&self, stage: usize, pp: usize) -> u64 {
        let first = if stage == 0 { self.embed } else { 0 };
        let last = if stage + 1 == pp { self.head } else { 0 };
        first + last + if stage + 1 == pp && pp > 1 { self.tied } else { 0 }
    }
}

/// Bytes of a step's buffers: `R` rows, `S` sequences, `L` rows with logits, at most.
fn workspace(plan: &Plan, rank: Rank) -> u64 {
    let (m, tp) = (&plan.model, plan.mesh.tp);
    let (r, s, l) = (plan.limits.max_batch_tokens, plan.limits.max_seqs, plan.limits.max_sample_rows);
    let (n_heads, n_kv_heads) = (plan.n_heads_local(rank), plan.n_kv_heads_local(rank));
    let max_blocks = div_ceil(plan.limits.max_seq_len, plan.kv.block_size);
    let vocab_local = div_ceil(m.n_vocab, tp);
    let d_proj = if m.d_embed == m.d_model { 0 } else { m.d_embed };
    // Residual, normed, delta, embedded; fused q, k, v; heads; feed-forward.
    let per_row = 3 * m.d_model + d_proj + (2 * n_heads + 2 * n_kv_heads) * m.d_head + div_ceil(m.d_ff, tp);
    // Selected and projected rows.
    let per_logit_row = m.d_model + d_proj;
    // Own logits, and on several ranks the gathered and the ordered ones, with that order.
    let logits = vocab_local + if tp > 1 { 2 * vocab_local * tp + tp } else { 0 };
    // Ids, positions, slots a row; offsets, lengths and block table a sequence; rows and draws a logit row.
    let words = 3 * r + (s + 1) + s * (1 + max_blocks) + l * (logits + 3 + 2 * MAX_TOP);
    (r * per_row + l * per_logit_row) as u64 * plan.act_dtype.bytes() as u64 + words as u64 * 4
}
