//! Models by name: the GPT-3 paper's table 2.1 and `PaddleFleetX`'s GPT configurations.
//!
//! Where the paper's heads × head size do not make `d_model`, 1.3B takes 32 heads of 64 at 2048 and 13B takes
//! 40 heads of 128 at 5120 (`PaddleFleetX` and Cerebras-GPT do likewise).

use crate::DType;
use crate::config::{Activation, BlockSpec, ModelConfig, NormPosition};

/// name, layers, width, heads, vocabulary, positions.
type Row = (&'static str, usize, usize, usize, usize, usize);

const PRESETS: [Row; 13] = [
    ("gpt3-125m", 12, 768, 12, 50257, 2048),
    ("gpt3-350m", 24, 1024, 16, 50257, 2048),
    ("gpt3-760m", 24, 1536, 16, 50257, 2048),
    ("gpt3-1.3b", 24, 2048, 32, 50257, 2048),
    ("gpt3-2.7b", 32, 2560, 32, 50257, 2048),
    ("gpt3-6.7b", 32, 4096, 32, 50257, 2048),
    ("gpt3-13b", 40, 5120, 40, 50257, 2048),
    ("gpt3-175b", 96, 12288, 96, 50257, 2048),
    ("fleetx-345m", 24, 1024, 16, 50304, 1024),
    ("fleetx-1.3b", 24, 2048, 16, 50304, 1024),
    ("fleetx-6.7b", 32, 4096, 32, 50304, 1024),
    ("fleetx-13b", 40, 5120, 40, 50432, 4096),
    ("fleetx-175b", 96, 12288, 96, 51200, 1024),
];

/// All preset names.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|row| row.0)
}

/// The preset of this name, with bf16 weights. `window` makes every second layer locally banded, the first one dense.
#[must_use]
pub fn preset(name: &str, window: Option<usize>) -> Option<ModelConfig> {
    let &(name, n_layers, d_model, n_heads, n_vocab, n_ctx) = PRESETS.iter().find(|row| row.0 == name)?;
    Some(ModelConfig {
        name: name.to_owned(),
        n_layers,
        d_model,
        d_embed: d_model,
        n_heads,
        n_kv_heads: n_heads,
        d_head: d_model / n_heads,
        d_ff: 4 * d_model,
        n_ctx,
        n_vocab,
        position_offset: 0,
        block: BlockSpec {
            norm_position: NormPosition::Pre,
            norm_eps: 1e-5,
            activation: Activation::GeluTanh,
            scale_attn: true,
            scale_attn_by_inverse_layer_idx: false,
            qkv_bias: true,
            out_bias: true,
        },
        windows: (0..n_layers).map(|layer| window.filter(|_| layer % 2 == 1)).collect(),
        final_norm: true,
        tied_head: true,
        bos_id: None,
        eos_ids: Vec::new(),
        weight_dtype: DType::BF16,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_a_model_of_the_size_in_its_name() {
        for name in names() {
            let config = preset(name, None).expect("listed");
            config.check().expect("sound");
            let (_, size) = name.split_once('-').expect("family-size");
            let unit = if size.ends_with('b') { 1e9 } else { 1e6 };
            let said: f64 = size[..size.len() - 1].parse::<f64>().expect("a number") * unit;
            let off = (config.n_params() as f64 / said - 1.0).abs();
            assert!(off < 0.04, "{name} has {} parameters", config.n_params());
        }
    }

    #[test]
    fn a_window_bands_every_second_layer() {
        let config = preset("gpt3-125m", Some(256)).expect("listed");
        assert_eq!(config.windows[..4], [None, Some(256), None, Some(256)]);
    }
}
