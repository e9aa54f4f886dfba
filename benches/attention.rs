//! Attention at GPT-3's head sizes: decoding is bound by reading keys and values, prefill by multiply-adds.
//!
//! `cargo bench -p dist-kernels --bench attention [-- FILTER]`, for instance `-- prefill` or `-- decode/batch=1/`.

use std::time::Duration;

use criterion::Criterion;
use dist_core::{DType, KvLayout};
use dist_kernels::args::{AttentionArgs, KvLayer, Ragged};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf};
use dist_kernels::weight::HostBytes;

mod ceilings;
use ceilings::{Ceilings, Line, POOL_BYTES, Samples, activations, backend, print_table, weights};

const N_HEADS: usize = 32;
const BLOCK_SIZE: usize = 16;

/// `batch` sequences with the last `rows` rows of `context` tokens each.
#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    rows: usize,
    context: usize,
    d_head: usize,
}

impl Case {
    fn name(self) -> String {
        let Self { batch, rows, context, d_head } = self;
        let phase = if rows == 1 { "decode" } else { "prefill" };
        format!("{phase}/batch={batch}/context={context}/{N_HEADS}x{d_head}/f32/")
    }

    /// Keys and values that a step must read.
    fn bytes(self) -> usize {
        2 * self.batch * self.context * N_HEADS * self.d_head * DType::F32.bytes()
    }

    /// A multiply-add each for score and sum at every visible position.
    fn flop(self) -> f64 {
        let hidden = self.rows * (self.rows - 1) / 2;
        4.0 * (self.batch * N_HEADS * self.d_head * (self.rows * self.context - hidden)) as f64
    }

    fn blocks_per_seq(self) -> usize {
        self.context.div_ceil(BLOCK_SIZE)
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for d_head in [64, 128] {
        for context in [512, 2048] {
            cases.push(Case { batch: 1, rows: context, context, d_head });
        }
        for context in [512, 2048] {
            for batch in [1, 8, 32] {
                cases.push(Case { batch, rows: 1, context, d_head });
            }
        }
    }
    cases
}

/// Keys and values of several layers, which together exceed every cache.
fn layers(backend: &mut CpuBackend, case: Case) -> Vec<KvLayer<CpuBuf>> {
    let numbers = activations(1 << 20);
    let len = case.bytes() / 2 / DType::F32.bytes();
    let mut cache = || {
        let mut buf = backend.alloc("cache", DType::F32, len).expect("memory for the cache");
        for out in buf.slice_mut::<f32>().chunks_mut(1 << 20) {
            out.copy_from_slice(&numbers.slice::<f32>()[..out.len()]);
        }
        buf
    };
    (0..(POOL_BYTES / case.bytes()).max(1)).map(|_| KvLayer { k: cache(), v: cache() }).collect()
}

fn words(words: impl Iterator<Item = usize>) -> CpuBuf {
    CpuBuf::from_slice("words", &words.map(|word| word as u32).collect::<Vec<_>>()).expect("memory for words")
}

fn bench(c: &mut Criterion, backend: &mut CpuBackend, pool: &HostBytes, case: Case) -> Option<Line> {
    let Case { batch, rows, context, d_head } = case;
    let layout = KvLayout {
        n_layers_local: 1,
        n_kv_heads_local: N_HEADS,
        d_head,
        dtype: DType::F32,
        block_size: BLOCK_SIZE,
    };
    let (mut layers, mut next) = (None, 0);
    let qkv = activations(batch * rows * 3 * N_HEADS * d_head);
    let mut out = backend.alloc("out", DType::F32, batch * rows * N_HEADS * d_head).expect("memory");
    let q_offsets = words((0..=batch).map(|seq| seq * rows));
    let context_lens = words((0..batch).map(|_| context));
    // Block i of every sequence comes after block i of all others, as it does when they grow together.
    let n_blocks = case.blocks_per_seq();
    let block_tables = words((0..batch * n_blocks).map(|idx| idx % n_blocks * batch + idx / n_blocks));
    let (mut samples, mut ceilings) = (Samples::default(), Ceilings::default());
    c.bench_function(&case.name(), |b| {
        b.iter_custom(|iters| {
            let layers = layers.get_or_insert_with(|| self::layers(backend, case));
            ceilings.measure(backend, pool);
            let mut total = Duration::ZERO;
            for _ in 0..iters {
                next = (next + 1) % layers.len();
                let args = AttentionArgs {
                    out: &mut out,
                    qkv: &qkv,
                    kv: &layers[next],
                    layout,
                    n_heads_local: N_HEADS,
                    scale: 1.0 / (d_head as f32).sqrt(),
                    window: None,
                    seqs: Ragged {
                        n_seqs: batch,
                        rows: batch * rows,
                        max_rows: rows,
                        q_offsets: &q_offsets,
                        context_lens: &context_lens,
                        block_tables: &block_tables,
                        max_blocks: n_blocks,
                    },
                };
                total += samples.time(|| backend.attention(args).expect("attention"));
            }
            total
        });
    });
    let (seconds, bytes, flop) = (samples.median(), case.bytes() as f64, case.flop());
    let line = Line { name: case.name(), seconds, bytes, flop, ceilings, gemm: None };
    seconds.is_finite().then_some(line)
}

fn main() {
    let mut c = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .configure_from_args();
    let mut backend = backend();
    let pool = weights(&mut backend, DType::BF16, POOL_BYTES);
    let lines: Vec<Line> =
        cases().into_iter().filter_map(|case| bench(&mut c, &mut backend, &pool, case)).collect();
    print_table(&backend, &lines);
    c.final_summary();
}
