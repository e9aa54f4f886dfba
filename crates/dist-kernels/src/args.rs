//! What each step takes: one struct a step, all dimensions in it, and a `check` that every backend calls first.
//!
//! The checks run in release builds: ten calls a layer are nothing beside the work. Rows count tokens of the step.

mod check;

pub use dist_core::Activation;
use dist_core::KvLayout;
pub use dist_core::plan::K_SEGMENTS;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::weight::Weight;

/// A normalisation over the last dimension.
#[derive(Debug)]
pub enum Norm<'a, B: Backend> {
    /// `x` as it is.
    None,
    /// `(x − mean) / √(variance + eps) · weight + bias`.
    Layer {
        /// `[d]`.
        weight: &'a B::Buf,
        /// `[d]`.
        bias: &'a B::Buf,
        /// Added to the variance.
        eps: f32,
    },
    /// `x / √(mean(x²) + eps) · weight`.
    Rms {
        /// `[d]`.
        weight: &'a B::Buf,
        /// Added to the mean square.
        eps: f32,
    },
}

/// One table of `embed`.
#[derive(Debug)]
pub struct Lookup<'a, B: Backend> {
    /// Row numbers before `offset`, u32 `[rows]`.
    pub ids: &'a B::Buf,
    /// `[n, d]` in `Nk`.
    pub table: &'a Weight<B::Buf>,
    /// Added to every id (OPT's positions start at 2).
    pub offset: u32,
    /// The id of the table's first row: rows that another rank holds contribute zero.
    pub first: u32,
}

/// Arguments of [`Backend::embed`].
#[derive(Debug)]
pub struct EmbedArgs<'a, B: Backend> {
    /// `[rows, d]`.
    pub out: &'a mut B::Buf,
    /// Tokens of the step.
    pub rows: usize,
    /// Width of the tables.
    pub d: usize,
    /// The token table; `None` adds to what `out` holds.
    pub tokens: Option<Lookup<'a, B>>,
    /// The position table, added.
    pub positions: Option<Lookup<'a, B>>,
    /// What was drawn before, u32: a token id with [`DRAWN`] set is, without it, a place in here.
    pub drawn: Option<&'a B::Buf>,
}

/// Marks a token id as a place among the tokens that were drawn last, which the host need not have seen.
pub const DRAWN: u32 = 1 << 31;

/// The keys and values of one layer: `[n_blocks, n_kv_heads_local, block_size, d_head]` each.
#[derive(Debug)]
pub struct KvLayer<Buf> {
    /// Keys.
    pub k: Buf,
    /// Values.
    pub v: Buf,
}

/// Stores the k and v columns of a fused q|k|v output into the cache.
#[derive(Debug)]
pub struct AppendKv<'a, B: Backend> {
    /// The layer's cache.
    pub kv: &'a mut KvLayer<B::Buf>,
    /// Its geometry.
    pub layout: KvLayout,
    /// Slot of each row, i32 `[rows]`; negative: compute the row, do not store it.
    pub slots: &'a B::Buf,
}

/// What `linear` does with its sums before it stores them.
#[derive(Debug)]
pub enum Then<'a, B: Backend> {
    /// Nothing.
    Store,
    /// Applies a function.
    Activate(Activation),
    /// Also appends keys and values to the cache; the output is `q | k | v`.
    AppendKv(AppendKv<'a, B>),
}

/// What happens to `linear`'s sums on their way out: bias first.
#[derive(Debug)]
pub struct Epilogue<'a, B: Backend> {
    /// `[n]`, added to every row.
    pub bias: Option<&'a B::Buf>,
    /// After the bias.
    pub then: Then<'a, B>,
}

/// What happens to `x` on its way into `linear`.
#[derive(Debug)]
pub enum Prologue<'a, B: Backend> {
    /// Nothing.
    None,
    /// Normalises every row first.
    Norm(Norm<'a, B>),
}

/// A product that steps will ask for.
#[derive(Debug)]
pub struct Product<'a, B: Backend> {
    /// What is multiplied by.
    pub weight: &'a Weight<B::Buf>,
    /// Whether a bias is added.
    pub has_bias: bool,
    /// What is done to the sums.
    pub activation: Option<Activation>,
    /// Whether the sums are logits, which are `f32`.
    pub is_head: bool,
}

/// Arguments of [`Backend::linear`]: `out[r, j] = Σ_i x[r, i] · weight[j, i]`.
#[derive(Debug)]
pub struct LinearArgs<'a, B: Backend> {
    /// `[rows, n]`.
    pub out: &'a mut B::Buf,
    /// `[rows, k]`.
    pub x: &'a B::Buf,
    /// `n` outputs, `k` inputs.
    pub weight: &'a Weight<B::Buf>,
    /// Tokens of the step.
    pub rows: usize,
    /// Segments of `k` in the canonical order: [`K_SEGMENTS`] for a whole `k`, that over the degree for a rank's part.
    pub k_segments: usize,
    /// On the way in.
    pub prologue: Prologue<'a, B>,
    /// On the way out.
    pub epilogue: Epilogue<'a, B>,
}

/// Which sequence owns which rows of the step, and where its cache blocks are.
#[derive(Debug)]
pub struct Ragged<'a, B: Backend> {
    /// Sequences of the step.
    pub n_seqs: usize,
    /// Rows of the step.
    pub rows: usize,
    /// Rows of the sequence that has most; 1 where all decode.
    pub max_rows: usize,
    /// First row of each sequence, u32 `[n_seqs + 1]`.
    pub q_offsets: &'a B::Buf,
    /// Tokens of each sequence in the cache including this step's, u32 `[n_seqs]`.
    pub context_lens: &'a B::Buf,
    /// Block numbers, u32 `[n_seqs, max_blocks]`.
    pub block_tables: &'a B::Buf,
    /// Width of `block_tables`.
    pub max_blocks: usize,
}

/// Arguments of [`Backend::attention`].
///
/// Row `r` of a sequence with `q` rows and context `c` stands at position `c − q + r` and sees the positions up to
/// its own, at most `window` of them. Keys and values of the step's own rows are in the cache already.
#[derive(Debug)]
pub struct AttentionArgs<'a, B: Backend> {
    /// `[rows, n_heads_local · d_head]`.
    pub out: &'a mut B::Buf,
    /// `q | k | v`, `[rows, (n_heads_local + 2 · n_kv_heads_local) · d_head]`; only q is read.
    pub qkv: &'a B::Buf,
    /// The layer's cache.
    pub kv: &'a KvLayer<B::Buf>,
    /// Its geometry.
    pub layout: KvLayout,
    /// Query heads of this rank, a multiple of its KV heads.
    pub n_heads_local: usize,
    /// Multiplies q · k.
    pub scale: f32,
    /// Positions that a row sees, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// The sequences.
    pub seqs: Ragged<'a, B>,
}

/// What the residual stream holds after [`Backend::add_bias_norm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// The sum: pre-norm models.
    Sum,
    /// The normalised sum: post-norm models.
    Normed,
}

/// Arguments of [`Backend::add_bias_norm`].
#[derive(Debug)]
pub struct AddBiasNormArgs<'a, B: Backend> {
    /// `[rows, d]`.
    pub normed: &'a mut B::Buf,
    /// `[rows, d]`, read and written.
    pub residual: &'a mut B::Buf,
    /// `[rows, d]`, added to the residual.
    pub delta: Option<&'a B::Buf>,
    /// `[d]`, added to the residual.
    pub bias: Option<&'a B::Buf>,
    /// The norm.
    pub norm: Norm<'a, B>,
    /// What `residual` holds afterwards.
    pub keep: Residual,
    /// Tokens of the step.
    pub rows: usize,
    /// Width.
    pub d: usize,
}

/// Arguments of [`Backend::add_bias`].
#[derive(Debug)]
pub struct AddBiasArgs<'a, B: Backend> {
    /// `[rows, n]`, read and written.
    pub x: &'a mut B::Buf,
    /// `[n]`.
    pub bias: &'a B::Buf,
    /// Rows.
    pub rows: usize,
    /// Width.
    pub n: usize,
}

/// Arguments of [`Backend::gather_rows`].
#[derive(Debug)]
pub struct GatherRowsArgs<'a, B: Backend> {
    /// `[n_out, d]`.
    pub out: &'a mut B::Buf,
    /// `[rows, d]`.
    pub x: &'a B::Buf,
    /// Row numbers, u32 `[n_out]`, each below `rows`.
    pub indices: &'a B::Buf,
    /// Rows out.
    pub n_out: usize,
    /// Rows in.
    pub rows: usize,
    /// Width.
    pub d: usize,
}

/// Arguments of [`Backend::logits`].
#[derive(Debug)]
pub struct LogitsArgs<'a, B: Backend> {
    /// f32 `[rows, n]`, `n` being the head's outputs (this rank's part of the vocabulary).
    pub out: &'a mut B::Buf,
    /// `[rows, k]`.
    pub x: &'a B::Buf,
    /// The output head.
    pub head: &'a Weight<B::Buf>,
    /// Rows.
    pub rows: usize,
}

/// How one row is sampled. Penalties and biases are applied in the order of the fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRow {
    /// Scores this token instead of drawing one.
    pub target: Option<u32>,
    /// Times that each token stands in the prompt and in the output so far; empty if no penalty needs them.
    pub counts: Vec<TokenCount>,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off (CTRL paper).
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens that must not be drawn (stop tokens before the minimum length).
    pub banned: Vec<u32>,
    /// Divides the logits; 0 is greedy (the lowest id among equals).
    pub temperature: f32,
    /// Keeps the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keeps the likeliest tokens until their sum reaches p; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Philox key of the request.
    pub seed: u64,
    /// Which of the request's samples.
    pub sample_idx: u32,
    /// Position of the token that is drawn.
    pub position: u32,
}

/// Occurrences of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCount {
    /// The token.
    pub id: u32,
    /// Times in the prompt.
    pub n_prompt: u32,
    /// Times in the output.
    pub n_output: u32,
}

/// Arguments of [`Backend::sample`].
///
/// Log-probabilities are those of the model, before penalties, bias and temperature.
#[derive(Debug)]
pub struct SampleArgs<'a, B: Backend> {
    /// f32 `[rows.len(), vocab]`; may be overwritten.
    pub logits: &'a mut B::Buf,
    /// Tokens to choose from; further columns are padding.
    pub n_vocab: usize,
    /// Elements from one row of logits to the next.
    pub ld: usize,
    /// One a row.
    pub rows: &'a [SampleRow],
    /// Chosen tokens, u32 `[rows.len()]`.
    pub ids: &'a mut B::Buf,
    /// Their log-probabilities, f32 `[rows.len()]`.
    pub logprobs: &'a mut B::Buf,
    /// How many of the likeliest tokens are reported a row.
    pub n_top: usize,
    /// The likeliest tokens, best first, lowest id first among equals; u32 `[rows.len(), n_top]`.
    pub top_ids: &'a mut B::Buf,
    /// Their log-probabilities, f32 `[rows.len(), n_top]`.
    pub top_logprobs: &'a mut B::Buf,
}
