//! The hash that ranks compare before they touch memory: what it covers is listed here, field by field.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{KvPlan, Limits, Plan};
use crate::config::{Activation, BlockSpec, NormPosition};
use crate::{DType, Mesh, ModelConfig, Owner, Part, Placement, TensorSpec, decoder_specs};

/// SHA-256 of a plan; 64 hexadecimal digits as text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct PlanHash(pub [u8; 32]);

/// Text that is no plan's hash.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a plan hash is 64 hexadecimal digits")]
pub struct PlanHashError;

impl fmt::Display for PlanHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PlanHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PlanHash({self})")
    }
}

impl FromStr for PlanHash {
    type Err = PlanHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.as_bytes();
        if digits.len() != 64 {
            return Err(PlanHashError);
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(PlanHashError);
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Ok(Self(hash))
    }
}

impl TryFrom<String> for PlanHash {
    type Error = PlanHashError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PlanHash> for String {
    fn from(hash: PlanHash) -> Self {
        hash.to_string()
    }
}

/// Takes values in an encoding in which no two lists of values look alike: numbers in eight bytes, text and lists
/// after their length.
struct Hasher(Sha256);

impl Hasher {
    fn n(&mut self, n: usize) {
        self.0.update((n as u64).to_le_bytes());
    }

    fn all(&mut self, ns: &[usize]) {
        self.n(ns.len());
        for &n in ns {
            self.n(n);
        }
    }

    fn option(&mut self, n: Option<usize>) {
        self.n(usize::from(n.is_some()));
        self.n(n.unwrap_or(0));
    }

    fn text(&mut self, text: &str) {
        self.n(text.len());
        self.0.update(text);
    }

    fn dtype(&mut self, dtype: DType) {
        self.text(dtype.name());
    }
}

/// The hash of `plan`. Every struct is taken apart whole, so that a new field cannot be forgotten here.
pub(super) fn of(plan: &Plan) -> PlanHash {
    let Plan { schema_version, model, mesh, stages, act_dtype, wire_dtype, kv, limits, predictions: _ } =
        plan;
    let mut h = Hasher(Sha256::new());
    h.text("dist plan");
    h.n(*schema_version as usize);
    hash_model(&mut h, model);
    let Mesh { tp, pp, dp } = *mesh;
    h.all(&[tp, pp, dp]);
    h.all(stages);
    h.dtype(*act_dtype);
    h.dtype(*wire_dtype);
    let KvPlan { dtype, block_size, n_blocks } = *kv;
    h.dtype(dtype);
    h.all(&[block_size, n_blocks]);
    let Limits { max_seq_len, max_seqs, max_batch_tokens, max_sample_rows } = *limits;
    h.all(&[max_seq_len, max_seqs, max_batch_tokens, max_sample_rows]);
    let specs = decoder_specs(model);
    h.n(specs.len());
    for spec in &specs {
        hash_spec(&mut h, spec);
    }
    PlanHash(h.0.finalize().into())
}

fn hash_model(h: &mut Hasher, model: &ModelConfig) {
    let ModelConfig {
        name: _,
        n_layers,
        d_model,
        d_embed,
        n_heads,
        n_kv_heads,
        d_head,
        d_ff,
        n_ctx,
        n_vocab,
        position_offset,
        block,
        windows,
        final_norm,
        tied_head,
        bos_id,
        eos_ids,
        weight_dtype,
    } = model;
    h.all(&[*n_layers, *d_model, *d_embed, *n_heads, *n_kv_heads, *d_head, *d_ff, *n_ctx, *n_vocab]);
    h.n(*position_offset);
    hash_block(h, block);
    h.n(windows.len());
    for &window in windows {
        h.option(window);
    }
    h.all(&[usize::from(*final_norm), usize::from(*tied_head)]);
    h.option(bos_id.map(|id| id as usize));
    h.n(eos_ids.len());
    for &id in eos_ids {
        h.n(id as usize);
    }
    h.dtype(*weight_dtype);
}

fn hash_block(h: &mut Hasher, block: &BlockSpec) {
    let BlockSpec {
        norm_position,
        norm_eps,
        activation,
        scale_attn,
        scale_attn_by_inverse_layer_idx,
        qkv_bias,
        out_bias,
    } = block;
    h.text(match norm_position {
        NormPosition::Pre => "pre",
        NormPosition::Post => "post",
    });
    h.n(norm_eps.to_bits() as usize);
    h.text(match activation {
        Activation::GeluTanh => "gelu_tanh",
        Activation::GeluErf => "gelu_erf",
        Activation::Relu => "relu",
    });
    h.all(&[*scale_attn, *scale_attn_by_inverse_layer_idx, *qkv_bias, *out_bias].map(usize::from));
}

fn hash_spec(h: &mut Hasher, spec: &TensorSpec) {
    let TensorSpec { name, dtype, shape, placement, owner } = spec;
    h.text(name);
    h.dtype(*dtype);
    h.all(shape);
    match placement {
        Placement::Replicated => h.text("replicated"),
        Placement::Sharded { dim, parts } => {
            h.text("sharded");
            h.all(&[*dim, parts.len()]);
            for &Part { len, unit, replicate_if_short, padded } in parts {
                h.all(&[len, unit, usize::from(replicate_if_short), usize::from(padded)]);
            }
        }
    }
    match owner {
        Owner::Embed => h.text("embed"),
        Owner::Layer(layer) => {
            h.text("layer");
            h.n(*layer);
        }
        Owner::Head => h.text("head"),
    }
}
