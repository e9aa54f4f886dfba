//! The canonical order in which `linear` adds: a value, so that every kernel asks here and none has its own.
//!
//! `k` is cut in segments by `split_even`. In a segment element `j` belongs to lane `j % 8`; each lane is one chain of
//! fused multiply-adds in increasing `j` from +0, and the last, incomplete step of eight is filled up with zeros. The
//! lanes of a segment are added as [`Simd::sum`](super::simd::Simd::sum) says, and the segments by [`tree_sum`].

use dist_core::shape::{align_up, split_even};

use super::simd::LANES;

/// Partial sums that wait for their other half, at most, while up to eight segments are added in order.
pub(super) const LEVELS: usize = 4;

/// Segments of `k`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segments {
    pub(super) k: usize,
    pub(super) count: usize,
}

impl Segments {
    /// First element and length of segment `idx`.
    #[inline(always)]
    pub(super) fn range(self, idx: usize) -> (usize, usize) {
        split_even(self.k, self.count, idx)
    }

    /// Length of the longest segment, in whole steps of eight: the first is never shorter than the others.
    pub(super) fn padded_len(self) -> usize {
        align_up(self.range(0).1, LANES)
    }

    /// How many waiting partial sums segment `idx` completes, added from the left to it, newest first.
    #[inline(always)]
    pub(super) fn merges(self, idx: usize) -> usize {
        if idx + 1 == self.count { idx.count_ones() as usize } else { idx.trailing_ones() as usize }
    }
}

/// Adds partial sums in a balanced tree: the left half is the largest power of two below the count.
///
/// A rank that holds `8 / tp` of eight segments adds a subtree, so ranks that add their sums by this rule over the rank
/// index get the bits of one rank, for every power of two. All-reduce follows the same rule.
#[cfg(test)]
pub(super) fn tree_sum(sums: &[f32]) -> f32 {
    match sums {
        [] => 0.0,
        [sum] => *sum,
        _ => {
            let (left, right) = sums.split_at(sums.len().next_power_of_two() / 2);
            tree_sum(left) + tree_sum(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds as the kernels do, segment by segment.
    fn add_in_order(sums: &[f32]) -> f32 {
        let segments = Segments { k: 1000, count: sums.len() };
        let mut waiting = Vec::new();
        for (idx, &sum) in sums.iter().enumerate() {
            let merged = (0..segments.merges(idx)).fold(sum, |sum, _| waiting.pop().unwrap() + sum);
            waiting.push(merged);
            assert!(waiting.len() <= LEVELS);
        }
        assert_eq!(waiting.len(), 1);
        waiting[0]
    }

    #[test]
    fn adding_in_order_makes_the_tree() {
        let sums: Vec<f32> = (0..8_i16).map(|i| 0.1 * f32::from(i * i * i - 40)).collect();
        for count in 1..=8 {
            for first in 0..=8 - count {
                let sums = &sums[first..first + count];
                assert_eq!(add_in_order(sums).to_bits(), tree_sum(sums).to_bits(), "{count}");
            }
        }
    }

    #[test]
    fn halves_of_the_tree_are_the_trees_of_the_halves() {
        let sums: Vec<f32> = (0..8_i16).map(|i| 0.3 * f32::from(i - 3) + 1e-3).collect();
        for parts in [1, 2, 4, 8] {
            let of_ranks: Vec<f32> = sums.chunks(8 / parts).map(tree_sum).collect();
            assert_eq!(tree_sum(&of_ranks).to_bits(), tree_sum(&sums).to_bits());
        }
    }

    #[test]
    fn segments_of_a_part_are_segments_of_the_whole() {
        for k in 0..200 {
            for parts in [2, 4, 8] {
                let whole = Segments { k, count: 8 };
                let mut start = 0;
                for part in 0..parts {
                    let per_part = 8 / parts;
                    let len = (0..per_part).map(|i| whole.range(part * per_part + i).1).sum();
                    let local = Segments { k: len, count: per_part };
                    for i in 0..per_part {
                        let (at, n) = local.range(i);
                        assert_eq!((start + at, n), whole.range(part * per_part + i));
                    }
                    start += len;
                }
            }
        }
    }
}
