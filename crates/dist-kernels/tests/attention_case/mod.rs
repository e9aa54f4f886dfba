//! Batches for the attention tests: every number is a function of (sequence, position, head, element), so that the
//! same sequence can be computed in many ways.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.
#![allow(dead_code)] // Each test file uses its part.

use std::time::Duration;

use dist_core::philox::philox4x32;
use dist_core::{DType, KvLayout};
use dist_kernels::Backend;
use dist_kernels::args::{AttentionArgs, KvLayer, Ragged};
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use half::{bf16, f16};

/// A model's side of attention.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::struct_field_names)] // The names of the field.
pub(crate) struct Heads {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) d_head: usize,
    pub(crate) window: Option<usize>,
    pub(crate) dtype: DType,
}

impl Heads {
    pub(crate) fn new(n_heads: usize, n_kv_heads: usize, d_head: usize) -> Self {
        Self { n_heads, n_kv_heads, d_head, window: None, dtype: DType::F32 }
    }

    pub(crate) fn scale(self) -> f32 {
        1.0 / (self.d_head as f32).sqrt()
    }
}

/// `rows` rows that end a context of `context` tokens of sequence `id`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seq {
    pub(crate) id: u32,
    pub(crate) rows: usize,
    pub(crate) context: usize,
}

/// Where the blocks of the cache are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Blocks {
    InOrder(usize),
    Scattered(usize),
}

pub(crate) fn backend(path: CpuPath, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path, spin: Duration::from_micros(20) }).unwrap()
}

/// A number in [−1, 1): `kind` tells query, key and value apart.
pub(crate) fn number(kind: u32, id: u32, position: usize, head: usize, element: usize) -> f32 {
    let bits = philox4x32([position as u32, head as u32, element as u32, kind], [id, 7]);
    bits[0] as i32 as f32 / 2_147_483_648.0
}

/// The number as a cache of this type holds it.
pub(crate) fn stored(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// A query, large enough for sharp distributions.
pub(crate) fn query(id: u32, position: usize, head: usize, element: usize) -> f32 {
    4.0 * number(0, id, position, head, element)
}

/// Runs one step and returns each sequence's rows; caches, padding and output are NaN beforehand.
pub(crate) fn attend(backend: &mut CpuBackend, heads: Heads, blocks: Blocks, seqs: &[Seq]) -> Vec<Vec<f32>> {
    let (Blocks::InOrder(block_size) | Blocks::Scattered(block_size)) = blocks;
    let Heads { n_heads, n_kv_heads, d_head, window, dtype } = heads;
    let layout = KvLayout { n_layers_local: 1, n_kv_heads_local: n_kv_heads, d_head, dtype, block_size };
    let max_blocks = seqs.iter().map(|seq| seq.context.div_ceil(block_size)).max().unwrap_or(0) + 1;
    let n_blocks = seqs.len() * max_blocks;
    let mut tables = vec![u32::MAX; n_blocks];
    let mut kv = [1, 2].map(|_| vec![f32::NAN; n_blocks * layout.block_len()]);
    let mut qkv = Vec::new();
    let mut q_offsets = vec![0];
    for (idx, seq) in seqs.iter().enumerate() {
        for block in 0..seq.context.div_ceil(block_size) {
            let logical = idx * max_blocks + block;
            let physical = if blocks == Blocks::Scattered(block_size) {
                // A step that shares no factor with the number of blocks visits each of them once.
                let step = (n_blocks / 2..=n_blocks + 1).find(|&step| gcd(step, n_blocks) == 1).unwrap();
                (logical * step + 1) % n_blocks
            } else {
                logical
            };
            tables[logical] = physical as u32;
        }
        for position in 0..seq.context {
            let block = tables[idx * max_blocks + position / block_size] as usize;
            for head in 0..n_kv_heads {
                let at = layout.at(block * block_size + position % block_size, head);
                for (kind, cache) in kv.iter_mut().enumerate() {
                    for element in 0..d_head {
                        cache[at + element] = number(1 + kind as u32, seq.id, position, head, element);
                    }
                }
            }
        }
        for position in seq.context - seq.rows..seq.context {
            for head in 0..n_heads {
                qkv.extend((0..d_head).map(|element| query(seq.id, position, head, element)));
            }
            qkv.extend(std::iter::repeat_n(f32::NAN, 2 * n_kv_heads * d_head));
        }
        q_offsets.push(q_offsets[idx] + seq.rows as u32);
    }
    let rows = *q_offsets.last().unwrap() as usize;
    let context_lens: Vec<u32> = seqs.iter().map(|seq| seq.context as u32).collect();
    let mut out = buf(&vec![f32::NAN; rows * n_heads * d_head]);
    let [k, v] = kv.map(|cache| cache_buf(dtype, &cache));
    let words = |words: &[u32]| CpuBuf::from_slice("test", words).unwrap();
    backend
        .attention(AttentionArgs {
            out: &mut out,
            qkv: &buf(&qkv),
            kv: &KvLayer { k, v },
            layout,
            n_heads_local: n_heads,
            scale: heads.scale(),
            window,
            seqs: Ragged {
                n_seqs: seqs.len(),
                rows,
                max_rows: seqs.iter().map(|seq| seq.rows).max().unwrap_or(0),
                q_offsets: &words(&q_offsets),
                context_lens: &words(&context_lens),
                block_tables: &words(&tables),
                max_blocks,
            },
        })
        .unwrap();
    let width = n_heads * d_head;
    let out = out.slice::<f32>();
    q_offsets.windows(2).map(|r| out[r[0] as usize * width..r[1] as usize * width].to_vec()).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn buf(x: &[f32]) -> CpuBuf {
    CpuBuf::from_slice("test", x).unwrap()
}

fn cache_buf(dtype: DType, x: &[f32]) -> CpuBuf {
    match dtype {
        DType::F16 => CpuBuf::from_slice("test", &x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>()),
        DType::BF16 => CpuBuf::from_slice("test", &x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>()),
        _ => CpuBuf::from_slice("test", x),
    }
    .unwrap()
}
