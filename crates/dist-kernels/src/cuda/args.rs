//! The kernels' arguments, field by field as the `.cu` files declare them: each is one struct passed by value.
//!
//! Pointers are device addresses; zero stands for none. Padding is a field, so that every struct is plain bytes.

use bytemuck::{Pod, Zeroable};

/// A device address.
pub(super) type Address = u64;

/// `LinearArgs` of `linear.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct LinearParams {
    pub(super) out: Address,
    pub(super) x: Address,
    pub(super) weight: Address,
    pub(super) bias: Address,
    pub(super) k_cache: Address,
    pub(super) v_cache: Address,
    pub(super) slots: Address,
    pub(super) rows: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) ld_weight: i32,
    pub(super) units: i32,
    pub(super) activation: i32,
    pub(super) out_f32: i32,
    pub(super) n_kv_heads: i32,
    pub(super) block_size: i32,
    pub(super) d_head: i32,
}

/// `GemmArgs` of `gemm_hopper.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct GemmParams {
    pub(super) linear: LinearParams,
    pub(super) rows_of_cluster: i32,
    pub(super) columns_of_cluster: i32,
    pub(super) splits: i32,
    pub(super) group: i32,
    pub(super) spread: i32,
    pub(super) padding: i32,
}

/// `PrefillArgs` of `attention_prefill.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct PrefillParams {
    pub(super) out: Address,
    pub(super) qkv: Address,
    pub(super) k: Address,
    pub(super) v: Address,
    pub(super) q_offsets: Address,
    pub(super) context_lens: Address,
    pub(super) block_tables: Address,
    pub(super) max_blocks: i32,
    pub(super) ld_qkv: i32,
    pub(super) n_heads: i32,
    pub(super) n_kv_heads: i32,
    pub(super) block_size: i32,
    pub(super) window: i32,
    pub(super) scale: f32,
    pub(super) n_seqs: i32,
    pub(super) next: Address,
    pub(super) box_rows: i32,
    pub(super) padding: i32,
}

/// `AttentionArgs` of `attention_decode.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct AttentionParams {
    pub(super) out: Address,
    pub(super) qkv: Address,
    pub(super) k: Address,
    pub(super) v: Address,
    pub(super) q_offsets: Address,
    pub(super) context_lens: Address,
    pub(super) block_tables: Address,
    pub(super) max_blocks: i32,
    pub(super) ld_qkv: i32,
    pub(super) n_heads: i32,
    pub(super) n_kv_heads: i32,
    pub(super) block_size: i32,
    pub(super) window: i32,
    pub(super) scale: f32,
    pub(super) padding: i32,
    pub(super) partials: Address,
    pub(super) counters: Address,
}

/// `NormArgs` of `norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct NormParams {
    pub(super) normed: Address,
    pub(super) residual: Address,
    pub(super) delta: Address,
    pub(super) bias: Address,
    pub(super) weight: Address,
    pub(super) norm_bias: Address,
    pub(super) d: i32,
    pub(super) keep_normed: i32,
    pub(super) eps: f32,
    pub(super) padding: i32,
}

/// `EmbedTable` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct EmbedTable {
    pub(super) ids: Address,
    pub(super) table: Address,
    pub(super) offset: u32,
    pub(super) first: u32,
    pub(super) n: u32,
    pub(super) ld: i32,
}

/// `EmbedArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct EmbedParams {
    pub(super) out: Address,
    pub(super) tokens: EmbedTable,
    pub(super) positions: EmbedTable,
    pub(super) drawn: Address,
    pub(super) d: i32,
    pub(super) padding: i32,
}

/// A piece of `CopyArgs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct CopyPiece {
    pub(super) from: Address,
    pub(super) to: Address,
    pub(super) n_words: u64,
}

/// Pieces that one launch of `copy_pieces` takes.
pub(super) const COPY_PIECES: usize = 16;

/// `CopyArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct CopyParams {
    pub(super) pieces: [CopyPiece; COPY_PIECES],
}

/// `GatherArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct GatherParams {
    pub(super) out: Address,
    pub(super) x: Address,
    pub(super) indices: Address,
    pub(super) d: i32,
    pub(super) padding: i32,
}

/// `AddBiasArgs` of `rows.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct AddBiasParams {
    pub(super) x: Address,
    pub(super) bias: Address,
    pub(super) n: i32,
    pub(super) padding: i32,
}

/// `ReadArgs` of `read.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct ReadParams {
    pub(super) from: Address,
    pub(super) n: u64,
    pub(super) found: Address,
    pub(super) never: u32,
    pub(super) padding: u32,
}

/// `SampleArgs` of `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct SampleParams {
    pub(super) logits: Address,
    pub(super) ld: i64,
    pub(super) rows: Address,
    pub(super) partials: Address,
    pub(super) tickets: Address,
    pub(super) ids: Address,
    pub(super) logprobs: Address,
    pub(super) top_ids: Address,
    pub(super) top_logprobs: Address,
    pub(super) n_vocab: i32,
    pub(super) n_top: i32,
}

/// `AttentionAnyArgs` of `attention_any.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct AttentionAnyParams {
    pub(super) out: Address,
    pub(super) qkv: Address,
    pub(super) k: Address,
    pub(super) v: Address,
    pub(super) q_offsets: Address,
    pub(super) context_lens: Address,
    pub(super) block_tables: Address,
    pub(super) n_seqs: i32,
    pub(super) max_blocks: i32,
    pub(super) ld_qkv: i32,
    pub(super) n_heads: i32,
    pub(super) n_kv_heads: i32,
    pub(super) d_head: i32,
    pub(super) block_size: i32,
    pub(super) window: i32,
    pub(super) scale: f32,
    pub(super) padding: i32,
}
