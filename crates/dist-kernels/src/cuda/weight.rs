//! How a checkpoint's weight becomes one matrix of 16-bit elements on the GPU: rows are outputs, inputs lie side by
//! side, and rows begin at multiples of 16 bytes.
//!
//! The work is cut into pieces of bytes, so that several threads can fill one pinned buffer each.

use std::io;
use std::ops::Range;

use dist_core::DType;
use half::{bf16, f16};

use crate::weight::{HostPart, HostWeight, Layout};

/// Elements from one row to the next: a multiple of 16 bytes.
pub(super) fn row_elements(k: usize) -> usize {
    k.next_multiple_of(8)
}

/// Writes the bytes of the whole matrix from `from` on, as many as `dst` takes.
pub(super) fn copy_bytes(weight: &HostWeight, from: usize, dtype: DType, dst: &mut [u8]) -> io::Result<()> {
    let row_bytes = row_elements(weight.k) * dtype.bytes();
    let (mut row, mut dst) = (from / row_bytes, dst);
    let mut line = Vec::new();
    // A row that began before, or ends later, is made whole beside.
    let mut part = |row: usize, at: usize, dst: &mut [u8]| {
        line.resize(row_bytes, 0);
        copy_rows(weight, row..row + 1, dtype, &mut line)?;
        dst.copy_from_slice(&line[at..at + dst.len()]);
        io::Result::Ok(())
    };
    let begun = from % row_bytes;
    if begun > 0 {
        let (first, rest) = dst.split_at_mut(dst.len().min(row_bytes - begun));
        part(row, begun, first)?;
        (row, dst) = (row + 1, rest);
    }
    let n_rows = dst.len() / row_bytes;
    let (whole, last) = dst.split_at_mut(n_rows * row_bytes);
    if n_rows > 0 {
        copy_rows(weight, row..row + n_rows, dtype, whole)?;
    }
    if !last.is_empty() {
        part(row + n_rows, 0, last)?;
    }
    Ok(())
}

/// Writes rows `rows` of the whole weight, `row_elements(k)` elements each, to `dst` as `dtype`.
fn copy_rows(weight: &HostWeight, rows: Range<usize>, dtype: DType, dst: &mut [u8]) -> io::Result<()> {
    let mut first = 0;
    for part in &weight.parts {
        let (from, to) = (rows.start.max(first), rows.end.min(first + part.n));
        if from < to {
            let at = (from - rows.start) * row_elements(weight.k) * dtype.bytes();
            copy_part(weight, part, from - first..to - first, dtype, &mut dst[at..])?;
        }
        first += part.n;
    }
    Ok(())
}

fn copy_part(
    weight: &HostWeight,
    part: &HostPart,
    rows: Range<usize>,
    dtype: DType,
    dst: &mut [u8],
) -> io::Result<()> {
    let (k, ld) = (weight.k, row_elements(weight.k));
    let size = weight.dtype.bytes();
    match weight.layout {
        Layout::Nk if weight.dtype == dtype && part.ld == k && k == ld => {
            let range = rows.start * k * size..rows.end * k * size;
            part.bytes.copy_to(part.offset + range.start, &mut dst[..range.len()])?;
        }
        Layout::Nk => {
            let bytes = &part.bytes.as_slice()[part.offset..];
            for (row, out) in rows.zip(dst.chunks_exact_mut(ld * dtype.bytes())) {
                let row = &bytes[row * part.ld * size..][..k * size];
                let (values, rest) = out.split_at_mut(k * dtype.bytes());
                cast(row, weight.dtype, values, dtype);
                rest.fill(0);
            }
        }
        Layout::Kn => {
            let bytes = &part.bytes.as_slice()[part.offset..];
            transpose(bytes, (weight.dtype, part.ld, k), rows, dtype, dst);
        }
    }
    Ok(())
}

/// Columns of `[k, n]` as rows, a square at a time so that both sides stay in the cache.
fn transpose(
    bytes: &[u8],
    (from, part_ld, k): (DType, usize, usize),
    columns: Range<usize>,
    dtype: DType,
    dst: &mut [u8],
) {
    const SIDE: usize = 64;
    let (ld, size, width) = (row_elements(k), from.bytes(), dtype.bytes());
    let mut line = [0_u8; SIDE * 4];
    for first in columns.clone().step_by(SIDE) {
        let n = SIDE.min(columns.end - first);
        for i in 0..k {
            let source = &bytes[(i * part_ld + first) * size..][..n * size];
            cast(source, from, &mut line[..n * width], dtype);
            for (j, value) in line[..n * width].chunks_exact(width).enumerate() {
                let at = ((first - columns.start + j) * ld + i) * width;
                dst[at..at + width].copy_from_slice(value);
            }
        }
        for j in 0..n {
            let row = (first - columns.start + j) * ld;
            dst[(row + k) * width..(row + ld) * width].fill(0);
        }
    }
}

/// Copies elements, rounding to the nearest where the types differ.
fn cast(src: &[u8], from: DType, dst: &mut [u8], to: DType) {
    if from == to {
        dst.copy_from_slice(src);
        return;
    }
    let value = |bytes: &[u8]| match from {
        DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        DType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        _ => unreachable!("weights are floats"),
    };
    let pairs = src.chunks_exact(from.bytes()).zip(dst.chunks_exact_mut(to.bytes()));
    match to {
        DType::F16 => pairs.for_each(|(s, d)| d.copy_from_slice(&f16::from_f32(value(s)).to_le_bytes())),
        DType::BF16 => pairs.for_each(|(s, d)| d.copy_from_slice(&bf16::from_f32(value(s)).to_le_bytes())),
        DType::F32 => pairs.for_each(|(s, d)| d.copy_from_slice(&value(s).to_le_bytes())),
        _ => unreachable!("weights are floats"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::HostBytes;

    fn host(values: &[f32]) -> HostBytes {
        HostBytes::new(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    }

    fn values(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    }

    #[test]
    fn parts_are_stacked_padded_and_cut_anywhere() {
        // Two parts of 2 and 1 outputs, 3 inputs, the first one cut from rows of 4.
        let first =
            HostPart { bytes: host(&[9.0, 1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0]), offset: 4, n: 2, ld: 4 };
        let second = HostPart { bytes: host(&[7.0, 8.0, 10.0]), offset: 0, n: 1, ld: 3 };
        let weight = HostWeight { parts: vec![first, second], dtype: DType::F32, layout: Layout::Nk, k: 3 };
        let mut dst = vec![0xff; 2 * 8 * 2];
        copy_rows(&weight, 1..3, DType::BF16, &mut dst).unwrap();
        let expected = [4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0, 8.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(values(&dst), expected);
    }

    #[test]
    fn pieces_may_begin_and_end_inside_rows() {
        let stored: Vec<f32> = (0..7 * 5).map(|i| i as f32).collect();
        for layout in [Layout::Nk, Layout::Kn] {
            let (n, k, ld) = if layout == Layout::Nk { (7, 5, 5) } else { (5, 7, 5) };
            let part = HostPart { bytes: host(&stored), offset: 0, n, ld };
            let weight = HostWeight { parts: vec![part], dtype: DType::F32, layout, k };
            let mut whole = vec![0xff; n * 8 * 2];
            copy_rows(&weight, 0..n, DType::BF16, &mut whole).unwrap();
            for size in [1, 3, 15, 16, 17, 40, whole.len()] {
                let mut pieces = vec![0xff; whole.len()];
                for (i, piece) in pieces.chunks_mut(size).enumerate() {
                    copy_bytes(&weight, i * size, DType::BF16, piece).unwrap();
                }
                assert_eq!(pieces, whole, "{layout:?} by {size} bytes");
            }
        }
    }

    #[test]
    fn outputs_side_by_side_are_transposed() {
        let (k, n, ld) = (5, 150, 153);
        let stored: Vec<f32> =
            (0..k * ld).map(|i| if i % ld < n { (i % ld + i / ld * 7) as f32 } else { 1e9 }).collect();
        let part = HostPart { bytes: host(&stored), offset: 0, n, ld };
        let weight = HostWeight { parts: vec![part], dtype: DType::F32, layout: Layout::Kn, k };
        let mut dst = vec![0xff; 100 * 8 * 2];
        copy_rows(&weight, 30..130, DType::BF16, &mut dst).unwrap();
        for (row, found) in values(&dst).chunks(8).enumerate() {
            let expected: Vec<f32> =
                (0..8).map(|i| if i < k { (row + 30 + i * 7) as f32 } else { 0.0 }).collect();
            assert_eq!(found, expected, "row {row}");
        }
    }
}
