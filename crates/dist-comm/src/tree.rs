//! The one order in which partial sums are added: a balanced tree over rank index. Which algorithm moved them here, and
//! in what pieces, cannot change a bit.

use dist_core::shape::tree_split;

/// Elements that are added at a time; the tree's intermediate sums live on the stack.
const BLOCK: usize = 256;

/// `out = Σ parts`, elementwise; all are little-endian `f32` of one length, any alignment.
///
/// The tree is cut by [`tree_split`]: `sum(0..n) = sum(0..left) + sum(left..n)`.
pub(crate) fn sum(out: &mut [u8], parts: &[&[u8]]) {
    let mut total = [0.0; BLOCK];
    for (block, out) in out.chunks_mut(4 * BLOCK).enumerate() {
        let start = 4 * BLOCK * block;
        let total = &mut total[..out.len() / 4];
        sum_block(total, parts, start);
        for (bytes, value) in out.chunks_exact_mut(4).zip(total) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// `own = Σ parts` with `own` in the place of `parts[me]`, which is not read; for what is added where it lies.
pub(crate) fn sum_in_place(own: &mut [u8], me: usize, parts: &[&[u8]], scratch: &mut [u8]) {
    // Of two numbers either may come first.
    if let (0 | 1, [_, _]) = (me, parts) {
        let other = parts[1 - me];
        for (own, other) in own.chunks_exact_mut(4).zip(other.chunks_exact(4)) {
            let sum = value(own) + value(other);
            own.copy_from_slice(&sum.to_le_bytes());
        }
        return;
    }
    let scratch = &mut scratch[..own.len()];
    let parts: Vec<&[u8]> =
        parts.iter().enumerate().map(|(idx, part)| if idx == me { &*own } else { *part }).collect();
    sum(scratch, &parts);
    own.copy_from_slice(scratch);
}

fn value(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn sum_block(total: &mut [f32], parts: &[&[u8]], start: usize) {
    let end = start + 4 * total.len();
    // The small trees are written out: fewer passes over the block, the same sums.
    match parts {
        [part] => {
            for (total, part) in total.iter_mut().zip(part[start..end].chunks_exact(4)) {
                *total = value(part);
            }
        }
        [a, b] => {
            let (a, b) = (a[start..end].chunks_exact(4), b[start..end].chunks_exact(4));
            for ((total, a), b) in total.iter_mut().zip(a).zip(b) {
                *total = value(a) + value(b);
            }
        }
        _ => {
            let (left, right) = parts.split_at(tree_split(parts.len()));
            sum_block(total, left, start);
            let mut other = [0.0; BLOCK];
            let other = &mut other[..total.len()];
            sum_block(other, right, start);
            for (total, other) in total.iter_mut().zip(other) {
                *total += *other;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `1e8` swallows a lone `1` in `f32`, so that where each `1` was added shows in the result.
    #[test]
    fn three_ranks_add_the_first_two_first() {
        let parts = [1e8_f32, 4.0, 4.0].map(f32::to_le_bytes);
        let parts: Vec<&[u8]> = parts.iter().map(<[u8; 4]>::as_slice).collect();
        let mut out = [0; 4];
        sum(&mut out, &parts);
        assert_eq!(f32::from_le_bytes(out).to_bits(), ((1e8_f32 + 4.0) + 4.0).to_bits());
    }
}
