//! Which tile of `gemm_hopper` multiplies many rows: the least time that a simple model foretells. KERNELS.md has the model
//! and what was measured.

use crate::cuda::plans::bucket;

/// A tile: its symbol, rows, outputs, and nanoseconds that 64 inputs take it (one H100, measured).
type Tile = (&'static str, usize, usize, f64);

const TILES: [Tile; 9] = [
    ("gemm_hopper_t128x64", 128, 64, 270.0),
    ("gemm_hopper_t128x96", 128, 96, 310.0),
    ("gemm_hopper_t128x128", 128, 128, 385.0),
    ("gemm_hopper_t128x160", 128, 160, 470.0),
    ("gemm_hopper_t128x192", 128, 192, 575.0),
    ("gemm_hopper_t128x256", 128, 256, 735.0),
    ("gemm_hopper_t256x64", 256, 64, 490.0),
    ("gemm_hopper_t256x96", 256, 96, 600.0),
    ("gemm_hopper_t256x128", 256, 128, 735.0),
];
/// Clusters of tiles, rows by columns.
const CLUSTERS: [(usize, usize); 6] = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 1)];
const SPLITS: [usize; 4] = [1, 2, 3, 4];
/// Rows that share what L2 holds.
const GROUP_ROWS: usize = 2048;
/// Up to so many rows tiles begin at different places of k.
const SPREAD_ROWS: usize = 256;

/// A launch of `gemm_hopper`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::cuda) struct Gemm {
    /// Without its type.
    pub(in crate::cuda) symbol: &'static str,
    /// Rows and outputs of a tile.
    pub(in crate::cuda) tile: (usize, usize),
    /// Tiles of a cluster: below each other, beside each other.
    pub(in crate::cuda) cluster: (usize, usize),
    /// Parts of the inputs.
    pub(in crate::cuda) splits: usize,
    /// Clusters of rows that are taken together.
    pub(in crate::cuda) group: usize,
    /// Whether tiles begin at different places of k.
    pub(in crate::cuda) spread: bool,
    /// Clusters of the launch.
    pub(in crate::cuda) clusters: usize,
    /// Nanoseconds of a tile's 64 inputs.
    ns: f64,
}

/// Clusters of `size` blocks that an H100 holds at once, for `n_sms` multiprocessors; not all of its parts are whole.
pub(super) fn clusters_at_once(size: usize, n_sms: usize) -> Option<usize> {
    let of_132 = match size {
        1 => 132,
        2 => 66,
        3 => 39,
        4 => 30,
        6 => 17,
        8 => 15,
        _ => return None,
    };
    Some((of_132 * n_sms / 132).max(1))
}

impl Gemm {
    fn size(&self) -> usize {
        self.cluster.0 * self.cluster.1 * self.splits
    }

    /// Clusters that all outputs of `rows` rows take.
    fn tiles(&self, rows: usize, n: usize) -> usize {
        rows.div_ceil(self.tile.0 * self.cluster.0) * n.div_ceil(self.tile.1 * self.cluster.1)
    }

    /// Whether the kernel takes it.
    fn is_allowed(&self, rows: usize, n: usize, k: usize, at_once: usize) -> bool {
        let ((bm, bn), (below, beside)) = (self.tile, self.cluster);
        let halves = rows.div_ceil(128);
        let is_small = bm == 128 && bn <= 128;
        // The parts of a tile's inputs must run at once, and the largest tiles have no room for others' sums.
        let splits_fit = self.splits == 1
            || (self.tiles(rows, n) <= at_once && bm == 128 && bn < 256 && self.splits <= k.div_ceil(64));
        (bm == 128 || (halves > 1 && halves.is_multiple_of(2)))
            && below <= rows.div_ceil(bm)
            && (below.max(beside) < 4 || is_small)
            && (bn / below).is_multiple_of(8)
            && splits_fit
    }

    /// Microseconds that it is foretold to take.
    fn time(&self, rows: usize, n: usize, k: usize, at_once: usize) -> f64 {
        let ((bm, bn), (below, beside)) = (self.tile, self.cluster);
        let steps = k.div_ceil(64).div_ceil(self.splits) as f64;
        let l2 = (bm.min(rows) / beside + bn / below) as f64 * 128.0 / 58.0;
        let us_step = self.ns.max(l2) / 1e3;
        let groups_below = rows.div_ceil(bm * below);
        let part = |now: usize| {
            let columns = now as f64 / groups_below.min(now) as f64;
            let weight = columns * (beside * self.splits * bn) as f64 * steps * 128.0;
            let x = (now * self.size() * bm / beside) as f64 * steps * 128.0;
            (steps * us_step).max(weight / 2.95e6 + x / 25e6) + 0.5 + 3.0 * (bm * bn) as f64 / 32768.0
        };
        let tiles = self.tiles(rows, n);
        let rest = if tiles.is_multiple_of(at_once) { 0.0 } else { part(tiles % at_once) };
        (tiles / at_once) as f64 * part(at_once) + rest + 3.0 + if self.splits > 1 { 5.0 } else { 0.0 }
    }
}

/// The launch for `rows` rows. What it is depends on the bucket of rows only, and so do the bits of a row.
pub(in crate::cuda) fn gemm(rows: usize, n: usize, k: usize, n_sms: usize) -> Gemm {
    let planned = bucket(rows).unwrap_or(rows);
    let (mut best, mut least) = (None, f64::INFINITY);
    for (symbol, bm, bn, ns) in TILES {
        for cluster in CLUSTERS {
            for splits in SPLITS {
                let group = (GROUP_ROWS / (bm * cluster.0)).max(1);
                let (tile, spread, clusters) = ((bm, bn), planned <= SPREAD_ROWS, 0);
                let one = Gemm { symbol, tile, cluster, splits, group, spread, clusters, ns };
                let Some(at_once) = clusters_at_once(one.size(), n_sms) else { continue };
                if !one.is_allowed(planned, n, k, at_once) {
                    continue;
                }
                let us = one.time(planned, n, k, at_once);
                if us < least {
                    let tiles = one.tiles(rows, n);
                    let clusters = if splits > 1 { tiles } else { tiles.min(at_once) };
                    (best, least) = (Some(Gemm { clusters, ..one }), us);
                }
            }
        }
    }
    best.expect("the first tile takes every shape")
}

#[cfg(test)]
mod tests {
    use super::super::tests::has;
    use super::*;

    #[test]
    fn gemms_have_tiles_that_fit_their_rows() {
        for rows in [65, 128, 129, 300, 1024, 8192] {
            for (n, k) in [(40, 64), (4096, 4096), (12288, 4096), (4096, 16384), (50257, 768)] {
                let choice = gemm(rows, n, k, 132);
                assert!(has("gemm_hopper", choice.symbol), "{choice:?}");
                let blocks = choice.clusters * choice.cluster.0 * choice.cluster.1 * choice.splits;
                assert!(blocks <= 132, "{choice:?}");
                assert!(choice.tile.0 == 128 || rows > 128, "{rows} rows: {choice:?}");
            }
        }
        // Little to do is shared by more blocks, along the inputs.
        assert!(gemm(128, 4096, 16384, 132).splits > 1);
        assert_eq!(gemm(8192, 16384, 4096, 132).splits, 1);
    }

    #[test]
    fn a_choice_is_that_of_its_bucket() {
        let same = |a: Gemm, b: Gemm| Gemm { clusters: 0, ..a } == Gemm { clusters: 0, ..b };
        for (n, k) in [(4096, 4096), (12288, 4096), (2048, 8192), (50257, 5120)] {
            assert!(same(gemm(65, n, k, 132), gemm(128, n, k, 132)));
            assert!(same(gemm(600, n, k, 132), gemm(1024, n, k, 132)));
        }
    }
}
