//! Geometry of the paged KV cache as a value: who needs a stride asks here instead of multiplying.

use serde::{Deserialize, Serialize};

use crate::DType;

/// Shape of one rank's part of the paged KV cache.
///
/// Keys and values of a layer are two arrays `[n_blocks, n_kv_heads_local, block_size, d_head]`. Slot `s` is
/// position `s % block_size` of block `s / block_size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvLayout {
    /// Layers of this rank's pipeline stage.
    pub n_layers_local: usize,
    /// KV heads of this rank.
    pub n_kv_heads_local: usize,
    /// Elements of one head.
    pub d_head: usize,
    /// Type in which keys and values are kept.
    pub dtype: DType,
    /// Tokens of one block.
    pub block_size: usize,
}

impl KvLayout {
    /// Bytes of keys and values of one token over all local layers.
    #[must_use]
    pub const fn bytes_per_token(self) -> usize {
        2 * self.n_layers_local * self.n_kv_heads_local * self.d_head * self.dtype.bytes()
    }

    /// Bytes of keys and values of one block over all local layers.
    #[must_use]
    pub const fn bytes_per_block(self) -> usize {
        self.bytes_per_token() * self.block_size
    }

    /// Elements of one block of one layer's keys (or values).
    #[must_use]
    pub const fn block_len(self) -> usize {
        self.n_kv_heads_local * self.block_size * self.d_head
    }

    /// Index of the first element of (`slot`, `head`) in one layer's keys (or values).
    #[must_use]
    pub const fn at(self, slot: usize, head: usize) -> usize {
        let (block, offset) = (slot / self.block_size, slot % self.block_size);
        ((block * self.n_kv_heads_local + head) * self.block_size + offset) * self.d_head
    }
}
