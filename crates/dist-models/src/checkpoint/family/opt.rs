//! OPT: positions that begin at row two, post-norm and embedding projections in its 350M model.

use dist_core::{BlockSpec, DType, ModelConfig, NormPosition};

use super::{Family, Fields, nk};

pub(super) const FAMILY: Family = Family {
    name: "opt",
    prefixes: &["model.decoder.", "decoder.", "model."],
    layer: "layers",
    in_layer: &[
        nk("norm1", &["self_attn_layer_norm"]),
        nk("attn.qkv", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        nk("attn.proj", &["self_attn.out_proj"]),
        nk("norm2", &["final_layer_norm"]),
        nk("mlp.fc1", &["fc1"]),
        nk("mlp.fc2", &["fc2"]),
    ],
    whole: &[
        nk("embed.tokens", &["embed_tokens"]),
        nk("embed.positions", &["embed_positions"]),
        nk("embed.project_in", &["project_in"]),
        nk("final_norm", &["final_layer_norm"]),
        nk("head.project_out", &["project_out"]),
        nk("head", &["lm_head"]),
    ],
    masks: &[],
    read,
};

fn read(fields: &mut Fields) -> ModelConfig {
    let heads = &["num_attention_heads"];
    let d_model = fields.size(&["hidden_size"]);
    let n_heads = fields.size(heads);
    let n_layers = fields.layers(&["num_hidden_layers"]);
    let is_pre = fields.flag("do_layer_norm_before", true);
    let has_bias = fields.flag("enable_bias", true);
    fields.only("layer_norm_elementwise_affine", true);
    ModelConfig {
        name: String::new(),
        n_layers,
        d_model,
        d_embed: fields.size_or(&["word_embed_proj_dim"], Some(d_model)),
        n_heads,
        n_kv_heads: n_heads,
        d_head: fields.d_head(heads, d_model, n_heads),
        d_ff: fields.size(&["ffn_dim"]),
        n_ctx: fields.size(&["max_position_embeddings"]),
        n_vocab: fields.size(&["vocab_size"]),
        position_offset: 2,
        block: BlockSpec {
            norm_position: if is_pre { NormPosition::Pre } else { NormPosition::Post },
            norm_eps: 1e-5, // OPT has no field for it.
            activation: fields.activation("relu"),
            scale_attn: true,
            scale_attn_by_inverse_layer_idx: false,
            qkv_bias: has_bias,
            out_bias: has_bias,
        },
        windows: vec![None; n_layers],
        final_norm: is_pre && !fields.flag("_remove_final_layer_norm", false),
        tied_head: fields.flag("tie_word_embeddings", true),
        bos_id: None,
        eos_ids: Vec::new(),
        weight_dtype: DType::F32,
    }
}
