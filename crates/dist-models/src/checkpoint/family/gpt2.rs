//! GPT-2, DistilGPT-2, Cerebras-GPT: linear layers stored `[inputs, outputs]`, q, k and v in one.

use dist_core::{BlockSpec, DType, ModelConfig, NormPosition};

use super::{Family, Fields, kn, nk};

pub(super) const FAMILY: Family = Family {
    name: "gpt2",
    prefixes: &["transformer."],
    layer: "h",
    in_layer: &[
        nk("norm1", &["ln_1"]),
        kn("attn.qkv", &["attn.c_attn"]),
        kn("attn.proj", &["attn.c_proj"]),
        nk("norm2", &["ln_2"]),
        kn("mlp.fc1", &["mlp.c_fc"]),
        kn("mlp.fc2", &["mlp.c_proj"]),
    ],
    whole: &[
        nk("embed.tokens", &["wte"]),
        nk("embed.positions", &["wpe"]),
        nk("final_norm", &["ln_f"]),
        nk("head", &["lm_head"]),
    ],
    masks: &["attn.bias", "attn.masked_bias"],
    read,
};

fn read(fields: &mut Fields) -> ModelConfig {
    let heads = &["n_head", "num_attention_heads"];
    let d_model = fields.size(&["n_embd", "hidden_size"]);
    let n_heads = fields.size(heads);
    let n_layers = fields.layers(&["n_layer", "num_hidden_layers"]);
    // `reorder_and_upcast_attn` is the same mathematics in another order of rounding.
    ModelConfig {
        name: String::new(),
        n_layers,
        d_model,
        d_embed: d_model,
        n_heads,
        n_kv_heads: n_heads,
        d_head: fields.d_head(heads, d_model, n_heads),
        d_ff: fields.size_or(&["n_inner"], Some(4 * d_model)),
        n_ctx: fields.size(&["n_positions", "max_position_embeddings"]),
        n_vocab: fields.size(&["vocab_size"]),
        position_offset: 0,
        block: BlockSpec {
            norm_position: NormPosition::Pre,
            norm_eps: fields.epsilon("layer_norm_epsilon"),
            activation: fields.activation("gelu_new"),
            scale_attn: fields.flag("scale_attn_weights", true),
            scale_attn_by_inverse_layer_idx: fields.flag("scale_attn_by_inverse_layer_idx", false),
            qkv_bias: true,
            out_bias: true,
        },
        windows: vec![None; n_layers],
        final_norm: true,
        tied_head: fields.flag("tie_word_embeddings", true),
        bos_id: None,
        eos_ids: Vec::new(),
        weight_dtype: DType::F32,
    }
}
