//! Every activation and every input array of a step, taken once at the size of the largest step.

use dist_core::plan::Plan;
use dist_core::shape::div_ceil;
use dist_core::{DType, ModelConfig, Rank};
use dist_kernels::{Backend, KernelError};

use crate::decoder::local_widths;
use crate::step::StepBatch;

pub(crate) use dist_core::plan::MAX_TOP;

/// The sizes of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepShape {
    /// Number of the step, for attribution.
    pub(crate) number: u64,
    /// Rows.
    pub(crate) rows: usize,
    /// Rows of the sequence that has most.
    pub(crate) max_rows: usize,
    /// Sequences.
    pub(crate) n_seqs: usize,
    /// Width of the block tables.
    pub(crate) max_blocks: usize,
    /// Rows whose logits are wanted.
    pub(crate) n_logits: usize,
}

impl StepShape {
    /// The sizes of `batch`.
    pub(crate) fn of(batch: &StepBatch) -> Self {
        Self {
            number: batch.step,
            rows: batch.rows(),
            max_rows: batch.q_offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0),
            n_seqs: batch.n_seqs(),
            max_blocks: batch.max_blocks as usize,
            n_logits: batch.samples.len(),
        }
    }
}

/// Buffers of a step. `R` rows, `S` sequences, `L` rows with logits, at most.
#[derive(Debug)]
pub(crate) struct Workspace<B: Backend> {
    /// u32 `[R]`.
    pub(crate) ids: B::Buf,
    /// u32 `[R]`.
    pub(crate) positions: B::Buf,
    /// i32 `[R]`.
    pub(crate) slots: B::Buf,
    /// u32 `[S + 1]`.
    pub(crate) q_offsets: B::Buf,
    /// u32 `[S]`.
    pub(crate) context_lens: B::Buf,
    /// u32 `[S, max_blocks]`.
    pub(crate) block_tables: B::Buf,
    /// u32 `[L]`.
    pub(crate) logit_rows: B::Buf,
    /// The residual stream, `[R, d_model]`.
    pub(crate) hidden: B::Buf,
    /// `[R, d_model]`.
    pub(crate) normed: B::Buf,
    /// Token embeddings before their projection, `[R, d_embed]`; empty where there is none.
    pub(crate) embedded: B::Buf,
    /// `[R, (h + 2 kv) · d_head]`.
    pub(crate) qkv: B::Buf,
    /// `[R, h · d_head]`.
    pub(crate) heads: B::Buf,
    /// `[R, d_model]`.
    pub(crate) delta: B::Buf,
    /// `[R, d_ff]`.
    pub(crate) ff: B::Buf,
    /// `[L, d_model]`.
    pub(crate) selected: B::Buf,
    /// `[L, d_embed]`; empty where there is no projection.
    pub(crate) projected: B::Buf,
    /// f32 `[L, vocabulary part]`.
    pub(crate) logits: B::Buf,
    /// f32 `[ranks, L, vocabulary part]`; empty on one rank.
    pub(crate) gathered: B::Buf,
    /// f32 `[L, whole vocabulary]`; empty on one rank.
    pub(crate) whole: B::Buf,
    /// u32 `[L · ranks]`: brings `gathered` into the order of `whole`.
    pub(crate) gather_order: B::Buf,
    /// u32 `[L]`.
    pub(crate) drawn: B::Buf,
    /// f32 `[L]`.
    pub(crate) logprobs: B::Buf,
    /// u32 `[L, MAX_TOP]`.
    pub(crate) top_ids: B::Buf,
    /// f32 `[L, MAX_TOP]`.
    pub(crate) top_logprobs: B::Buf,
}

impl<B: Backend> Workspace<B> {
    /// Takes everything at once.
    pub(crate) fn new(
        backend: &mut B,
        config: &ModelConfig,
        plan: &Plan,
        rank: Rank,
    ) -> Result<Self, KernelError> {
        let limits = plan.limits;
        let (r, s, l, tp) = (limits.max_batch_tokens, limits.max_seqs, limits.max_sample_rows, plan.mesh.tp);
        let max_blocks = div_ceil(limits.max_seq_len, plan.kv.block_size);
        let (d_qkv, d_heads) = local_widths(config, plan.n_heads_local(rank), plan.n_kv_heads_local(rank));
        let vocab_local = div_ceil(config.n_vocab, tp);
        let d_proj = if config.d_embed == config.d_model { 0 } else { config.d_embed };
        let several = usize::from(tp > 1);
        let d_ff_local = div_ceil(config.d_ff, tp);
        let mut take = |what: &str, dtype, len| backend.alloc(what, dtype, len);
        let act = plan.act_dtype;
        Ok(Self {
            ids: take("token ids", DType::U32, r)?,
            positions: take("positions", DType::U32, r)?,
            slots: take("cache slots", DType::I32, r)?,
            q_offsets: take("row offsets", DType::U32, s + 1)?,
            context_lens: take("context lengths", DType::U32, s)?,
            block_tables: take("block tables", DType::U32, s * max_blocks)?,
            logit_rows: take("sampled rows", DType::U32, l)?,
            hidden: take("residual stream", act, r * config.d_model)?,
            normed: take("normalised rows", act, r * config.d_model)?,
            embedded: take("narrow embeddings", act, r * d_proj)?,
            qkv: take("queries, keys, values", act, r * d_qkv)?,
            heads: take("attention heads", act, r * d_heads)?,
            delta: take("block output", act, r * config.d_model)?,
            ff: take("feed-forward rows", act, r * d_ff_local)?,
            selected: take("sampled rows", act, l * config.d_model)?,
            projected: take("projected rows", act, l * d_proj)?,
            logits: take("logits", DType::F32, l * vocab_local)?,
            gathered: take("gathered logits", DType::F32, several * l * vocab_local * tp)?,
            whole: take("whole logits", DType::F32, several * l * vocab_local * tp)?,
            gather_order: take("order of gathered logits", DType::U32, several * l * tp)?,
            drawn: take("drawn tokens", DType::U32, l)?,
            logprobs: take("log-probabilities", DType::F32, l)?,
            top_ids: take("likeliest tokens", DType::U32, l * MAX_TOP)?,
            top_logprobs: take("their log-probabilities", DType::F32, l * MAX_TOP)?,
        })
    }
}
