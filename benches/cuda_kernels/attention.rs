//! Attention: decoding reads keys and values, prefill multiplies.

use dist_core::KvLayout;
use dist_kernels::Backend;
use dist_kernels::Result;
use dist_kernels::args::{AttentionArgs, KvLayer, Ragged};
use dist_kernels::cuda::CudaBuf;
use serde_json::json;

use crate::gpu::{DTYPE, Gpu, median, n_launches, n_rotating};
use crate::report::{Bar, Line, Report, Work};

/// Positions of a block of the engine's cache, and of blocks that are as good as one.
const PAGE: usize = 16;
const LONG_BLOCK: usize = 128;
/// How much longer prefill may take over pages.
const PAGED_MAX: f64 = 1.1;
/// From so many bytes of keys and values on, decoding shall read at this rate.
const DECODE_RATE: (usize, f64) = (128_000_000, 2.9e12);

/// Where the keys and values of a sequence are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// In long blocks in order.
    Contiguous,
    /// In the engine's blocks, in order.
    Paged,
    /// In the engine's blocks, each far from the next one, as in a cache that has lived long.
    Shuffled,
}

/// `batch` sequences with the last `rows` rows of `context` tokens each.
#[derive(Clone, Copy)]
struct Case {
    batch: usize,
    rows: usize,
    context: usize,
    n_heads: usize,
    n_kv_heads: usize,
    d_head: usize,
    pages: Pages,
}

impl Case {
    fn decode(batch: usize, context: usize, (n_heads, n_kv_heads): (usize, usize), d_head: usize) -> Self {
        Self { batch, rows: 1, context, n_heads, n_kv_heads, d_head, pages: Pages::Shuffled }
    }

    fn prefill(batch: usize, context: usize, n_heads: usize, d_head: usize) -> Self {
        let pages = Pages::Contiguous;
        Self { batch, rows: context, context, n_heads, n_kv_heads: n_heads, d_head, pages }
    }

    fn block_size(self) -> usize {
        if self.pages == Pages::Contiguous { LONG_BLOCK } else { PAGE }
    }

    fn name(self) -> String {
        let Self { batch, rows, context, n_heads, n_kv_heads, d_head, pages } = self;
        let phase = if rows == 1 { "decode" } else { "prefill" };
        let pages = match pages {
            Pages::Contiguous => "contiguous",
            Pages::Paged => "paged",
            Pages::Shuffled => "shuffled",
        };
        format!("attention/{phase}/{n_heads}:{n_kv_heads}x{d_head}/{batch}x{context}/{pages}/")
    }

    /// Keys and values that a step must read.
    fn n_bytes(self) -> usize {
        2 * self.batch * self.context * self.n_kv_heads * self.d_head * DTYPE.bytes()
    }

    /// A multiplication and an addition each for score and sum at every visible position.
    fn flop(self) -> f64 {
        let hidden = self.rows * (self.rows - 1) / 2;
        4.0 * (self.batch * self.n_heads * self.d_head * (self.rows * self.context - hidden)) as f64
    }

    fn work(self) -> Work {
        if self.rows == 1 { Work::Read(self.n_bytes()) } else { Work::Multiply(self.flop()) }
    }

    fn layout(self) -> KvLayout {
        KvLayout {
            n_layers_local: 1,
            n_kv_heads_local: self.n_kv_heads,
            d_head: self.d_head,
            dtype: DTYPE,
            block_size: self.block_size(),
        }
    }

    /// Block numbers of all sequences.
    fn block_tables(self) -> Vec<u32> {
        let n_blocks = self.batch * self.context.div_ceil(self.block_size());
        // A prime that divides no number of blocks here: every block comes once.
        let stride = if self.pages == Pages::Shuffled { 7919 } else { 1 };
        (0..n_blocks).map(|idx| (idx * stride % n_blocks) as u32).collect()
    }
}

/// Prefill of 2,048 and 16,384 tokens at both head sizes with what it shall reach.
fn prefills() -> Vec<(Case, f64)> {
    vec![
        (Case::prefill(8, 2048, 16, 128), 450e12),
        (Case::prefill(1, 16384, 16, 128), 500e12),
        (Case::prefill(8, 2048, 32, 64), 340e12),
        (Case::prefill(1, 16384, 32, 64), 380e12),
    ]
}

/// Decoding, with the seconds that it may take at most where that is said.
fn decodes() -> Vec<(Case, Option<f64>)> {
    vec![
        (Case::decode(1, 2048, (32, 32), 128), Some(14e-6)),
        (Case::decode(8, 2048, (32, 32), 128), None),
        (Case::decode(64, 1024, (32, 32), 128), None),
        (Case::decode(32, 2048, (32, 8), 128), None),
        (Case::decode(1, 2048, (32, 32), 64), None),
        (Case::decode(32, 1024, (32, 32), 64), None),
    ]
}

/// Seconds of one step.
fn time(gpu: &mut Gpu, case: Case) -> Result<f64> {
    let Case { batch, rows, context, n_heads, n_kv_heads, d_head, .. } = case;
    let len = case.n_bytes() / 2 / DTYPE.bytes();
    let layers = (0..n_rotating(case.n_bytes()))
        .map(|_| Ok(KvLayer { k: gpu.activations(len)?, v: gpu.activations(len)? }))
        .collect::<Result<Vec<KvLayer<CudaBuf>>>>()?;
    let qkv = gpu.activations(batch * rows * (n_heads + 2 * n_kv_heads) * d_head)?;
    let mut out = gpu.output(DTYPE, batch * rows * n_heads * d_head)?;
    let q_offsets: Vec<u32> = (0..=batch).map(|seq| (seq * rows) as u32).collect();
    let q_offsets = gpu.words(&q_offsets)?;
    let context_lens = gpu.words(&vec![context as u32; batch])?;
    let block_tables = gpu.words(&case.block_tables())?;
    let n = n_launches(case.n_bytes(), case.flop(), layers.len());
    median(&mut gpu.backend, n, |backend, idx| {
        backend.attention(AttentionArgs {
            out: &mut out,
            qkv: &qkv,
            kv: &layers[idx % layers.len()],
            layout: case.layout(),
            n_heads_local: n_heads,
            scale: 1.0 / (d_head as f32).sqrt(),
            window: None,
            seqs: Ragged {
                n_seqs: batch,
                rows: batch * rows,
                max_rows: rows,
                q_offsets: &q_offsets,
                context_lens: &context_lens,
                block_tables: &block_tables,
                max_blocks: context.div_ceil(case.block_size()),
            },
        })
    })
}

fn line(case: Case, seconds: f64, bars: Vec<Bar>) -> Line {
    let Case { batch, rows, context, n_heads, n_kv_heads, d_head, .. } = case;
    let shape = json!({
        "op": "attention",
        "batch": batch,
        "rows": rows,
        "context": context,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "block_size": case.block_size(),
        "blocks_in_order": case.pages != Pages::Shuffled,
    });
    Line { name: case.name(), shape, seconds, work: case.work(), beside: vec![], runs: None, bars }
}

pub(crate) fn run(gpu: &mut Gpu, takes: &dyn Fn(&str) -> bool, report: &mut Report) -> Result<()> {
    for (case, least) in prefills() {
        let paged = [Pages::Paged, Pages::Shuffled].map(|pages| Case { pages, ..case });
        // The one is held against the others, so all run.
        if takes(&case.name()) || paged.iter().any(|case| takes(&case.name())) {
            let seconds = time(gpu, case)?;
            report.push(line(case, seconds, vec![Bar::Rate(least)]));
            for paged in paged {
                report.push(line(paged, time(gpu, paged)?, vec![Bar::Seconds(seconds * PAGED_MAX)]));
            }
        }
    }
    for (case, most) in decodes().into_iter().filter(|(case, _)| takes(&case.name())) {
        let seconds = time(gpu, case)?;
        let rate = (case.n_bytes() >= DECODE_RATE.0).then_some(Bar::Read(DECODE_RATE.1));
        report.push(line(case, seconds, most.map(Bar::Seconds).into_iter().chain(rate).collect()));
    }
    Ok(())
}
