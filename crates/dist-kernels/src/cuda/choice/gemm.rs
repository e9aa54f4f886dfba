//! Which tile of `gemm_hopper` multiplies many rows: the least time that a simple model foretells. KERNELS.md has the model
//! and what was measured.

#[cfg(test)]
mod timed;

use std::collections::HashMap;

use super::streaming::Chip;
use crate::cuda::plans::bucket;

/// A tile: its symbol, rows and outputs.
type Tile = (&'static str, usize, usize);

/// The unit of tiles of up to 128 outputs, and that of wider ones.
const UNITS: [&str; 2] = ["gemm_hopper", "gemm_hopper_wide"];

const TILES: [Tile; 6] = [
    ("gemm_hopper_t128x64", 128, 64),
    ("gemm_hopper_t128x96", 128, 96),
    ("gemm_hopper_t128x128", 128, 128),
    ("gemm_hopper_t128x160", 128, 160),
    ("gemm_hopper_t128x192", 128, 192),
    ("gemm_hopper_t128x256", 128, 256),
];
/// Clusters of tiles, rows by columns; of those that are foretold the same time the first is taken.
const CLUSTERS: [(usize, usize); 6] = [(2, 1), (1, 2), (2, 2), (1, 1), (1, 4), (4, 1)];
const SPLITS: [usize; 4] = [1, 2, 3, 4];
/// Outputs of a tile whose inputs blocks can share, at most.
const SHARED_OUTPUTS: usize = 160;
/// Rows that share what L2 holds.
const GROUP_ROWS: usize = 2048;
/// Up to so many rows tiles begin at different places of k, where a cluster shares x. Where it does not, they begin at the
/// same: L2 reads once what neighbours ask for at once.
const SPREAD_ROWS: usize = 1024;

/// Nanoseconds of 64 inputs of 128 × 256 outputs.
const STEP_NS: f64 = 640.0;
/// By how much of that a step takes longer where every multiprocessor is busy: the clock falls.
const BUSY: f64 = 0.26;
/// Bytes that shared memory takes in a nanosecond.
const SHARED_PER_NS: f64 = 134.0;
/// Bytes that L2 gives all multiprocessors in a microsecond.
const L2_PER_US: f64 = 14.2e6;
/// What L2 reads of x that no cluster shares, and of a weight that tiles below each other ask for without sharing it.
const AT_ONCE: (f64, f64) = (0.63, 0.76);
/// What multiplies, what reads memory and what passes L2 hinder each other: the norm that their times are added in.
const HINDRANCE: f64 = 3.1;
/// Microseconds of a launch.
const START_US: f64 = 1.2;
/// Microseconds of an exchange between blocks that share inputs: of any, and of 128 × 256 outputs beside.
const EXCHANGE_US: (f64, f64) = (1.4, 2.4);
/// Bytes that a memory which does not tell its speed is taken to give a multiprocessor in a microsecond: an H100's.
const UNKNOWN_PER_US: f64 = 23_600.0;

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
    /// Of which unit it is.
    pub(in crate::cuda) fn unit(&self) -> &'static str {
        UNITS[usize::from(self.tile.1 > 128)]
    }

    fn size(&self) -> usize {
        self.cluster.0 * self.cluster.1 * self.splits
    }

    /// Clusters that all outputs of `rows` rows take.
    fn tiles(&self, rows: usize, n: usize) -> usize {
        rows.div_ceil(self.tile.0 * self.cluster.0) * n.div_ceil(self.tile.1 * self.cluster.1)
    }

    /// The same for `rows` rows of its bucket.
    fn over(self, rows: usize, n: usize, chip: Chip) -> Self {
        let at_once = clusters_at_once(self.size(), chip.n_sms).expect("it was chosen before");
        let tiles = self.tiles(rows, n);
        Self { clusters: if self.splits > 1 { tiles } else { tiles.min(at_once) }, ..self }
    }

    /// Whether the kernel takes it.
    fn is_allowed(&self, (rows, n, k): (usize, usize, usize), at_once: usize) -> bool {
        let ((bm, bn), (below, beside)) = (self.tile, self.cluster);
        // A cluster has one tile then, and a second wave of them is not worth it.
        let splits_fit = self.splits == 1
            || (self.tiles(rows, n) <= at_once && self.splits <= k.div_ceil(64) && bn <= SHARED_OUTPUTS);
        below <= rows.div_ceil(bm)
            && (below.max(beside) < 4 || bn <= 128)
            && (bn / below).is_multiple_of(8)
            && splits_fit
    }

    /// Microseconds that it is foretold to take.
    fn time(&self, (rows, n, k): (usize, usize, usize), at_once: usize, chip: Chip) -> f64 {
        let ((bm, bn), (below, beside)) = (self.tile, self.cluster);
        let steps = k.div_ceil(64).div_ceil(self.splits) as f64;
        let large = (bm * bn) as f64 / 32768.0;
        let ns_step = (STEP_NS * large).max(((bm + bn) * 128) as f64 / SHARED_PER_NS);
        let per_us = if chip.bytes_per_us > 0.0 { chip.bytes_per_us } else { UNKNOWN_PER_US };
        let memory_per_us = per_us * chip.n_sms as f64;
        let groups_below = rows.div_ceil(bm * below);
        let x_part = if beside == 1 { AT_ONCE.0 } else { 1.0 / beside as f64 };
        let weight_part = if below == 1 && groups_below > 1 { AT_ONCE.1 } else { 1.0 / below as f64 };
        // Of so many clusters at once.
        let part = |now: usize| {
            let blocks = (now * self.size()) as f64;
            let columns = now as f64 / groups_below.min(now) as f64;
            let us_step = ns_step * (1.0 + BUSY * blocks / chip.n_sms as f64) / 1e3;
            let weight = columns * (beside * self.splits * bn) as f64 * steps * 128.0;
            let passed = blocks * (bm as f64 * x_part + bn as f64 * weight_part) * steps * 128.0;
            let together = [steps * us_step, weight / memory_per_us, passed / L2_PER_US];
            together.iter().map(|us| us.powf(HINDRANCE)).sum::<f64>().powf(HINDRANCE.recip())
        };
        let tiles = self.tiles(rows, n);
        let rest = if tiles.is_multiple_of(at_once) { 0.0 } else { part(tiles % at_once) };
        let exchange = if self.splits > 1 { EXCHANGE_US.0 + EXCHANGE_US.1 * large } else { 0.0 };
        (tiles / at_once) as f64 * part(at_once) + rest + START_US + exchange
    }
}

/// Whether `gemm_hopper` takes as many rows and outputs: it divides what is below this.
pub(in crate::cuda) fn gemm_takes(rows: usize, n: usize) -> bool {
    const BELOW: usize = 1 << 21;
    let rows = bucket(rows).unwrap_or(rows);
    let tiles = rows.div_ceil(TILES[0].1).saturating_mul(n.div_ceil(TILES[0].2));
    rows < BELOW / 2 && n < BELOW / 2 && tiles < BELOW
}

/// All launches for `rows` rows that the kernel takes, each with the time that it is foretold to take. What they are depends
/// on the bucket of rows only, but for the clusters.
pub(in crate::cuda) fn gemm_launches(
    (rows, n, k): (usize, usize, usize),
    chip: Chip,
) -> impl Iterator<Item = (Gemm, f64)> {
    let planned = bucket(rows).unwrap_or(rows);
    let shapes = TILES.into_iter().flat_map(|tile| CLUSTERS.map(|cluster| (tile, cluster)));
    let all = shapes.flat_map(|(tile, cluster)| SPLITS.map(|splits| (tile, cluster, splits)));
    all.filter_map(move |((symbol, bm, bn), cluster, splits)| {
        let group = (GROUP_ROWS / (bm * cluster.0)).max(1);
        let spread = cluster.1 > 1 && planned <= SPREAD_ROWS;
        let one = Gemm { symbol, tile: (bm, bn), cluster, splits, group, spread, clusters: 0 };
        let at_once = clusters_at_once(one.size(), chip.n_sms)?;
        let is_allowed = one.is_allowed((planned, n, k), at_once);
        is_allowed.then(|| (one.over(rows, n, chip), one.time((planned, n, k), at_once, chip)))
    })
}

/// The launch for `rows` rows that is foretold to take the least time. What it is depends on the bucket of rows only, and so
/// do the bits of a row.
pub(in crate::cuda) fn gemm(rows: usize, n: usize, k: usize, chip: Chip) -> Gemm {
    let launches = gemm_launches((rows, n, k), chip);
    let (best, _) = launches.min_by(|a, b| a.1.total_cmp(&b.1)).expect("the first tile takes every shape");
    best
}

/// Choices that were made: one takes longer than asking for a kernel.
#[derive(Debug, Default)]
pub(in crate::cuda) struct GemmChoices(HashMap<(usize, usize, usize), Gemm>);

impl GemmChoices {
    /// What [`gemm`] gives.
    pub(in crate::cuda) fn get(&mut self, rows: usize, n: usize, k: usize, chip: Chip) -> Gemm {
        let planned = bucket(rows).unwrap_or(rows);
        let choice = self.0.entry((planned, n, k)).or_insert_with(|| gemm(planned, n, k, chip));
        choice.over(rows, n, chip)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::has;
    use super::*;

    const H100: Chip = Chip { n_sms: 132, is_hopper: true, bytes_per_us: 23_600.0 };
    const H200: Chip = Chip { bytes_per_us: 34_600.0, ..H100 };

    #[test]
    fn gemms_have_tiles_that_fit_their_rows() {
        for rows in [65, 128, 129, 300, 1024, 8192] {
            for (n, k) in [(40, 64), (4096, 4096), (12288, 4096), (4096, 16384), (50257, 768)] {
                for chip in [H100, H200] {
                    let choice = gemm(rows, n, k, chip);
                    assert!(has(choice.unit(), choice.symbol), "{choice:?}");
                    let blocks = choice.clusters * choice.size();
                    assert!(blocks <= 132, "{choice:?}");
                }
            }
        }
        // Little to do is shared by more blocks, along the inputs.
        assert!(gemm(128, 4096, 16384, H100).splits > 1);
        assert_eq!(gemm(8192, 16384, 4096, H100).splits, 1);
        assert!(gemm_takes(131_072, 50_257) && !gemm_takes(1 << 20, 64) && !gemm_takes(1 << 19, 1 << 19));
        // A memory that does not tell its speed.
        let unknown = Chip { bytes_per_us: 0.0, ..H100 };
        assert_eq!(gemm(128, 4096, 16384, unknown), gemm(128, 4096, 16384, H100));
    }

    #[test]
    fn every_tile_is_one_of_its_unit() {
        let gemm = gemm(128, 64, 64, H100);
        for (symbol, bm, bn) in TILES {
            assert!(has(Gemm { tile: (bm, bn), ..gemm }.unit(), symbol), "{symbol}");
        }
    }

    #[test]
    fn a_choice_is_that_of_its_bucket() {
        let same = |a: Gemm, b: Gemm| Gemm { clusters: 0, ..a } == Gemm { clusters: 0, ..b };
        for (n, k) in [(4096, 4096), (12288, 4096), (2048, 8192), (50257, 5120)] {
            assert!(same(gemm(65, n, k, H200), gemm(128, n, k, H200)));
            assert!(same(gemm(600, n, k, H200), gemm(1024, n, k, H200)));
        }
    }

    #[test]
    fn choices_that_are_kept_are_those_that_would_be_made() {
        let mut kept = GemmChoices::default();
        for _ in 0..2 {
            for rows in [65, 100, 128, 129, 200, 600, 1024, 8192, 8193, 20_000] {
                for (n, k) in [(4096, 4096), (2048, 8192), (40, 64)] {
                    assert_eq!(kept.get(rows, n, k, H200), gemm(rows, n, k, H200), "{rows} rows, {n} x {k}");
                }
            }
        }
        assert_eq!(kept.0.len(), 3 * 6);
    }

    /// A choice was timed, and is at most 5 % slower than the fastest that was, 8 % on one shape; memories that are a
    /// little slower or faster change nothing about that.
    #[test]
    fn choices_are_near_the_best_that_was_timed() {
        for cell in timed::cells() {
            let (rows, n, k) = cell.shape;
            let most = if cell.name == "1.3B proj 128" { 1.08 } else { 1.05 };
            for bytes_per_us in [34_200.0, 34_640.0, 35_000.0] {
                let choice = gemm(rows, n, k, Chip { bytes_per_us, ..H200 });
                let ((bm, bn), (below, beside), splits) = (choice.tile, choice.cluster, choice.splits);
                let name = format!("{bm}x{bn} {below}{beside} {splits}");
                let best = cell.own.iter().map(|own| own.1).fold(f64::INFINITY, f64::min);
                let us = cell.own.iter().find(|own| own.0 == name).map(|own| own.1);
                let us = us.unwrap_or_else(|| panic!("{}: {name} was not timed", cell.name));
                let percent = |us: f64| format!("{:.0} %", 100.0 * cell.library / us);
                println!("{} | {name} | {} of {}", cell.name, percent(us), percent(best));
                assert!(us <= most * best, "{}: {name} takes {us}, the best {best}", cell.name);
            }
        }
    }
}
