//! The end of every `linear` kernel: bias and activation while the sums are still in the cache; and the way of keys and
//! values into theirs.

use dist_core::{DType, KvLayout};
use half::{bf16, f16};

use super::buf::{CpuBuf, Element};
use super::linear::{Outputs, Product};
use super::math::activate;
use super::norm::Floats;
use super::pool::{Disjoint, Pool};
use super::simd::{LANES, Simd};
use crate::args::AppendKv;
use crate::backend::Backend;

/// Adds the bias and applies the activation to one row of a task's outputs.
#[inline(always)]
pub(super) fn finish_row<S: Simd>(s: S, product: &Product<'_>, outputs: Outputs<'_>, out: &mut [f32]) {
    if let Some(bias) = product.finish.bias {
        add_bias(s, out, bias, outputs.column);
    }
    if let Some(activation) = product.finish.activation {
        activate(s, activation, out);
    }
}

/// `out += bias[first..]`.
#[inline(always)]
fn add_bias<S: Simd>(s: S, out: &mut [f32], bias: Floats<'_>, first: usize) {
    let (whole, rest) = out.as_chunks_mut::<LANES>();
    let done = first + LANES * whole.len();
    for (i, out) in whole.iter_mut().enumerate() {
        *out = s.to_array(s.add(s.lanes(*out), bias.load(s, first + LANES * i, LANES)));
    }
    if !rest.is_empty() {
        let sum = s.add(s.load_partial(rest), bias.load(s, done, rest.len()));
        s.store_partial(sum, rest);
    }
}

// kernel
/// Copies the k and v columns of `qkv`, `[rows, n]`, to the slots of their rows.
pub(super) fn append_kv<B: Backend<Buf = CpuBuf>>(
    pool: &Pool,
    qkv: &[f32],
    n: usize,
    append: AppendKv<'_, B>,
) {
    let AppendKv { kv, layout, slots } = append;
    let slots = &slots.slice::<i32>()[..qkv.len() / n];
    let d_kv = layout.n_kv_heads_local * layout.d_head;
    for (cache, column) in [(&mut kv.k, n - 2 * d_kv), (&mut kv.v, n - d_kv)] {
        let rows = Columns { qkv, n, column, slots };
        match layout.dtype {
            DType::F32 => store::<f32>(pool, rows, layout, cache, |x| x),
            DType::F16 => store(pool, rows, layout, cache, f16::from_f32),
            DType::BF16 => store(pool, rows, layout, cache, bf16::from_f32),
            dtype => unreachable!("a cache of {dtype}"),
        }
    }
}

/// The columns of k or of v, and where each row goes.
#[derive(Clone, Copy)]
struct Columns<'a> {
    qkv: &'a [f32],
    n: usize,
    column: usize,
    slots: &'a [i32],
}

/// Rows from which copying is worth waking the other threads.
const ROWS_MIN: usize = 16;

/// A head is a task: two rows may name the same slot, two heads never share an element.
fn store<T: Element + Sync + Send>(
    pool: &Pool,
    from: Columns<'_>,
    layout: KvLayout,
    cache: &mut CpuBuf,
    convert: impl Fn(f32) -> T + Sync,
) {
    let cache = Disjoint::new(cache.slice_mut::<T>());
    let task = |head: usize| {
        for (row, &slot) in from.slots.iter().enumerate() {
            let Ok(slot) = usize::try_from(slot) else { continue };
            let at = row * from.n + from.column + head * layout.d_head;
            // SAFETY: the elements of a head belong to its task alone.
            let to = unsafe { cache.piece(layout.at(slot, head), layout.d_head) };
            for (to, &x) in to.iter_mut().zip(&from.qkv[at..at + layout.d_head]) {
                *to = convert(x);
            }
        }
    };
    if from.slots.len() < ROWS_MIN {
        (0..layout.n_kv_heads_local).for_each(task);
    } else {
        pool.run(layout.n_kv_heads_local, &task);
    }
}
