//! Sharded tensor types: which part of which tensor belongs to which rank.
//!
//! [`TensorSpec::slice`] is the one place where a tensor is cut. Export, shard, load, reshard and the planner's byte
//! count all ask it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::DType;
use crate::shape::split_even;

/// Who holds a tensor along the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The first stage.
    Embed,
    /// The stage that runs this layer.
    Layer(usize),
    /// The last stage.
    Head,
}

/// One of the stacked matrices along a cut dimension, cut by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Length along the dimension.
    pub len: usize,
    /// What is never cut through: a head's width, a quantisation group; divides `len`.
    pub unit: usize,
    /// With fewer units than ranks: several ranks hold the same unit (grouped KV heads) instead of some holding none.
    pub replicate_if_short: bool,
    /// Every rank's share is padded to the longest one (vocabulary), so that gathered pieces are of one size.
    pub padded: bool,
}

/// How a tensor lies over the tensor-parallel ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Whole on every rank.
    Replicated,
    /// Cut along one dimension, each part by itself.
    Sharded {
        /// The dimension.
        dim: usize,
        /// What is stacked along it.
        parts: Vec<Part>,
    },
}

/// A tensor of the model: its canonical name, type, global shape and how it is cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Canonical name, e.g. `layers.3.attn.qkv.weight`.
    pub name: String,
    /// Stored type.
    pub dtype: DType,
    /// Global shape, row-major; weights are `[outputs, inputs]`.
    pub shape: Vec<usize>,
    /// How it lies over the tensor-parallel ranks.
    pub placement: Placement,
    /// Who holds it along the pipeline.
    pub owner: Owner,
}

/// What one rank holds of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSlice {
    /// The dimension of the cut; ranges cover all of it where the tensor is replicated.
    pub dim: usize,
    /// Ranges along `dim` in global indices, one a part, in order; empty where the rank holds none of a part.
    pub ranges: Vec<Range<usize>>,
    /// Zero rows to append along `dim`, so that all ranks' shares have one size.
    pub n_padding: usize,
}

impl TensorSlice {
    /// Local length along the cut, padding included.
    #[must_use]
    pub fn local_len(&self) -> usize {
        self.ranges.iter().map(ExactSizeIterator::len).sum::<usize>() + self.n_padding
    }
}

impl TensorSpec {
    /// Elements of the whole tensor.
    #[must_use]
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of the whole tensor.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.n_elements() * self.dtype.bytes()
    }

    /// What rank `tp_rank` of `tp` holds. Units are dealt evenly; the first ranks hold one more where they do not
    /// divide.
    #[must_use]
    pub fn slice(&self, tp: usize, tp_rank: usize) -> TensorSlice {
        let Placement::Sharded { dim, parts } = &self.placement else {
            let whole = 0..self.shape[0];
            return TensorSlice { dim: 0, ranges: Vec::from([whole]), n_padding: 0 };
        };
        let (mut ranges, mut base, mut n_padding) = (Vec::with_capacity(parts.len()), 0, 0);
        for part in parts {
            let n_units = part.len / part.unit;
            let (first, count) = if part.replicate_if_short && n_units < tp {
                (tp_rank * n_units / tp, 1)
            } else if part.padded {
                // Full shares first, so that the padding of all ranks gathers at the very end.
                let share = n_units.div_ceil(tp);
                let first = (tp_rank * share).min(n_units);
                (first, share.min(n_units - first))
            } else {
                split_even(n_units, tp, tp_rank)
            };
            ranges.push(base + first * part.unit..base + (first + count) * part.unit);
            if part.padded {
                n_padding += (n_units.div_ceil(tp) - count) * part.unit;
            }
            base += part.len;
        }
        TensorSlice { dim: *dim, ranges, n_padding }
    }

    /// Local shape of rank `tp_rank` of `tp`, padding included.
    #[must_use]
    pub fn local_shape(&self, tp: usize, tp_rank: usize) -> Vec<usize> {
        let slice = self.slice(tp, tp_rank);
        let mut shape = self.shape.clone();
        shape[slice.dim] = slice.local_len();
        shape
    }

    /// Byte ranges of the row-major global tensor that rank `tp_rank` of `tp` holds, in the order of its local
    /// row-major layout; padding is not in the file and so not among them. Neighbouring ranges are joined.
    #[must_use]
    pub fn byte_ranges(&self, tp: usize, tp_rank: usize) -> Vec<Range<usize>> {
        let slice = self.slice(tp, tp_rank);
        let outer: usize = self.shape[..slice.dim].iter().product();
        let inner: usize = self.shape[slice.dim + 1..].iter().product::<usize>() * self.dtype.bytes();
        let stride = self.shape[slice.dim] * inner;
        let mut out: Vec<Range<usize>> = Vec::new();
        for row in 0..outer {
            for range in slice.ranges.iter().filter(|range| !range.is_empty()) {
                let (start, end) = (row * stride + range.start * inner, row * stride + range.end * inner);
                match out.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => out.push(start..end),
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(shape: &[usize], dim: usize, parts: Vec<Part>) -> TensorSpec {
        let placement = Placement::Sharded { dim, parts };
        TensorSpec {
            name: "t".into(),
            dtype: DType::BF16,
            shape: shape.into(),
            placement,
            owner: Owner::Embed,
        }
    }

    fn part(len: usize, unit: usize) -> Part {
        Part { len, unit, replicate_if_short: false, padded: false }
    }

    #[test]
    fn fused_qkv_is_cut_by_whole_heads_in_each_of_its_three() {
        let qkv = spec(&[36, 5], 0, vec![part(12, 4), part(12, 4), part(12, 4)]);
        assert_eq!(qkv.slice(2, 0).ranges, [0..8, 12..20, 24..32]);
        assert_eq!(qkv.slice(2, 1).ranges, [8..12, 20..24, 32..36]);
        assert_eq!(qkv.local_shape(2, 1), [12, 5]);
    }

    #[test]
    fn few_kv_heads_are_held_by_several_ranks() {
        let kv = Part { replicate_if_short: true, ..part(8, 4) };
        let held: Vec<_> =
            (0..4).map(|rank| spec(&[8, 3], 0, vec![kv.clone()]).slice(4, rank).ranges).collect();
        let held: Vec<_> = held.iter().map(|ranges| (ranges[0].start, ranges[0].end)).collect();
        assert_eq!(held, [(0, 4), (0, 4), (4, 8), (4, 8)]);
    }

    fn one_range(range: Range<usize>, n_padding: usize) -> TensorSlice {
        TensorSlice { dim: 0, ranges: Vec::from([range]), n_padding }
    }

    #[test]
    fn vocabulary_is_padded_to_equal_shares() {
        let vocab = spec(&[10, 2], 0, vec![Part { padded: true, ..part(10, 1) }]);
        let shapes: Vec<_> = (0..4).map(|rank| vocab.local_shape(4, rank)[0]).collect();
        assert_eq!(shapes, [3, 3, 3, 3]);
        assert_eq!(vocab.slice(4, 3), one_range(9..10, 2));
    }

    proptest! {
        /// Shard, then gather by scattering every rank's bytes back: the identity, and no byte has two owners.
        #[test]
        fn shard_then_gather_is_identity(
            units in prop::collection::vec((1_usize..9, 1_usize..5), 1..4),
            other in 1_usize..7, dim in 0_usize..2, tp in 1_usize..9,
        ) {
            let parts: Vec<Part> = units.iter().map(|&(n, unit)| part(n * unit, unit)).collect();
            let len: usize = parts.iter().map(|part| part.len).sum();
            let shape = if dim == 0 { [len, other] } else { [other, len] };
            let spec = spec(&shape, dim, parts);
            let mut owners = vec![0_u32; spec.n_bytes()];
            for rank in 0..tp {
                let ranges = spec.byte_ranges(tp, rank);
                let held: usize = ranges.iter().map(ExactSizeIterator::len).sum();
                prop_assert_eq!(held, spec.local_shape(tp, rank).iter().product::<usize>() * 2);
                for range in ranges {
                    owners[range].iter_mut().for_each(|owner| *owner += 1);
                }
            }
            prop_assert!(owners.iter().all(|&owner| owner == 1));
        }
    }
}
