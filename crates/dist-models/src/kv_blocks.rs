//! Which block of the paged KV cache belongs to whom: a pool that counts holders, and one table a sequence.
//!
//! Numbers only; the memory itself is the runner's. Misuse (a block given back twice) is our own bug and panics.

use dist_core::shape::div_ceil;

/// Number of a block within the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// All blocks of the cache: free ones, and how many tables hold each of the others.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    /// Last in, first out: the block that was used last is the likeliest to be in a processor's cache.
    free: Vec<BlockId>,
    n_holders: Vec<u32>,
}

impl BlockPool {
    /// `n_blocks` free blocks of `block_size` tokens.
    pub fn new(n_blocks: usize, block_size: usize) -> Self {
        assert!(block_size > 0, "a block holds tokens");
        let n_slots = n_blocks.checked_mul(block_size).and_then(|n| i32::try_from(n).ok());
        assert!(n_slots.is_some(), "slots are i32: {n_blocks} blocks of {block_size} tokens");
        let free = (0..n_blocks as u32).rev().map(BlockId).collect();
        Self { block_size, free, n_holders: vec![0; n_blocks] }
    }

    /// Tokens of one block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in all.
    pub fn n_blocks(&self) -> usize {
        self.n_holders.len()
    }

    /// Blocks that nobody holds.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Tables that hold the block.
    pub fn n_holders(&self, block: BlockId) -> u32 {
        self.n_holders[block.0 as usize]
    }

    /// Blocks that `n_tokens` tokens fill, the last one perhaps in part.
    pub fn blocks_for(&self, n_tokens: usize) -> usize {
        div_ceil(n_tokens, self.block_size)
    }

    /// A free block, now held once.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.n_holders[block.0 as usize] = 1;
        Some(block)
    }

    /// Holds a block once more; somebody holds it already.
    pub fn share(&mut self, block: BlockId) {
        let n_holders = &mut self.n_holders[block.0 as usize];
        assert!(*n_holders > 0, "a free block cannot be shared: {}", block.0);
        *n_holders += 1;
    }

    /// Holds a block once less; the last holder frees it.
    pub fn give_back(&mut self, block: BlockId) {
        let n_holders = &mut self.n_holders[block.0 as usize];
        assert!(*n_holders > 0, "a free block was given back: {}", block.0);
        *n_holders -= 1;
        if *n_holders == 0 {
            self.free.push(block);
        }
    }
}

/// The blocks of one sequence, in order of positions. Not `Clone`: a second holder goes through [`fork`](Self::fork).
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// The blocks in order of positions.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Makes room for `n_tokens` tokens in all, or takes nothing and says so.
    #[must_use]
    pub fn grow(&mut self, pool: &mut BlockPool, n_tokens: usize) -> bool {
        let n_more = pool.blocks_for(n_tokens).saturating_sub(self.blocks.len());
        if n_more > pool.n_free() {
            return false;
        }
        self.blocks.extend((0..n_more).map_while(|_| pool.take()));
        true
    }

    /// A second table over the first `n_blocks` blocks. Both may read them, neither may write there again.
    #[must_use]
    pub fn fork(&self, pool: &mut BlockPool, n_blocks: usize) -> Self {
        let blocks = self.blocks[..n_blocks].to_vec();
        for &block in &blocks {
            pool.share(block);
        }
        Self { blocks }
    }

    /// Gives every block back; those that no other table holds become free.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        // From the end, so that the pool hands them out again in the order in which they were taken.
        for block in self.blocks.drain(..).rev() {
            pool.give_back(block);
        }
    }

    /// Place of `position` in the cache.
    pub fn slot(&self, pool: &BlockPool, position: usize) -> i32 {
        let (block, offset) = (self.blocks[position / pool.block_size], position % pool.block_size);
        (block.0 as usize * pool.block_size + offset) as i32
    }
}
