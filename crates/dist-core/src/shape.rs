//! Integer arithmetic on shapes, each operation under one name; nothing here knows what it counts.

/// `a / b` if `b` divides `a` without rest, else `None`; also `None` for `b == 0`.
#[must_use]
pub const fn div_exact(a: usize, b: usize) -> Option<usize> {
    if b != 0 && a.is_multiple_of(b) { Some(a / b) } else { None }
}

/// The number of `b`-sized pieces that cover `a`; `b` must not be zero.
#[must_use]
pub const fn div_ceil(a: usize, b: usize) -> usize {
    a.div_ceil(b)
}

/// The smallest multiple of `b` that is not below `a`; `b` must not be zero.
#[must_use]
pub const fn align_up(a: usize, b: usize) -> usize {
    a.div_ceil(b) * b
}

/// Cuts `total` into `pieces` consecutive ranges whose lengths differ by at most one; the first ones are longer.
///
/// Returns `(start, len)` of piece `idx`. With fewer units than pieces the last pieces are empty.
#[must_use]
pub const fn split_even(total: usize, pieces: usize, idx: usize) -> (usize, usize) {
    let (base, rest) = (total / pieces, total % pieces);
    let start = idx * base + if idx < rest { idx } else { rest };
    (start, base + (idx < rest) as usize)
}

/// How many of `n` summands the left half of the one balanced tree takes, for `n` from two on: the largest power of
/// two below `n`.
///
/// Every sum over ranks and over segments of a dimension adds `sum(left) + sum(right)` with this cut, again and again
/// down to single summands. So four ranks that each added two segments have the bits of one rank that added eight.
#[must_use]
pub const fn tree_split(n: usize) -> usize {
    assert!(n >= 2, "one summand is not split");
    n.next_power_of_two() / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_has_three_names() {
        assert_eq!((div_exact(12, 4), div_exact(13, 4), div_exact(1, 0)), (Some(3), None, None));
        assert_eq!((div_ceil(13, 4), align_up(13, 4), align_up(12, 4)), (4, 16, 12));
    }

    #[test]
    fn the_tree_is_cut_at_the_largest_power_of_two_below() {
        assert_eq!([2, 3, 4, 5, 6, 7, 8, 9].map(tree_split), [1, 2, 2, 4, 4, 4, 4, 8]);
    }

    #[test]
    fn even_split_covers_everything_once() {
        for total in 0..40 {
            for pieces in 1..9 {
                let mut next = 0;
                for idx in 0..pieces {
                    let (start, len) = split_even(total, pieces, idx);
                    assert_eq!(start, next);
                    next += len;
                }
                assert_eq!(next, total);
            }
        }
    }
}
