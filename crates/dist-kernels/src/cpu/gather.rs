//! Picks rows: the last one of each sequence before the head is applied.

use super::buf::CpuBuf;
use super::norm::for_rows;
use super::pool::{Disjoint, Pool};
use crate::args::GatherRowsArgs;
use crate::backend::Backend;

// kernel
/// `out[i] = x[indices[i]]`, row by row.
pub(crate) fn gather_rows<B: Backend<Buf = CpuBuf>>(pool: &Pool, args: GatherRowsArgs<'_, B>) {
    let GatherRowsArgs { out, x, indices, n_out, rows, d } = args;
    let (out, x, indices) = (Disjoint::new(out.f32s_mut()), x.f32s(), indices.slice::<u32>());
    for_rows(pool, n_out, d, &|first, n| {
        // SAFETY: `for_rows` cuts the rows into ranges that do not overlap.
        let out = unsafe { out.piece(first * d, n * d) };
        for (out, &row) in out.chunks_exact_mut(d).zip(&indices[first..]) {
            let row = row as usize;
            assert!(row < rows, "gather_rows: row {row} of {rows}");
            out.copy_from_slice(&x[row * d..][..d]);
        }
    });
}
