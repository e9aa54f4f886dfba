//! The shape of a decoder as one immutable value; where it was read from is the business of others.

use serde::{Deserialize, Serialize};

use crate::DType;

/// A function applied to each element between the two linear layers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`: GPT-2's `gelu_new`.
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))`.
    GeluErf,
    /// `max(x, 0)`.
    Relu,
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPosition {
    /// Before attention and before the feed-forward part: GPT-2, GPT-3.
    Pre,
    /// After each residual addition: OPT-350M.
    Post,
}

/// What a block is made of, the same for every layer.
#[expect(clippy::struct_excessive_bools, reason = "four independent properties of published models")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// Where it normalises.
    pub norm_position: NormPosition,
    /// Added to the variance.
    pub norm_eps: f32,
    /// Between the two linear layers.
    pub activation: Activation,
    /// Whether q · k is divided by √`d_head` (GPT-Neo does not).
    pub scale_attn: bool,
    /// Whether q · k is divided by the layer's number from one as well.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Whether q, k and v have biases (GPT-Neo's have none).
    pub qkv_bias: bool,
    /// Whether the attention's output projection and the feed-forward layers have biases.
    pub out_bias: bool,
}

/// A decoder-only transformer of the GPT-3 family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Name for people: a preset, a directory, a published model.
    pub name: String,
    /// Layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the token embedding; other than `d_model` where projections join them (OPT-350M).
    pub d_embed: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads, a divisor of `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// Width between the two linear layers of a block.
    pub d_ff: usize,
    /// Longest sequence that the model knows positions for.
    pub n_ctx: usize,
    /// Tokens.
    pub n_vocab: usize,
    /// Rows of the position table before position zero (2 for OPT).
    pub position_offset: usize,
    /// The blocks.
    pub block: BlockSpec,
    /// Positions that each layer's attention sees, its own included; `None`: all before it.
    pub windows: Vec<Option<usize>>,
    /// Whether a norm stands between the last block and the head.
    pub final_norm: bool,
    /// Whether the head is the token embedding.
    pub tied_head: bool,
    /// Token that begins a text, if the model has one.
    pub bos_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_ids: Vec<u32>,
    /// Type in which the weights are stored.
    pub weight_dtype: DType,
}

/// Bounds on what a configuration may ask for: far beyond any published model, far below an overflow.
const MAX_DIM: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;

/// A configuration that no model can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {found}: {expected}")]
pub struct ConfigError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub found: String,
    /// What it should be.
    pub expected: String,
}

impl ModelConfig {
    /// Checks every number against the others and against bounds; all that is wrong at once.
    pub fn check(&self) -> Result<(), Vec<ConfigError>> {
        let mut errors = Vec::new();
        let mut require = |ok: bool, field, found: String, expected: &str| {
            if !ok {
                errors.push(ConfigError { field, found, expected: expected.to_owned() });
            }
        };
        let dims = [
            ("d_model", self.d_model),
            ("d_embed", self.d_embed),
            ("n_heads", self.n_heads),
            ("n_kv_heads", self.n_kv_heads),
            ("d_head", self.d_head),
            ("d_ff", self.d_ff),
            ("n_ctx", self.n_ctx),
            ("n_vocab", self.n_vocab),
        ];
        for (field, value) in dims {
            require((1..=MAX_DIM).contains(&value), field, value.to_string(), "must be 1 to 16777216");
        }
        let layers_ok = (1..=MAX_LAYERS).contains(&self.n_layers);
        require(layers_ok, "n_layers", self.n_layers.to_string(), "must be 1 to 4096");
        let divides = self.n_kv_heads != 0 && self.n_heads.is_multiple_of(self.n_kv_heads);
        require(divides, "n_kv_heads", self.n_kv_heads.to_string(), "must divide n_heads");
        let eps = self.block.norm_eps;
        require(eps.is_finite() && eps > 0.0, "norm_eps", eps.to_string(), "must be a positive number");
        require(
            self.windows.len() == self.n_layers,
            "windows",
            self.windows.len().to_string(),
            "one a layer",
        );
        require(!self.windows.contains(&Some(0)), "windows", "0".into(), "must be at least 1");
        require(
            self.position_offset <= 1024,
            "position_offset",
            self.position_offset.to_string(),
            "at most 1024",
        );
        for id in self.bos_id.iter().chain(&self.eos_ids) {
            require((*id as usize) < self.n_vocab, "special token", id.to_string(), "must be below n_vocab");
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }

    /// What multiplies q · k in layer `layer` (counted from zero).
    #[must_use]
    pub fn attn_scale(&self, layer: usize) -> f32 {
        let head = if self.block.scale_attn { 1.0 / (self.d_head as f32).sqrt() } else { 1.0 };
        if self.block.scale_attn_by_inverse_layer_idx { head / (layer + 1) as f32 } else { head }
    }

    /// Parameters of the model, a tied head counted once.
    #[must_use]
    pub fn n_params(&self) -> u64 {
        crate::decoder_specs(self).iter().map(|spec| spec.n_elements() as u64).sum()
    }
}
