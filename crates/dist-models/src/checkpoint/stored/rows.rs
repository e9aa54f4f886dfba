//! Canonical rows: outputs of a tensor as `[outputs, inputs]` in one piece, wherever and however they are stored.

use std::ops::Range;

use dist_core::{DType, TensorSpec};
use dist_kernels::weight::Layout;

use super::cuts::{extend_f32, rect};
use super::{Entry, Source, Stored, overlap};
use crate::checkpoint::error::CheckpointError;

/// Side of the square that is turned at a time: both sides of it stay in the nearest cache.
const TILE: usize = 32;

impl Stored {
    /// Fills `out` with rows `rows` of the canonical tensor, in the type that [`Stored::dtype`] says.
    pub(in crate::checkpoint) fn read_rows(
        &self,
        spec: &TensorSpec,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let entry = self.entry(spec)?;
        self.fill(None, entry, (rows, 0..entry.k()), out)
    }

    /// Fills `out` with outputs × inputs, row-major. Whole tensors of a file are compared to their hash as `compared`.
    pub(super) fn fill(
        &self,
        compared: Option<&str>,
        entry: &Entry,
        (outputs, inputs): (Range<usize>, Range<usize>),
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let mut scratch = Vec::new();
        for source in entry.sources.iter().filter(|source| !source.is_copy) {
            let (o, i) = (overlap(&source.outputs, &outputs), overlap(&source.inputs, &inputs));
            if o.is_empty() || i.is_empty() {
                continue;
            }
            let size = entry.dtype().bytes();
            let at = Window {
                row: o.start - outputs.start,
                col: i.start - inputs.start,
                rows: o.len(),
                cols: i.len(),
                ld: inputs.len(),
                size,
            };
            let rect = rect(source, entry.layout, &o, &i);
            let file = &self.files[source.file];
            if entry.layout == Layout::Nk && at.cols == at.ld && source.dtype == entry.dtype() {
                let start = at.row * at.ld * size;
                let target = &mut out[start..start + at.rows * at.ld * size];
                file.read(rect, source.dtype, target)?;
                compared.map_or(Ok(()), |tensor| file.compare(tensor, std::iter::once(&*target)))?;
                continue;
            }
            scratch.resize(rect.rows * rect.cols * source.dtype.bytes(), 0);
            file.read(rect, source.dtype, &mut scratch)?;
            if let Some(tensor) = compared.filter(|_| rect.cols == rect.ld) {
                file.compare(tensor, std::iter::once(scratch.as_slice()))?;
            }
            widen(source, entry.dtype(), &mut scratch);
            match entry.layout {
                Layout::Nk => at.scatter(&scratch, out),
                Layout::Kn => at.turn(&scratch, out),
            }
        }
        Ok(())
    }
}

/// Parts of a vector that differ in type become f32.
fn widen(source: &Source, dtype: DType, bytes: &mut Vec<u8>) {
    if source.dtype == dtype {
        return;
    }
    let mut wide = Vec::new();
    extend_f32(&mut wide, bytes, source.dtype);
    bytes.clear();
    bytes.extend(wide.iter().flat_map(|x| x.to_le_bytes()));
}

/// Where a piece goes in a row-major matrix.
#[derive(Clone, Copy)]
struct Window {
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
    /// Elements of a row of the matrix.
    ld: usize,
    /// Bytes of an element.
    size: usize,
}

impl Window {
    /// Row by row.
    fn scatter(self, piece: &[u8], out: &mut [u8]) {
        let width = self.cols * self.size;
        for (row, piece) in piece.chunks_exact(width).enumerate() {
            let start = ((self.row + row) * self.ld + self.col) * self.size;
            out[start..start + width].copy_from_slice(piece);
        }
    }

    /// The piece lies `[cols, rows]`.
    fn turn(self, piece: &[u8], out: &mut [u8]) {
        if self.size == 2 { self.turn_cells::<2>(piece, out) } else { self.turn_cells::<4>(piece, out) }
    }

    fn turn_cells<const N: usize>(self, piece: &[u8], out: &mut [u8]) {
        let (piece, _) = piece.as_chunks::<N>();
        let (out, _) = out.as_chunks_mut::<N>();
        for col in (0..self.cols).step_by(TILE) {
            let cols = col..(col + TILE).min(self.cols);
            for row in (0..self.rows).step_by(TILE) {
                for r in row..(row + TILE).min(self.rows) {
                    let line = &mut out[(self.row + r) * self.ld + self.col..][cols.clone()];
                    for (cell, c) in line.iter_mut().zip(cols.clone()) {
                        *cell = piece[c * self.rows + r];
                    }
                }
            }
        }
    }
}
