//! The pool and its tables: nothing leaks, nothing is given back twice, whatever the order of calls.

use dist_models::kv_blocks::{BlockId, BlockPool, BlockTable};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Call {
    Grow { table: usize, n_tokens: usize },
    Fork { from: usize, n_blocks: usize },
    Clear { table: usize },
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        3 => (0..8usize, 0..40usize).prop_map(|(table, n_tokens)| Call::Grow { table, n_tokens }),
        2 => (0..8usize, 0..6usize).prop_map(|(from, n_blocks)| Call::Fork { from, n_blocks }),
        1 => (0..8usize).prop_map(|table| Call::Clear { table }),
    ]
}

/// Every block is free or held by exactly as many tables as the pool says.
fn assert_accounted(pool: &BlockPool, tables: &[BlockTable]) {
    let mut n_held = 0;
    for id in (0..pool.n_blocks() as u32).map(BlockId) {
        let n_tables = tables.iter().filter(|table| table.blocks().contains(&id)).count();
        assert_eq!(n_tables, pool.n_holders(id) as usize, "holders of {id:?}");
        n_held += usize::from(n_tables > 0);
    }
    assert_eq!(pool.n_free(), pool.n_blocks() - n_held);
    for table in tables {
        let mut blocks = table.blocks().to_vec();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), table.blocks().len(), "a block stands twice in one table");
    }
}

fn apply(pool: &mut BlockPool, tables: &mut Vec<BlockTable>, call: &Call) {
    match *call {
        Call::Grow { table, n_tokens } => {
            let Some(table) = tables.get_mut(table) else { return };
            let (n_before, n_free) = (table.blocks().len(), pool.n_free());
            let n_after = n_before.max(pool.blocks_for(n_tokens));
            let has_room = table.grow(pool, n_tokens);
            assert_eq!(has_room, n_after - n_before <= n_free);
            assert_eq!(table.blocks().len(), if has_room { n_after } else { n_before }, "all or nothing");
        }
        Call::Fork { from, n_blocks } => {
            let Some(source) = tables.get(from) else { return };
            let n_blocks = n_blocks.min(source.blocks().len());
            let n_free = pool.n_free();
            let fork = source.fork(pool, n_blocks);
            assert_eq!(fork.blocks(), &source.blocks()[..n_blocks]);
            assert_eq!(pool.n_free(), n_free, "sharing takes nothing");
            tables.push(fork);
        }
        Call::Clear { table } => {
            if let Some(table) = tables.get_mut(table) {
                table.clear(pool);
            }
        }
    }
}

proptest! {
    #[test]
    fn every_block_is_accounted_for(n_blocks in 0..12usize, block_size in 1..5usize, calls in prop::collection::vec(call(), 0..60)) {
        let mut pool = BlockPool::new(n_blocks, block_size);
        let mut tables: Vec<BlockTable> = (0..3).map(|_| BlockTable::default()).collect();
        for call in &calls {
            apply(&mut pool, &mut tables, call);
            assert_accounted(&pool, &tables);
        }
        for table in &mut tables {
            table.clear(&mut pool);
        }
        prop_assert_eq!(pool.n_free(), n_blocks);
    }
}

#[test]
fn slots_follow_the_table() {
    let mut pool = BlockPool::new(4, 16);
    let (mut first, mut second) = (BlockTable::default(), BlockTable::default());
    assert!(first.grow(&mut pool, 16) && second.grow(&mut pool, 1) && first.grow(&mut pool, 17));
    let slots: Vec<i32> = [0, 15, 16].map(|position| first.slot(&pool, position)).to_vec();
    assert_eq!(slots, [0, 15, 32], "the second block of the first table comes after the other's");
    assert_eq!(second.slot(&pool, 0), 16);
}

#[test]
#[should_panic(expected = "a free block was given back")]
fn a_block_is_not_given_back_twice() {
    let mut pool = BlockPool::new(1, 16);
    let block = pool.take().unwrap();
    pool.give_back(block);
    pool.give_back(block);
}

#[test]
#[should_panic(expected = "a free block cannot be shared")]
fn a_free_block_is_not_shared() {
    BlockPool::new(1, 16).share(BlockId(0));
}
