//! Which kernel streams a weight past few rows, and the shape of its launch.

use super::gemm::clusters_at_once;
use crate::cuda::driver::DeviceInfo;

/// A kernel of `linear` for few rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Streaming {
    pub(in crate::cuda) unit: &'static str,
    /// Without its type.
    pub(in crate::cuda) symbol: &'static str,
    /// Clusters of blocks, each with its own outputs.
    pub(in crate::cuda) clusters: usize,
    /// Blocks of a cluster, which share the inputs.
    pub(in crate::cuda) cluster: usize,
    /// Outputs of a cluster, in eights.
    pub(in crate::cuda) units: usize,
    /// For kernels that the copy engine feeds: what it brings at once.
    pub(in crate::cuda) boxes: Option<Boxes>,
}

/// Rows of the copy engine's boxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Boxes {
    /// Of x.
    pub(in crate::cuda) x: usize,
    /// Of the weight: the outputs of a pass.
    pub(in crate::cuda) weight: usize,
}

/// What the choice depends on of a GPU.
#[derive(Clone, Copy, Debug)]
pub(in crate::cuda) struct Chip {
    pub(in crate::cuda) n_sms: usize,
    pub(in crate::cuda) is_hopper: bool,
    /// Bytes that memory gives a multiprocessor in a microsecond.
    pub(in crate::cuda) bytes_per_us: f64,
}

impl Chip {
    pub(in crate::cuda) fn of(info: &DeviceInfo) -> Self {
        let n_sms = info.n_sms.max(1);
        let bytes_per_us = OF_SHEET * info.memory_bytes_per_s as f64 / 1e6 / n_sms as f64;
        Self { n_sms, is_hopper: info.capability == (9, 0), bytes_per_us }
    }
}

/// What reading reaches of a memory's clock times its width: 3.12 of 3.35 TB/s on an H100, 4.55 of 4.92 on an H200.
const OF_SHEET: f64 = 0.93;

/// The variants of a bucket of rows as measured on an H100: each takes up to so many outputs a block, the last the rest.
#[rustfmt::skip]
const EIGHT_ROWS: [Variant; 4] =
    [(16, "linear_m1n1"), (32, "linear_m2n1u2"), (48, "linear_m3n1u2"), (64, "linear_m4n1s5")];
const SIXTEEN_ROWS: [Variant; 2] = [(16, "linear_m1n2"), (32, "linear_m2n2u2")];

/// A variant's symbol after the most outputs a block that it is taken for.
type Variant = (usize, &'static str);

/// Outputs of a pass of the kernels with 128, and bytes of the weight that a stage has for one of them.
const WIDE: usize = 128;
const STAGE_BYTES: usize = 256;

/// A symbol, the blocks that share `k`, and whether the copy engine feeds it.
type Choice = (&'static str, usize, bool);

/// The variant for a bucket of rows and `outputs` outputs a block.
fn variant(rows: usize, outputs: usize, (n, k): (usize, usize), chip: Chip) -> Choice {
    let first = |variants: &[Variant], last| {
        (variants.iter().find(|variant| outputs <= variant.0).map_or(last, |variant| variant.1), 1, false)
    };
    match rows {
        // All of a block's weight is on its way before the wait, and two blocks are on a multiprocessor.
        0..=8 if outputs <= 16 && k <= 2048 => ("linear_m1n1s4", 1, false),
        0..=8 if outputs.is_multiple_of(32) => first(&EIGHT_ROWS, "linear_m2n1u2"),
        0..=8 => first(&EIGHT_ROWS, "linear_m4n1s5"),
        9..=16 if !chip.is_hopper || (outputs <= 32 && k <= n) => first(&SIXTEEN_ROWS, "linear_m2n2u2"),
        9..=16 => match outputs {
            0..=32 => ("linear_ring_w1n2u4", 2, true),
            33..=64 => ("linear_ring_w1n2u4", 1, true),
            _ if fence_is_hidden(outputs, 0.8, chip) => ("linear_w2n2", 1, false),
            _ => ("linear_ring_w2n2u4", 1, true),
        },
        17..=32 => match outputs {
            0..=32 => ("linear_ring_w1n4u4", 2, true),
            33..=64 => ("linear_ring_w1n4u4", 1, true),
            _ if fence_is_hidden(outputs, 0.97, chip) => ("linear_w2n4", 1, false),
            _ => ("linear_ring_w2n4", 1, true),
        },
        _ => match outputs {
            0..=16 if k > n => ("linear_ring_w1n8", 3, true),
            0..=32 => ("linear_ring_w1n8", 2, true),
            // Twice the outputs for half the inputs: x passes half as often.
            33..=64 if k >= 4096 => ("linear_ring_w2n8", 2, true),
            33..=64 => ("linear_ring_w1n8", 1, true),
            _ if fence_is_hidden(outputs, 1.05, chip) => ("linear_w2n8u2", 1, false),
            _ => ("linear_ring_w2n8", 1, true),
        },
    }
}

/// Whether memory takes longer for a stage than the `us` microseconds that `linear_hopper` needs for one: then that is
/// the faster one, for it reads longer pieces. Measured on an H200 (80, 96, 120 and 128 outputs a pass), and borne out by
/// what an H100 did before `linear_ring` was there.
fn fence_is_hidden(outputs: usize, us: f64, chip: Chip) -> bool {
    let per_pass = (outputs / 8).div_ceil(outputs.div_ceil(WIDE)) * 8;
    (per_pass * STAGE_BYTES) as f64 > us * chip.bytes_per_us
}

/// The most rows that the streaming kernels take at once.
pub(in crate::cuda) fn streaming_rows_max(is_hopper: bool) -> usize {
    if is_hopper { 64 } else { 16 }
}

/// The kernel for `rows` rows, `n` outputs and `k` inputs.
pub(in crate::cuda) fn streaming((rows, n, k): (usize, usize, usize), chip: Chip) -> Streaming {
    // One block a multiprocessor, and the outputs spread evenly over them.
    let groups = n.div_ceil(8);
    let (symbol, cluster, is_fed) = variant(rows, groups.div_ceil(chip.n_sms) * 8, (n, k), chip);
    let unit = match symbol {
        _ if is_fed => "linear_ring",
        _ if symbol.starts_with("linear_w") => "linear_hopper",
        _ => "linear",
    };
    let at_once = clusters_at_once(cluster, chip.n_sms).expect("clusters of the table are of known sizes");
    let units = groups.div_ceil(at_once);
    let boxes = is_fed.then(|| {
        let most = if symbol.contains("_w1") { WIDE / 2 } else { WIDE };
        let passes = (units * 8).div_ceil(most);
        Boxes { x: rows.next_power_of_two(), weight: units.div_ceil(passes) * 8 }
    });
    Streaming { unit, symbol, clusters: groups.div_ceil(units), cluster, units, boxes }
}

#[cfg(test)]
mod tests {
    use super::super::tests::has;
    use super::*;

    const H100: Chip = Chip { n_sms: 132, is_hopper: true, bytes_per_us: 23_600.0 };
    const H200: Chip = Chip { bytes_per_us: 34_600.0, ..H100 };
    const OTHER: Chip = Chip { n_sms: 108, is_hopper: false, bytes_per_us: 14_000.0 };

    #[test]
    fn every_choice_is_a_kernel_that_there_is_and_covers_all_outputs() {
        for chip in [H100, H200, OTHER] {
            for rows in 1..=streaming_rows_max(chip.is_hopper) {
                for n in [1, 8, 40, 777, 2048, 4096, 12288, 16384, 50257, 50272] {
                    let choice = streaming((rows, n, n), chip);
                    assert!(has(choice.unit, choice.symbol), "{choice:?}");
                    assert!(choice.clusters * choice.units * 8 >= n, "{choice:?}");
                    assert!(choice.clusters * choice.cluster <= chip.n_sms, "{choice:?}");
                    assert!(
                        (choice.clusters - 1) * choice.units * 8 < n,
                        "{choice:?} has idle blocks for {n}"
                    );
                    assert!(chip.is_hopper || choice.unit == "linear", "{choice:?}");
                    assert_eq!(choice.boxes.is_some(), choice.unit == "linear_ring", "{choice:?}");
                    if let Some(Boxes { x, weight }) = choice.boxes {
                        assert!(x >= rows && x < 2 * rows && weight.is_multiple_of(8), "{choice:?}");
                        let most = if choice.symbol.contains("_w1") { 64 } else { 128 };
                        assert!((8..=most).contains(&weight), "{choice:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_choice_is_one_of_its_bucket() {
        for chip in [H100, H200] {
            for bucket in [1..=8, 9..=16, 17..=32, 33..=64] {
                for n in [2048, 4096, 5120, 12288, 20480] {
                    let first = streaming((*bucket.start(), n, 4096), chip);
                    let same = |rows| Streaming { boxes: first.boxes, ..streaming((rows, n, 4096), chip) };
                    assert!(bucket.clone().all(|rows| same(rows) == first), "{bucket:?} of {n}");
                }
            }
        }
    }

    #[test]
    fn few_outputs_are_shared_by_clusters_that_all_run_at_once() {
        let long = streaming((64, 2048, 8192), H100);
        assert_eq!((long.symbol, long.cluster, long.clusters, long.units), ("linear_ring_w1n8", 3, 37, 7));
        assert_eq!(long.boxes, Some(Boxes { x: 64, weight: 56 }));
        let square = streaming((32, 2048, 2048), H100);
        assert_eq!((square.symbol, square.cluster), ("linear_ring_w1n4u4", 2));
        assert_eq!(streaming((64, 2048, 2048), H100).cluster, 2);
        assert_eq!(streaming((64, 5120, 20480), H200).cluster, 2);
    }

    #[test]
    fn the_faster_a_memory_the_more_is_fed_by_the_copy_engine() {
        let unit = |rows, n, chip| streaming((rows, n, 4096), chip).unit;
        // 128 outputs a pass.
        assert_eq!((unit(64, 16384, H100), unit(64, 16384, H200)), ("linear_hopper", "linear_ring"));
        assert_eq!((unit(16, 16384, H100), unit(16, 16384, H200)), ("linear_hopper", "linear_hopper"));
        // Two passes of 80.
        for rows in [16, 32, 64] {
            assert_eq!(unit(rows, 20480, H200), "linear_ring", "{rows} rows");
        }
        // A memory that does not tell its speed.
        let unknown = Chip { bytes_per_us: 0.0, ..H100 };
        assert_eq!(unit(64, 16384, unknown), "linear_hopper");
    }
}
