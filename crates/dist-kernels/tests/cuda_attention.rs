//! Attention on the GPU against the CPU: paged, ragged, windowed, with contexts that end anywhere in a block; slots
//! that hold nothing are poisoned. Without a GPU the tests say so and pass.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

mod cuda_case;

use cuda_case::{Random, assert_near, cpu, get, gpu, poisoned, put, words};
use dist_core::{DType, KvLayout};
use dist_kernels::Backend;
use dist_kernels::args::{AttentionArgs, KvLayer, Ragged};

/// Rows and context of a sequence.
type Seq = (usize, usize);

struct Case {
    seqs: Vec<Seq>,
    n_heads: usize,
    layout: KvLayout,
    window: Option<usize>,
    q_offsets: Vec<u32>,
    tables: Vec<u32>,
    max_blocks: usize,
    qkv: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(
        random: &mut Random,
        seqs: &[Seq],
        (n_heads, n_kv_heads_local, d_head): (usize, usize, usize),
        (block_size, window): (usize, Option<usize>),
        dtype: DType,
    ) -> Self {
        let layout = KvLayout { n_layers_local: 1, n_kv_heads_local, d_head, dtype, block_size };
        let max_blocks = seqs.iter().map(|seq| seq.1.div_ceil(block_size)).max().unwrap() + 1;
        let n_used: usize = seqs.iter().map(|seq| seq.1.div_ceil(block_size)).sum();
        let n_blocks = n_used + 3;
        // Blocks in no order: a random permutation.
        let mut free: Vec<u32> = (0..n_blocks as u32).collect();
        for i in (1..n_blocks).rev() {
            free.swap(i, random.below(i + 1));
        }
        let mut tables = vec![0; seqs.len() * max_blocks];
        let mut caches = [1, 2].map(|_| vec![f32::NAN; n_blocks * layout.block_len()]);
        let mut q_offsets = vec![0];
        for (seq, &(rows, context)) in seqs.iter().enumerate() {
            q_offsets.push(q_offsets[seq] + rows as u32);
            for position in 0..context {
                let entry = seq * max_blocks + position / block_size;
                if position % block_size == 0 {
                    tables[entry] = free.pop().unwrap();
                }
                let slot = tables[entry] as usize * block_size + position % block_size;
                for head in 0..n_kv_heads_local {
                    let at = layout.at(slot, head);
                    for cache in &mut caches {
                        cache[at..at + d_head].copy_from_slice(&random.normal(d_head, 1.0, dtype));
                    }
                }
            }
        }
        let rows = q_offsets[seqs.len()] as usize;
        let qkv = random.normal(rows * (n_heads + 2 * n_kv_heads_local) * d_head, 1.0, dtype);
        let [k, v] = caches;
        Self { seqs: seqs.to_vec(), n_heads, layout, window, q_offsets, tables, max_blocks, qkv, k, v }
    }

    fn run<B: Backend>(&self, backend: &mut B, act: DType) -> Vec<f32> {
        let rows = self.q_offsets[self.seqs.len()] as usize;
        let (n_heads_local, layout) = (self.n_heads, self.layout);
        let mut out = poisoned(backend, act, rows * n_heads_local * layout.d_head);
        let kv = KvLayer { k: put(backend, layout.dtype, &self.k), v: put(backend, layout.dtype, &self.v) };
        let qkv = put(backend, act, &self.qkv);
        let contexts: Vec<u32> = self.seqs.iter().map(|seq| seq.1 as u32).collect();
        let q_offsets = words(backend, &self.q_offsets);
        let (context_lens, block_tables) = (words(backend, &contexts), words(backend, &self.tables));
        backend
            .attention(AttentionArgs {
                out: &mut out,
                qkv: &qkv,
                kv: &kv,
                layout,
                n_heads_local,
                scale: 1.0 / (layout.d_head as f32).sqrt(),
                window: self.window,
                seqs: Ragged {
                    n_seqs: self.seqs.len(),
                    rows,
                    max_rows: self.seqs.iter().map(|seq| seq.0).max().unwrap(),
                    q_offsets: &q_offsets,
                    context_lens: &context_lens,
                    block_tables: &block_tables,
                    max_blocks: self.max_blocks,
                },
            })
            .unwrap();
        get(backend, &out)
    }
}

/// Weighted means of values: the weights are rounded before tensor cores multiply them.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 6e-3 } else { 1e-3 }
}

#[test]
fn attention() {
    let Some((_one, mut gpu)) = gpu("attention") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    let decode: &[Seq] = &[(1, 1), (1, 15), (1, 16), (1, 17), (1, 100), (1, 700), (1, 33)];
    let ragged: &[Seq] = &[(3, 50), (7, 333), (9, 9), (1, 48)];
    let prompts: &[Seq] = &[(130, 130), (64, 200), (1, 77), (17, 17)];
    let forms: [(&[Seq], _, _); 9] = [
        (decode, (4, 4), (16, None)),
        (&[(1, 300), (1, 5), (1, 2050)], (8, 2), (32, None)),
        (&[(1, 129), (1, 64)], (32, 1), (16, None)),
        (&[(1, 900), (1, 20), (1, 64), (1, 1000)], (4, 4), (16, Some(100))),
        (ragged, (12, 4), (16, None)),
        (ragged, (12, 4), (48, Some(20))),
        (&[(1, 5000)], (2, 2), (16, None)),
        (prompts, (4, 2), (16, None)),
        (prompts, (4, 4), (16, Some(16))),
    ];
    for (i, d_head) in [64, 80, 96, 128, 8, 16, 24, 33].into_iter().enumerate() {
        for (j, (seqs, (n_heads, n_kv_heads), (block_size, window))) in forms.into_iter().enumerate() {
            let dtype = [DType::BF16, DType::F16][(i + j) % 2];
            let heads = (n_heads, n_kv_heads, d_head);
            let case = Case::new(&mut random, seqs, heads, (block_size, window), dtype);
            let (found, expected) = (case.run(&mut gpu, dtype), case.run(&mut cpu, DType::F32));
            let what =
                format!("attention {dtype}, {heads:?}, {seqs:?}, blocks of {block_size}, window {window:?}");
            assert_near(&what, &found, &expected, bound(dtype));
        }
    }
}

#[test]
fn a_page_size_that_is_no_multiple_of_16_works_too() {
    let Some((_one, mut gpu)) = gpu("a_page_size_that_is_no_multiple_of_16_works_too") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    let case = Case::new(&mut random, &[(1, 40), (3, 21)], (4, 2, 64), (10, None), DType::BF16);
    let (found, expected) = (case.run(&mut gpu, DType::BF16), case.run(&mut cpu, DType::F32));
    assert_near("blocks of 10", &found, &expected, bound(DType::BF16));
}

#[test]
fn a_sequence_gives_the_same_bits_in_another_place_of_the_batch() {
    let Some((_one, mut gpu)) = gpu("a_sequence_gives_the_same_bits_in_another_place_of_the_batch") else {
        return;
    };
    let mut random = Random::new();
    let seqs = [(1, 900), (1, 33), (1, 260), (1, 16)];
    let case = Case::new(&mut random, &seqs, (8, 8, 128), (16, None), DType::BF16);
    let found = case.run(&mut gpu, DType::BF16);
    let reversed = Case {
        seqs: case.seqs.iter().rev().copied().collect(),
        tables: case.tables.chunks(case.max_blocks).rev().flatten().copied().collect(),
        qkv: case.qkv.chunks(3 * 8 * 128).rev().flatten().copied().collect(),
        ..case
    };
    let turned = reversed.run(&mut gpu, DType::BF16);
    let back: Vec<f32> = turned.chunks(8 * 128).rev().flatten().copied().collect();
    assert!(found == back, "the bits depend on the place in the batch");
}
