//! Every tensor of a decoder as a row in a table: canonical name, shape, how it is cut, who holds it.

use crate::config::{ModelConfig, NormPosition};
use crate::spec::{Owner, Part, Placement, TensorSpec};

/// Cut by whole units along `dim`.
fn cut(dim: usize, len: usize, unit: usize) -> Placement {
    Placement::Sharded { dim, parts: vec![Part { len, unit, replicate_if_short: false, padded: false }] }
}

/// Query heads, then key heads, then value heads, each cut by itself along the outputs.
fn qkv_parts(config: &ModelConfig) -> Placement {
    let part = |heads: usize, replicate_if_short| Part {
        len: heads * config.d_head,
        unit: config.d_head,
        replicate_if_short,
        padded: false,
    };
    let (q, kv) = (part(config.n_heads, false), part(config.n_kv_heads, true));
    Placement::Sharded { dim: 0, parts: vec![q, kv.clone(), kv] }
}

/// The tensors of `config` in canonical order: embedding, layers, head. Weights are `[outputs, inputs]`.
#[must_use]
pub fn decoder_specs(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut specs = Vec::new();
    embed_specs(config, &mut specs);
    for layer in 0..config.n_layers {
        layer_specs(config, layer, &mut specs);
    }
    head_specs(config, &mut specs);
    specs
}

fn spec(
    config: &ModelConfig,
    owner: Owner,
    name: impl Into<String>,
    shape: &[usize],
    placement: Placement,
) -> TensorSpec {
    TensorSpec { name: name.into(), dtype: config.weight_dtype, shape: shape.to_vec(), placement, owner }
}

fn vocab_parallel(config: &ModelConfig) -> Placement {
    let part = Part { len: config.n_vocab, unit: 1, replicate_if_short: false, padded: true };
    Placement::Sharded { dim: 0, parts: vec![part] }
}

fn embed_specs(config: &ModelConfig, specs: &mut Vec<TensorSpec>) {
    let c = config;
    let mut push = |name: &str, shape: &[usize], placement| {
        specs.push(spec(c, Owner::Embed, name, shape, placement));
    };
    push("embed.tokens.weight", &[c.n_vocab, c.d_embed], vocab_parallel(c));
    push("embed.positions.weight", &[c.n_ctx + c.position_offset, c.d_model], Placement::Replicated);
    if c.d_embed != c.d_model {
        push("embed.project_in.weight", &[c.d_model, c.d_embed], Placement::Replicated);
    }
}

fn layer_specs(config: &ModelConfig, layer: usize, specs: &mut Vec<TensorSpec>) {
    let c = config;
    let mut push = |name: &str, shape: &[usize], placement| {
        specs.push(spec(c, Owner::Layer(layer), format!("layers.{layer}.{name}"), shape, placement));
    };
    let (d, d_heads) = (c.d_model, c.n_heads * c.d_head);
    let d_qkv = d_heads + 2 * c.n_kv_heads * c.d_head;
    push("norm1.weight", &[d], Placement::Replicated);
    push("norm1.bias", &[d], Placement::Replicated);
    push("attn.qkv.weight", &[d_qkv, d], qkv_parts(c));
    if c.block.qkv_bias {
        push("attn.qkv.bias", &[d_qkv], qkv_parts(c));
    }
    push("attn.proj.weight", &[d, d_heads], cut(1, d_heads, c.d_head));
    if c.block.out_bias {
        push("attn.proj.bias", &[d], Placement::Replicated); // added after the reduction
    }
    push("norm2.weight", &[d], Placement::Replicated);
    push("norm2.bias", &[d], Placement::Replicated);
    push("mlp.fc1.weight", &[c.d_ff, d], cut(0, c.d_ff, 1));
    if c.block.out_bias {
        push("mlp.fc1.bias", &[c.d_ff], cut(0, c.d_ff, 1));
    }
    push("mlp.fc2.weight", &[d, c.d_ff], cut(1, c.d_ff, 1));
    if c.block.out_bias {
        push("mlp.fc2.bias", &[d], Placement::Replicated); // added after the reduction
    }
}

fn head_specs(config: &ModelConfig, specs: &mut Vec<TensorSpec>) {
    let c = config;
    let mut push = |name: &str, shape: &[usize], placement| {
        specs.push(spec(c, Owner::Head, name, shape, placement));
    };
    if c.final_norm {
        assert!(c.block.norm_position == NormPosition::Pre, "post-norm blocks end normalised");
        push("final_norm.weight", &[c.d_model], Placement::Replicated);
        push("final_norm.bias", &[c.d_model], Placement::Replicated);
    }
    if c.d_embed != c.d_model {
        push("head.project_out.weight", &[c.d_embed, c.d_model], Placement::Replicated);
    }
    if !c.tied_head {
        push("head.weight", &[c.n_vocab, c.d_embed], vocab_parallel(c));
    }
}
