//! Causal attention over the paged KV cache: which rows and heads make a tile, and the memory of the threads.
//!
//! A query entry is one (row, head). Its result depends on its query, on the keys and values by absolute position, on
//! scale and window, and on nothing else: tiles only share what is read.

use dist_core::shape::{align_up, div_ceil};
use dist_core::{DType, KvLayout};

use super::attention_tile::{CHUNK, MAX_ENTRIES, Pages, Tile, TileScratch};
use super::buf::CpuBuf;
use super::pool::{Disjoint, Pool};
use super::simd::{CpuKernels, StoredBf16, StoredF16, StoredF32};
use crate::args::AttentionArgs;
use crate::backend::Backend;

/// Memory of all threads; it grows to the longest context that the block tables can hold.
pub(crate) struct AttentionScratch {
    threads: Vec<TileScratch>,
    row_tiles: Vec<RowTile>,
}

impl AttentionScratch {
    /// Takes nothing yet.
    pub(crate) fn new(n_threads: usize) -> Self {
        let threads = (0..n_threads).map(|_| TileScratch::default()).collect();
        Self { threads, row_tiles: Vec::new() }
    }
}

/// Consecutive rows of one sequence.
#[derive(Clone, Copy)]
struct RowTile {
    seq: usize,
    /// First row in the step.
    row: usize,
    n_rows: usize,
    /// Position of the first row.
    position: usize,
}

/// How (rows × heads) are cut into tasks.
#[derive(Clone, Copy)]
struct Cut {
    /// Query heads that share a KV head.
    group: usize,
    heads_per_tile: usize,
    rows_per_tile: usize,
}

impl Cut {
    /// Large tiles read keys and values less often, small ones keep all threads busy.
    fn new(rows: usize, n_heads: usize, n_kv_heads: usize, n_threads: usize) -> Self {
        let group = n_heads / n_kv_heads;
        let entries = (rows * n_heads / (4 * n_threads)).clamp(1, MAX_ENTRIES);
        let heads_per_tile = group.min(entries);
        Self { group, heads_per_tile, rows_per_tile: entries / heads_per_tile }
    }

    fn tiles_per_group(self) -> usize {
        div_ceil(self.group, self.heads_per_tile)
    }
}

// kernel
/// Causal attention of the step's rows.
pub(crate) fn attention<B: Backend<Buf = CpuBuf>>(
    kernels: CpuKernels,
    pool: &Pool,
    scratch: &mut AttentionScratch,
    args: AttentionArgs<'_, B>,
) {
    let AttentionArgs { out, qkv, kv, layout, n_heads_local, scale, window, seqs } = args;
    let cut = Cut::new(seqs.rows, n_heads_local, layout.n_kv_heads_local, pool.n_threads());
    let context_lens = seqs.context_lens.slice::<u32>();
    let row_tiles = &mut scratch.row_tiles;
    cut_rows(row_tiles, cut.rows_per_tile, &seqs.q_offsets.slice::<u32>()[..=seqs.n_seqs], context_lens);
    let span = longest_span(seqs.max_blocks * layout.block_size, window);
    for thread in &mut scratch.threads {
        thread.reserve(layout.d_head, span);
    }
    let step = Step {
        kernels,
        qkv: qkv.f32s(),
        out: Disjoint::new(out.f32s_mut()),
        k: kv.k.bytes(),
        v: kv.v.bytes(),
        layout,
        n_heads_local,
        scale,
        window: window.unwrap_or(usize::MAX),
        tables: seqs.block_tables.slice(),
        max_blocks: seqs.max_blocks,
        cut,
    };
    let threads = Disjoint::new(&mut scratch.threads);
    let tiles_per_row_tile = layout.n_kv_heads_local * cut.tiles_per_group();
    // Later rows see more positions: the largest tasks go first.
    pool.run_with_thread(row_tiles.len() * tiles_per_row_tile, &|idx, thread| {
        let tile = row_tiles[row_tiles.len() - 1 - idx / tiles_per_row_tile];
        // SAFETY: the pool gives a number to one thread at a time, and a thread has one task at a time.
        let scratch = unsafe { &mut threads.piece(thread, 1)[0] };
        step.run(tile, idx % tiles_per_row_tile, scratch);
    });
}

/// Cuts the rows of each sequence into tiles of at most `rows_per_tile`.
fn cut_rows(tiles: &mut Vec<RowTile>, rows_per_tile: usize, q_offsets: &[u32], context_lens: &[u32]) {
    tiles.clear();
    for (seq, (bounds, &context)) in q_offsets.windows(2).zip(context_lens).enumerate() {
        let (start, end, context) = (bounds[0] as usize, bounds[1] as usize, context as usize);
        assert!(
            start <= end && end - start <= context,
            "attention: rows {start}..{end} in context {context}"
        );
        for row in (start..end).step_by(rows_per_tile) {
            let position = context - (end - row);
            tiles.push(RowTile { seq, row, n_rows: rows_per_tile.min(end - row), position });
        }
    }
}

/// Positions that the rows of a tile may see together, whole chunks.
fn longest_span(context: usize, window: Option<usize>) -> usize {
    let seen = window.map_or(context, |window| context.min(window.saturating_add(MAX_ENTRIES)));
    align_up(seen, CHUNK) + CHUNK
}

/// What all tasks of a call share.
struct Step<'a> {
    kernels: CpuKernels,
    qkv: &'a [f32],
    out: Disjoint<'a, f32>,
    k: &'a [u8],
    v: &'a [u8],
    layout: KvLayout,
    n_heads_local: usize,
    scale: f32,
    window: usize,
    tables: &'a [u32],
    max_blocks: usize,
    cut: Cut,
}

impl Step<'_> {
    /// Computes one tile: some rows of a sequence, and some of the query heads of one KV head.
    fn run(&self, rows: RowTile, head_tile: usize, scratch: &mut TileScratch) {
        let d_head = self.layout.d_head;
        let kv_head = head_tile / self.cut.tiles_per_group();
        let first = head_tile % self.cut.tiles_per_group() * self.cut.heads_per_tile;
        let n_heads = self.cut.heads_per_tile.min(self.cut.group - first);
        let first_head = kv_head * self.cut.group + first;
        let width = (self.n_heads_local + 2 * self.layout.n_kv_heads_local) * d_head;
        let pages = Pages {
            layout: self.layout,
            head: kv_head,
            table: &self.tables[rows.seq * self.max_blocks..][..self.max_blocks],
        };
        let place = |entry: usize| (rows.row + entry / n_heads, first_head + entry % n_heads);
        scratch.begin(rows.n_rows * n_heads, self.scale, |entry| {
            let (row, head) = place(entry);
            let position = rows.position + entry / n_heads;
            let query = &self.qkv[row * width + head * d_head..][..d_head];
            ((position + 1).saturating_sub(self.window), position, query)
        });
        let (k, v) = (self.k, self.v);
        match self.layout.dtype {
            DType::F16 => self.kernels.run(Tile::<StoredF16>::new(k, v, pages, scratch)),
            DType::BF16 => self.kernels.run(Tile::<StoredBf16>::new(k, v, pages, scratch)),
            DType::F32 => self.kernels.run(Tile::<StoredF32>::new(k, v, pages, scratch)),
            other => panic!("attention: a cache of {other}"),
        }
        for entry in 0..rows.n_rows * n_heads {
            let (row, head) = place(entry);
            // SAFETY: each (row, head) belongs to one tile, since `cut_rows` and the cut of the heads do not overlap.
            let out = unsafe { self.out.piece((row * self.n_heads_local + head) * d_head, d_head) };
            out.copy_from_slice(scratch.result(entry));
        }
    }
}
