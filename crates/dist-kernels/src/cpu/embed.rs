//! Embeddings: rows of the token and position tables, widened and added.

use dist_core::DType;

use super::buf::CpuBuf;
use super::norm::{for_rows, load_or, load_stored, store_at};
use super::pool::{Disjoint, Pool};
use super::simd::{CpuKernels, Kernel, LANES, Simd, Stored, StoredBf16, StoredF16, StoredF32};
use crate::args::{DRAWN, EmbedArgs, Lookup};
use crate::backend::Backend;
use crate::weight::{Layout, Weight};

/// A table with the ids that are looked up in it.
#[derive(Clone, Copy)]
struct Table<'a> {
    ids: &'a [u32],
    drawn: &'a [u32],
    weight: &'a Weight<CpuBuf>,
    offset: u32,
    first: u32,
}

impl<'a> Table<'a> {
    fn new<B: Backend<Buf = CpuBuf>>(lookup: &Lookup<'a, B>, drawn: Option<&'a CpuBuf>) -> Self {
        let Lookup { ids, table, offset, first } = *lookup;
        assert!(table.layout == Layout::Nk, "embed: a table is [n, d] with d contiguous");
        Self { ids: ids.slice(), drawn: drawn.map_or(&[], CpuBuf::slice), weight: table, offset, first }
    }

    /// Where row `row`'s embedding is: the bytes of a part and the element at which it begins.
    fn find(&self, row: usize) -> Option<(&'a [u8], usize)> {
        let id = match self.ids[row] {
            place if !self.drawn.is_empty() && place & DRAWN != 0 => self.drawn[(place & !DRAWN) as usize],
            id => id,
        };
        let id = u64::from(id) + u64::from(self.offset);
        let mut at = usize::try_from(id.checked_sub(u64::from(self.first))?).ok()?;
        for part in &self.weight.parts {
            if at < part.n {
                return Some((part.data.bytes(), at * part.ld));
            }
            at -= part.n;
        }
        None
    }
}

/// Embeds some rows; `row` is the first one's number.
struct Embed<'a> {
    out: &'a mut [f32],
    row: usize,
    d: usize,
    tokens: Option<Table<'a>>,
    positions: Option<Table<'a>>,
}

impl Kernel for Embed<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (idx, out) in self.out.chunks_exact_mut(self.d).enumerate() {
            let row = self.row + idx;
            if let Some(tokens) = self.tokens {
                out.fill(0.0);
                if let Some(source) = tokens.find(row) {
                    add_row(s, out, source, tokens.weight.dtype);
                }
            }
            if let Some(positions) = self.positions {
                let source = positions.find(row).unwrap_or_else(|| {
                    panic!("embed: position {} of row {row} is not in the table", positions.ids[row])
                });
                add_row(s, out, source, positions.weight.dtype);
            }
        }
    }
}

/// Adds the elements from `source.1` on to `out`.
#[inline(always)]
fn add_row<S: Simd>(s: S, out: &mut [f32], source: (&[u8], usize), dtype: DType) {
    match dtype {
        DType::F32 => add_stored::<S, StoredF32>(s, out, source),
        DType::F16 => add_stored::<S, StoredF16>(s, out, source),
        DType::BF16 => add_stored::<S, StoredBf16>(s, out, source),
        _ => panic!("embed: a table of {dtype}"),
    }
}

#[inline(always)]
fn add_stored<S: Simd, T: Stored>(s: S, out: &mut [f32], (bytes, start): (&[u8], usize)) {
    for at in (0..out.len()).step_by(LANES) {
        let x = load_stored::<S, T>(s, bytes, start + at, LANES.min(out.len() - at));
        store_at(s, s.add(load_or(s, out, at, 0.0), x), out, at);
    }
}

// kernel
/// `out = tokens[ids] + positions[ids]`; tokens outside the table's rows contribute zero.
pub(crate) fn embed<B: Backend<Buf = CpuBuf>>(kernels: CpuKernels, pool: &Pool, args: EmbedArgs<'_, B>) {
    let EmbedArgs { out, rows, d, tokens, positions, drawn } = args;
    let out = Disjoint::new(out.f32s_mut());
    let tokens = tokens.as_ref().map(|tokens| Table::new(tokens, drawn));
    let positions = positions.as_ref().map(|positions| Table::new(positions, None));
    for_rows(pool, rows, d, &|row, n| {
        // SAFETY: `for_rows` cuts the rows into ranges that do not overlap.
        let out = unsafe { out.piece(row * d, n * d) };
        kernels.run(Embed { out, row, d, tokens, positions });
    });
}
