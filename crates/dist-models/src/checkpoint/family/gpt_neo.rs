//! GPT-Neo: layers that alternate between dense and locally banded attention, which is not scaled.

use dist_core::{BlockSpec, DType, ModelConfig, NormPosition};
use serde_json::Value;

use super::{Family, Fields, nk};

pub(super) const FAMILY: Family = Family {
    name: "gpt_neo",
    prefixes: &["transformer."],
    layer: "h",
    in_layer: &[
        nk("norm1", &["ln_1"]),
        nk("attn.qkv", &["attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"]),
        nk("attn.proj", &["attn.attention.out_proj"]),
        nk("norm2", &["ln_2"]),
        nk("mlp.fc1", &["mlp.c_fc"]),
        nk("mlp.fc2", &["mlp.c_proj"]),
    ],
    whole: &[
        nk("embed.tokens", &["wte"]),
        nk("embed.positions", &["wpe"]),
        nk("final_norm", &["ln_f"]),
        nk("head", &["lm_head"]),
    ],
    masks: &["attn.attention.bias", "attn.attention.masked_bias"],
    read,
};

fn read(fields: &mut Fields) -> ModelConfig {
    let heads = &["num_heads", "num_attention_heads"];
    let d_model = fields.size(&["hidden_size"]);
    let n_heads = fields.size(heads);
    let n_layers = fields.layers(&["num_layers", "num_hidden_layers"]);
    // Hugging Face keeps what is in the lower triangle and not in the one `window_size` further down: `window_size`
    // positions, the query's own included.
    let window = fields.size_or(&["window_size"], Some(256));
    let is_local = local_layers(fields, n_layers);
    ModelConfig {
        name: String::new(),
        n_layers,
        d_model,
        d_embed: d_model,
        n_heads,
        n_kv_heads: n_heads,
        d_head: fields.d_head(heads, d_model, n_heads),
        d_ff: fields.size_or(&["intermediate_size"], Some(4 * d_model)),
        n_ctx: fields.size(&["max_position_embeddings"]),
        n_vocab: fields.size(&["vocab_size"]),
        position_offset: 0,
        block: BlockSpec {
            norm_position: NormPosition::Pre,
            norm_eps: fields.epsilon("layer_norm_epsilon"),
            activation: fields.activation("gelu_new"),
            scale_attn: false,
            scale_attn_by_inverse_layer_idx: false,
            qkv_bias: false,
            out_bias: true,
        },
        windows: is_local.into_iter().map(|is_local| is_local.then_some(window)).collect(),
        final_norm: true,
        tied_head: fields.flag("tie_word_embeddings", true),
        bos_id: None,
        eos_ids: Vec::new(),
        weight_dtype: DType::F32,
    }
}

/// Which layers attend locally: from `attention_layers`, a list of their kinds, and `attention_types`, the same list
/// folded; both must say the same.
fn local_layers(fields: &mut Fields, n_layers: usize) -> Vec<bool> {
    let listed = fields.raw("attention_layers").map(|value| kinds(value, n_layers));
    let folded = fields.raw("attention_types").map(|value| unfold(value, n_layers));
    let expected = format!("\"global\" or \"local\" for each of {n_layers} layers");
    match (listed, folded) {
        (Some(Some(listed)), None) => listed,
        (None, Some(Some(folded))) => folded,
        (Some(Some(listed)), Some(Some(folded))) if listed == folded => listed,
        (Some(Some(listed)), Some(Some(_))) => {
            fields.refuse("attention_types", "the same layers as attention_layers");
            listed
        }
        (Some(None), _) => {
            fields.refuse("attention_layers", expected);
            vec![false; n_layers]
        }
        (_, Some(None)) => {
            fields.refuse("attention_types", format!("[[kinds, times], …] that make {expected}"));
            vec![false; n_layers]
        }
        // Hugging Face's own default.
        (None, None) => (0..n_layers).map(|layer| layer % 2 == 1).collect(),
    }
}

fn kind(value: &Value) -> Option<bool> {
    match value.as_str()? {
        "global" => Some(false),
        "local" => Some(true),
        _ => None,
    }
}

/// Kinds of exactly `n` layers.
fn kinds(value: &Value, n: usize) -> Option<Vec<bool>> {
    value.as_array().filter(|items| items.len() == n)?.iter().map(kind).collect()
}

/// `[[kinds, times], …]` unfolded to exactly `n` layers.
fn unfold(value: &Value, n: usize) -> Option<Vec<bool>> {
    let mut out = Vec::new();
    for item in value.as_array()? {
        let [pattern, times] = item.as_array()?.as_slice() else { return None };
        let pattern: Vec<bool> = pattern.as_array()?.iter().map(kind).collect::<Option<_>>()?;
        let len = usize::try_from(times.as_u64()?).ok()?.checked_mul(pattern.len())?;
        // Never longer than what is asked for, whatever the file says.
        if len > n - out.len() {
            return None;
        }
        out.extend(pattern.iter().copied().cycle().take(len));
    }
    (out.len() == n).then_some(out)
}
