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

/// What the copy engine brings, and the shared memory that it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cuda) struct Boxes {
    /// Rows of a box of x.
    pub(in crate::cuda) x: usize,
    /// Rows of a box of the weight: the outputs of a pass.
    pub(in crate::cuda) weight: usize,
    /// Bytes of shared memory that a block can use; it runs with less, in a shorter ring.
    pub(in crate::cuda) shared_bytes: usize,
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

/// A variant's symbol after the most outputs a block that it is taken for.
type Variant = (usize, &'static str);

/// The variants of `linear` for a bucket of rows as measured on an H100; the last takes the rest.
#[rustfmt::skip]
const EIGHT_ROWS: [Variant; 4] =
    [(16, "linear_m1n1"), (32, "linear_m2n1u2"), (48, "linear_m3n1u2"), (64, "linear_m4n1s5")];
const SIXTEEN_ROWS: [Variant; 2] = [(16, "linear_m1n2"), (32, "linear_m2n2u2")];
/// A variant of `linear_ring`.
#[derive(Clone, Copy, Debug)]
struct Ring {
    symbol: &'static str,
    /// Blocks of 64 inputs of a stage.
    blocks: usize,
}

const fn ring(symbol: &'static str, blocks: usize) -> Ring {
    Ring { symbol, blocks }
}

/// The variants of `linear_ring` for eights of rows, each for up to 64, 128 and 192 outputs of a pass.
const RINGS: [(usize, [Ring; 3]); 4] = [
    (1, [ring("linear_ring_w1n1", 4), ring("linear_ring_w2n1", 4), ring("linear_ring_w3n1", 2)]),
    (2, [ring("linear_ring_w1n2", 4), ring("linear_ring_w2n2", 4), ring("linear_ring_w3n2", 2)]),
    (4, [ring("linear_ring_w1n4", 4), ring("linear_ring_w2n4", 2), ring("linear_ring_w3n4", 2)]),
    (8, [ring("linear_ring_w1n8", 2), ring("linear_ring_w2n8", 2), ring("linear_ring_w3n8", 2)]),
];
/// Outputs of a group of warps of `linear_ring`, and of a pass where there is more than one.
const GROUP: usize = 64;
const PASS: usize = 128;
/// Bytes of 64 inputs of a row; of what lies behind the ring, at most; and of the sums of eight rows that a group of warps
/// sends.
const ROW_BYTES: usize = 128;
const ENDS_BYTES: usize = 2 * 16 * 8 + 16 + 64 * 8;
const MAIL_BYTES: usize = 128 * 16;

/// The variant of `linear` for up to `rows` rows, 16 at most, and `outputs` outputs a block.
fn mma(rows: usize, outputs: usize, k: usize) -> &'static str {
    let first = |variants: &[Variant], last| {
        variants.iter().find(|variant| outputs <= variant.0).map_or(last, |variant| variant.1)
    };
    match rows {
        // All of a block's weight is on its way before the wait, and two blocks are on a multiprocessor.
        0..=8 if outputs <= 16 && k <= 2048 => "linear_m1n1s4",
        0..=8 if outputs.is_multiple_of(32) => first(&EIGHT_ROWS, "linear_m2n1u2"),
        0..=8 => first(&EIGHT_ROWS, "linear_m4n1s5"),
        _ => first(&SIXTEEN_ROWS, "linear_m2n2u2"),
    }
}

/// Whether a step is faster with `linear` although `linear_ring` is the faster one by itself: it leaves room for the blocks
/// of the kernel after, which ask for their weight while these end. Measured on an H200, 1.3B and 6.7B.
fn leaves_room(rows: usize, outputs: usize, k: usize) -> bool {
    match rows {
        0..=8 => outputs <= 32 || (outputs <= 48 && k <= 2048),
        9..=16 => outputs <= 16 && k <= 2048,
        _ => false,
    }
}

/// Blocks that share `k` where a block would have `outputs` outputs by itself: x passes as often as there are clusters, so
/// few outputs a block are dear.
fn parts(outputs: usize, (n, k): (usize, usize)) -> usize {
    match outputs {
        0..=16 => 3,
        17..=32 => 2,
        33..=64 if k > 2 * n => 2,
        _ => 1,
    }
}

/// The most rows that the streaming kernels take at once.
pub(in crate::cuda) fn streaming_rows_max(is_hopper: bool) -> usize {
    if is_hopper { 64 } else { 16 }
}

/// The kernel for `rows` rows, `n` outputs and `k` inputs.
pub(in crate::cuda) fn streaming((rows, n, k): (usize, usize, usize), chip: Chip) -> Streaming {
    // One block a multiprocessor, and the outputs spread evenly over them.
    let groups = n.div_ceil(8);
    let outputs = groups.div_ceil(chip.n_sms) * 8;
    if !chip.is_hopper || leaves_room(rows, outputs, k) {
        let units = groups.div_ceil(chip.n_sms);
        let (symbol, clusters) = (mma(rows, outputs, k), groups.div_ceil(units));
        return Streaming { unit: "linear", symbol, clusters, cluster: 1, units, boxes: None };
    }
    let cluster = parts(outputs, (n, k));
    let at_once = clusters_at_once(cluster, chip.n_sms).expect("clusters of the table are of known sizes");
    let units = groups.div_ceil(at_once);
    let (eights, rings) = RINGS.iter().find(|of| rows <= of.0 * 8).expect("the last is for the most rows");
    let wide = (units * 8).div_ceil(GROUP);
    let (wide, passes) =
        if wide <= rings.len() { (wide, 1) } else { (PASS / GROUP, (units * 8).div_ceil(PASS)) };
    let ring = &rings[wide - 1];
    let weight = units.div_ceil(passes) * 8;
    let x_bytes = ring.blocks * ROW_BYTES * eights * 8;
    let stage = ring.blocks * ROW_BYTES * weight + x_bytes;
    // Read behind the last stage, and not used.
    let behind = (wide * GROUP * ROW_BYTES).saturating_sub(weight * ROW_BYTES + x_bytes);
    let stages = k.div_ceil(GROUP * ring.blocks).div_ceil(cluster) * passes;
    let mail = (cluster - 1) * eights.div_ceil(cluster) * wide * MAIL_BYTES;
    let shared_bytes = stages * stage + behind + mail + ENDS_BYTES;
    let boxes = Boxes { x: eights * 8, weight, shared_bytes };
    let clusters = groups.div_ceil(units);
    Streaming { unit: "linear_ring", symbol: ring.symbol, clusters, cluster, units, boxes: Some(boxes) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::has;
    use super::*;
    use crate::cuda::units::Unit;

    const H100: Chip = Chip { n_sms: 132, is_hopper: true, bytes_per_us: 23_600.0 };
    /// Hopper with fewer multiprocessors.
    const H100_PCIE: Chip = Chip { n_sms: 114, ..H100 };
    const OTHER: Chip = Chip { n_sms: 108, is_hopper: false, bytes_per_us: 14_000.0 };

    #[test]
    fn every_choice_is_a_kernel_that_there_is_and_covers_all_outputs() {
        for chip in [H100, H100_PCIE, OTHER] {
            for rows in 1..=streaming_rows_max(chip.is_hopper) {
                for n in [1_usize, 8, 40, 777, 2048, 4096, 5120, 12288, 16384, 20480, 50257, 50272] {
                    for k in [8, 1024, 4096, 4 * n.next_multiple_of(8)] {
                        let choice = streaming((rows, n, k), chip);
                        assert!(has(choice.unit, choice.symbol), "{choice:?}");
                        assert!(choice.clusters * choice.units * 8 >= n, "{choice:?}");
                        assert!(choice.clusters * choice.cluster <= chip.n_sms, "{choice:?}");
                        assert!(
                            (choice.clusters - 1) * choice.units * 8 < n,
                            "{choice:?} has idle blocks for {n}"
                        );
                        assert!(chip.is_hopper || choice.unit == "linear", "{choice:?}");
                        assert_eq!(choice.boxes.is_some(), choice.unit == "linear_ring", "{choice:?}");
                        if let Some(boxes) = choice.boxes {
                            fits(&choice, boxes, rows);
                        }
                    }
                }
            }
        }
    }

    /// That the kernel, as it is compiled, takes the launch.
    fn fits(choice: &Streaming, boxes: Boxes, rows: usize) {
        let unit = Unit::find("linear_ring").unwrap();
        let variant = unit.variants.iter().find(|variant| variant.symbol == choice.symbol).unwrap();
        let [groups, eights, blocks] = *variant.shape else { panic!("{variant:?}") };
        let (groups, eights, blocks) = (groups as usize, eights as usize, blocks as usize);
        assert!(boxes.x == eights * 8 && boxes.x >= rows && (rows <= 8 || boxes.x < 2 * rows), "{choice:?}");
        let passes = (choice.units * 8).div_ceil(GROUP * groups);
        assert_eq!(boxes.weight, choice.units.div_ceil(passes) * 8, "{choice:?}");
        assert!(choice.cluster == 1 || passes == 1, "{choice:?}: clusters have one pass");
        let stage = blocks * ROW_BYTES * (boxes.weight + boxes.x);
        // The last group of warps reads 64 rows of the stage's last block, however few there are.
        let read = (blocks - 1) * boxes.weight * ROW_BYTES + groups * GROUP * ROW_BYTES;
        assert!(boxes.shared_bytes >= stage.max(read) + ENDS_BYTES, "{choice:?}: a stage");
        // What a block has on Hopper, less what `linear_ring` leaves: two stages and the mail.
        let most = stage + stage.max(read) + 3 * 2 * groups * MAIL_BYTES + ENDS_BYTES;
        assert!(most <= 232_448 - 1024, "{choice:?}");
    }

    #[test]
    fn a_choice_is_one_of_its_bucket() {
        for chip in [H100, OTHER] {
            for bucket in [1..=8, 9..=16, 17..=32, 33..=64] {
                if *bucket.end() > streaming_rows_max(chip.is_hopper) {
                    continue;
                }
                for (n, k) in [(2048, 2048), (4096, 4096), (5120, 20480), (12288, 4096), (20480, 5120)] {
                    let first = streaming((*bucket.start(), n, k), chip);
                    assert!(
                        bucket.clone().all(|rows| streaming((rows, n, k), chip) == first),
                        "{bucket:?} of {n}"
                    );
                }
            }
        }
    }

    #[test]
    fn few_outputs_are_shared_by_clusters_that_all_run_at_once() {
        let told = |rows, n, k| {
            let choice = streaming((rows, n, k), H100);
            (choice.symbol, choice.cluster, choice.clusters, choice.units)
        };
        assert_eq!(told(64, 2048, 8192), ("linear_ring_w1n8", 3, 37, 7));
        assert_eq!(told(32, 4096, 4096), ("linear_ring_w1n4", 2, 64, 8));
        assert_eq!(told(8, 5120, 20480), ("linear_ring_w2n1", 2, 64, 10));
        assert_eq!(told(64, 5120, 20480), ("linear_ring_w2n8", 2, 64, 10));
        assert_eq!(told(64, 5120, 5120), ("linear_ring_w1n8", 1, 128, 5));
    }

    #[test]
    fn wide_weights_pass_once_up_to_192_outputs_a_block() {
        let told = |n| {
            let choice = streaming((64, n, 5120), H100);
            (choice.symbol, choice.units, choice.boxes.unwrap().weight)
        };
        assert_eq!(told(16384), ("linear_ring_w2n8", 16, 128));
        assert_eq!(told(20480), ("linear_ring_w3n8", 20, 160));
        assert_eq!(told(50257), ("linear_ring_w2n8", 48, 128));
    }

    #[test]
    fn narrow_products_stay_with_the_kernel_that_leaves_room() {
        let symbol = |rows, n, k, chip| streaming((rows, n, k), chip).symbol;
        assert_eq!(symbol(1, 2048, 2048, H100), "linear_m1n1s4");
        assert_eq!(symbol(8, 6144, 2048, H100), "linear_m3n1u2");
        assert_eq!(symbol(16, 2048, 2048, H100), "linear_m1n2");
        assert_eq!(symbol(16, 6144, 2048, H100), "linear_ring_w1n2");
        assert_eq!(symbol(1, 2048, 8192, H100), "linear_m1n1");
        assert_eq!(symbol(8, 4096, 16384, H100), "linear_m2n1u2");
        assert_eq!(symbol(1, 8192, 2048, H100), "linear_ring_w1n1");
        assert_eq!(symbol(16, 16384, 4096, OTHER), "linear_m2n2u2");
    }
}
