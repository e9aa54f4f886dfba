//! Sampling: one token a row, a function of the row's logits, its `SampleRow` and nothing else.
//!
//! Bad logits do no harm: NaN counts as −∞ and +∞ as the greatest finite number. Where no token has a finite logit,
//! the lowest id that is not banned is taken (0 if all are), and its log-probability is −∞.
//! The three filters keep a prefix of the order by likelihood; the draw walks what is kept in order of ids.

use dist_core::philox::philox4x32;

use super::buf::CpuBuf;
use super::math::exp;
use super::norm::{load_or, store_at};
use super::pool::{Disjoint, Pool};
use super::sample_order::{Buckets, best, id_of, key, top_n};
use super::simd::{CpuKernels, Kernel, LANES, Simd};
use crate::args::{SampleArgs, SampleRow};
use crate::backend::Backend;

/// Memory of all threads, taken when a vocabulary is first seen.
pub(crate) struct SampleScratch {
    threads: Vec<RowScratch>,
}

impl SampleScratch {
    /// Takes nothing yet.
    pub(crate) fn new(n_threads: usize) -> Self {
        Self { threads: (0..n_threads).map(|_| RowScratch::new()).collect() }
    }
}

// kernel
/// Picks a token a row and its log-probability.
pub(crate) fn sample<B: Backend<Buf = CpuBuf>>(
    kernels: CpuKernels,
    pool: &Pool,
    scratch: &mut SampleScratch,
    args: SampleArgs<'_, B>,
) {
    let SampleArgs { logits, n_vocab, ld, rows, ids, logprobs, n_top, top_ids, top_logprobs } = args;
    let threads = Disjoint::new(&mut scratch.threads);
    let logits = Disjoint::new(logits.f32s_mut());
    let (ids, logprobs) = (Disjoint::new(ids.slice_mut::<u32>()), Disjoint::new(logprobs.f32s_mut()));
    let top_ids = Disjoint::new(top_ids.slice_mut::<u32>());
    let top_logprobs = Disjoint::new(top_logprobs.f32s_mut());
    pool.run_with_thread(rows.len(), &|idx, thread| {
        // SAFETY: every row is one task and touches its own elements only.
        let (logits, out) = unsafe {
            let out = Sampled {
                id: &mut ids.piece(idx, 1)[0],
                logprob: &mut logprobs.piece(idx, 1)[0],
                top_ids: top_ids.piece(idx * n_top, n_top),
                top_logprobs: top_logprobs.piece(idx * n_top, n_top),
            };
            (logits.piece(idx * ld, n_vocab), out)
        };
        // SAFETY: the pool gives a number to one thread at a time, and a thread has one task at a time.
        let scratch = unsafe { &mut threads.piece(thread, 1)[0] };
        sample_row(kernels, logits, &rows[idx], out, scratch);
    });
}

/// Memory of one thread.
struct RowScratch {
    /// Unnormalised probabilities, the greatest being one.
    weights: Vec<f32>,
    /// Tokens whose logits were changed, with what they were.
    changed: Vec<(u32, f32)>,
    keys: Vec<u64>,
    buckets: Buckets,
}

impl RowScratch {
    fn new() -> Self {
        Self { weights: Vec::new(), changed: Vec::new(), keys: Vec::new(), buckets: Buckets::new() }
    }
}

/// What a row of `sample` gives.
struct Sampled<'a> {
    id: &'a mut u32,
    logprob: &'a mut f32,
    top_ids: &'a mut [u32],
    top_logprobs: &'a mut [f32],
}

/// The model's log-probabilities: `logit − log Σ exp`, in double precision until the end.
struct LogSoftmax {
    max: f32,
    log_sum: f64,
}

impl LogSoftmax {
    fn new(kernels: CpuKernels, logits: &[f32], weights: &mut [f32]) -> Self {
        let max = greatest(logits);
        kernels.run(Weigh { weights, logits, max, temperature: 1.0 });
        Self { max, log_sum: sum(weights).ln() }
    }

    fn at(&self, logit: f32) -> f32 {
        if logit == f32::NEG_INFINITY {
            return logit;
        }
        (f64::from(logit) - f64::from(self.max) - self.log_sum) as f32
    }
}

/// `weights = exp((logits − max) / temperature)`.
struct Weigh<'a> {
    weights: &'a mut [f32],
    logits: &'a [f32],
    max: f32,
    temperature: f32,
}

impl Kernel for Weigh<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (max, temperature) = (s.splat(self.max), s.splat(self.temperature));
        for at in (0..self.logits.len()).step_by(LANES) {
            let below = s.div(s.sub(load_or(s, self.logits, at, 0.0), max), temperature);
            store_at(s, exp(s, below), self.weights, at);
        }
    }
}

/// Samples one row. `logits` is cleaned of NaN and infinity and otherwise the same afterwards.
fn sample_row(
    kernels: CpuKernels,
    logits: &mut [f32],
    row: &SampleRow,
    out: Sampled<'_>,
    scratch: &mut RowScratch,
) {
    clean(logits);
    scratch.weights.resize(logits.len(), 0.0);
    let softmax = LogSoftmax::new(kernels, logits, &mut scratch.weights);
    top_n(logits, out.top_ids.len(), &mut scratch.keys);
    for ((id, logprob), &key) in out.top_ids.iter_mut().zip(out.top_logprobs).zip(&scratch.keys) {
        *id = id_of(key);
        *logprob = softmax.at(logits[*id as usize]);
    }
    *out.id = match row.target {
        Some(target) => target,
        None => choose(kernels, logits, row, scratch),
    };
    *out.logprob = softmax.at(logits[*out.id as usize]);
}

/// Draws a token; `logits` are changed on the way and restored.
fn choose(kernels: CpuKernels, logits: &mut [f32], row: &SampleRow, scratch: &mut RowScratch) -> u32 {
    scratch.changed.clear();
    adjust(logits, row, &mut scratch.changed);
    let max = greatest(logits);
    let id = if max == f32::NEG_INFINITY {
        (0..logits.len() as u32).find(|id| !row.banned.contains(id)).unwrap_or(0)
    } else if row.temperature > 0.0 {
        // An infinite temperature would make NaN of a logit of −∞.
        let temperature = row.temperature.min(f32::MAX);
        let weights = &mut scratch.weights;
        kernels.run(Weigh { weights, logits, max, temperature });
        filter(logits, row, max, temperature, scratch);
        draw(&scratch.weights, uniform(row))
    } else {
        best(logits)
    };
    for &(id, logit) in scratch.changed.iter().rev() {
        logits[id as usize] = logit;
    }
    id
}

/// NaN becomes −∞ and +∞ the greatest finite number.
fn clean(logits: &mut [f32]) {
    for logit in logits {
        // The comparison is false for NaN.
        *logit = if *logit > f32::NEG_INFINITY { logit.min(f32::MAX) } else { f32::NEG_INFINITY };
    }
}

fn greatest(logits: &[f32]) -> f32 {
    // Eight maxima at once; a maximum does not depend on the order.
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (chunks, rest) = logits.as_chunks::<8>();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Applies penalties, biases and bans in this order. Ids beyond the vocabulary cannot be drawn and are passed over.
fn adjust(logits: &mut [f32], row: &SampleRow, changed: &mut Vec<(u32, f32)>) {
    let mut change = |id: u32, new: &dyn Fn(f32) -> f32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            changed.push((id, *logit));
            *logit = new(*logit);
            clean(std::slice::from_mut(logit));
        }
    };
    let penalty = row.repetition_penalty;
    for count in &row.counts {
        if count.n_prompt + count.n_output > 0 {
            change(count.id, &|l| if l > 0.0 { l / penalty } else { l * penalty });
        }
        if count.n_output > 0 {
            let subtracted = row.presence_penalty + row.frequency_penalty * count.n_output as f32;
            change(count.id, &|l| l - subtracted);
        }
    }
    for &(id, bias) in &row.logit_bias {
        change(id, &|l| l + bias);
    }
    for &id in &row.banned {
        change(id, &|_| f32::NEG_INFINITY);
    }
}

/// Zeroes the weights of tokens that top-k, then top-p, then min-p leave out.
fn filter(logits: &[f32], row: &SampleRow, max: f32, temperature: f32, scratch: &mut RowScratch) {
    let RowScratch { weights, buckets, .. } = scratch;
    let top_k = row.top_k as usize;
    let top_k = (top_k > 0 && top_k < logits.len()).then_some(top_k);
    let top_p = (row.top_p < 1.0).then_some(row.top_p);
    if top_k.is_some() || top_p.is_some() {
        buckets.fill(logits, weights, max, temperature);
        let mut kept = buckets.all();
        if let Some(k) = top_k {
            kept = buckets.likeliest(logits, weights, k);
        }
        if let Some(p) = top_p {
            kept = buckets.nucleus(logits, weights, kept, p);
        }
        for (id, (weight, &logit)) in weights.iter_mut().zip(logits).enumerate() {
            *weight = if key(logit, id as u32) >= kept.key { *weight } else { 0.0 };
        }
    }
    if row.min_p > 0.0 {
        // The likeliest token's weight is one, and stays whatever was asked for.
        let least = row.min_p.min(1.0);
        for weight in weights {
            *weight = if *weight >= least { *weight } else { 0.0 };
        }
    }
}

/// A number in [0, 1) that depends on the request's seed, its sample and the position only.
fn uniform(row: &SampleRow) -> f64 {
    let bits = philox4x32([row.position, row.sample_idx, 0, 0], [row.seed as u32, (row.seed >> 32) as u32]);
    let bits = u64::from(bits[0]) << 32 | u64::from(bits[1]);
    (bits >> 11) as f64 * (1.0 / 9_007_199_254_740_992.0) // 2⁻⁵³
}

/// Tokens whose weights are summed together before the walk looks into them.
const STRIDE: usize = 256;

/// Inverse of the distribution function at `u`: the first token at which the running sum exceeds `u` of the whole.
fn draw(weights: &[f32], u: f64) -> u32 {
    let mut left = u * sum(weights);
    for (stride_idx, stride) in weights.chunks(STRIDE).enumerate() {
        let mass = sum_stride(stride);
        if left >= mass {
            left -= mass;
            continue;
        }
        // Should rounding carry the walk past the stride's end, its last possible token is the one.
        let mut drawn = 0;
        for (idx, &weight) in stride.iter().enumerate().filter(|&(_, &weight)| weight > 0.0) {
            drawn = idx;
            if left < f64::from(weight) {
                break;
            }
            left -= f64::from(weight);
        }
        return (stride_idx * STRIDE + drawn) as u32;
    }
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(0) as u32
}

/// Sum of `weights` in one fixed order.
fn sum(weights: &[f32]) -> f64 {
    weights.chunks(STRIDE).map(sum_stride).sum()
}

fn sum_stride(weights: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; 8];
    for chunk in weights.chunks(8) {
        for (lane, &weight) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(weight);
        }
    }
    lanes.iter().sum()
}
