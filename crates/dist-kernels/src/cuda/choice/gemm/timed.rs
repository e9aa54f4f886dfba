//! What launches of `gemm_hopper` took: one H200 (driver 580.159, NVRTC 13.0.88), bf16, no epilogue, buffers rotated beyond
//! L2 in graphs of launches, replayed in turn with the library's `mm` (torch 2.11), median of 5 (up to 1,024 rows) or 7:
//! 1,416 launches on 72 shapes, those that an earlier model had foretold at most 1.6 or 1.4 times the least for.

use std::str::FromStr;

/// A line for each shape: its name, rows, outputs and inputs, microseconds of the library; then, indented, what was
/// timed: tile, cluster, parts of the inputs, microseconds.
const TIMED: &str = include_str!("timed.txt");

pub(super) struct Cell {
    pub(super) name: &'static str,
    /// Rows, outputs, inputs.
    pub(super) shape: (usize, usize, usize),
    /// Microseconds of the library.
    pub(super) library: f64,
    /// Tile, cluster and parts of the inputs; microseconds.
    pub(super) own: Vec<(&'static str, f64)>,
}

fn number<T: FromStr>(text: &str) -> T {
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
