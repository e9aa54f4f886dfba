//! What launches of `gemm_hopper` took: one H200 (driver 580.159, NVRTC 13.0.88), bf16, no epilogue, buffers rotated beyond
//! L2 in graphs of launches, replayed in turn with cuBLAS's and cuBLASLt's `mm` (torch 2.11), median of 5 to 7.
//!
//! Two runs: one of many launches on 43 shapes, and one of the choice as it then was on all 72. From that one are the shapes
//! with a single launch, as timed, and two launches that the first lacked (`1.3B proj 256 | 128x64 12 1` and
//! `13B proj 256 | 128x96 21 1`), which stand by their share of the library's time.

/// A line for each shape: its name, rows, outputs and inputs, microseconds of the faster library; then, indented, what was
/// timed: tile, cluster, parts of the inputs, microseconds.
const TIMED: &str = include_str!("timed.txt");

pub(super) struct Cell {
    pub(super) name: &'static str,
    /// Rows, outputs, inputs.
    pub(super) shape: (usize, usize, usize),
    /// Microseconds of the faster library.
    pub(super) library: f64,
    /// Tile, cluster and parts of the inputs; microseconds.
    pub(super) own: Vec<(&'static str, f64)>,
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in timed.txt"))
}

pub(super) fn cells() -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    for line in TIMED.lines() {
        if line.starts_with(' ') {
            let timed = line.split(',').map(str::trim).filter(|one| !one.is_empty());
            let own = timed.map(|one| one.rsplit_once(' ').expect("a time"));
            let own = own.map(|(name, us)| (name, number(us)));
            cells.last_mut().expect("a shape before its times").own.extend(own);
        } else {
            let [name, shape, library] = line.split(" | ").collect::<Vec<_>>()[..] else { panic!("{line}") };
            let [rows, n, k] = shape.split(' ').map(number).collect::<Vec<_>>()[..] else { panic!("{line}") };
            cells.push(Cell { name, shape: (rows, n, k), library: number(library), own: Vec::new() });
        }
    }
    cells
}
