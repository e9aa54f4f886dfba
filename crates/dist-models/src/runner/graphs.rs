//! Decode steps that the device keeps as graphs: one for each of a few sizes, taken at the start. A step is filled up to
//! the next size, so that its rows give the same bits whether they run as a graph or one by one.

use dist_kernels::Backend;

use crate::step::StepBatch;
use crate::workspace::StepShape;

/// Decode steps of more rows are asked for kernel by kernel: there the host is fast enough by far.
const ROWS_MAX: usize = 512;

/// Recorded steps, smallest first.
#[derive(Debug)]
pub(super) struct Graphs<B: Backend> {
    taken: Vec<(usize, B::Graph)>,
    max_blocks: usize,
}

/// The sizes of recorded steps up to `n_max` rows: less than half of a step is filling, and no size crosses a power
/// of two, at which kernels change how they share their work.
pub(super) fn sizes(n_max: usize) -> Vec<usize> {
    let n_max = n_max.min(ROWS_MAX);
    let step = |n: usize| if n < 8 { n } else { ((n + 1).next_power_of_two() / 8).max(8) };
    let mut sizes: Vec<usize> =
        std::iter::successors(Some(1), |&n| Some(n + step(n))).take_while(|&n| n < n_max).collect();
    sizes.push(n_max);
    sizes
}

impl<B: Backend> Graphs<B> {
    /// None yet; block tables of recorded steps have `max_blocks` columns.
    pub(super) fn new(max_blocks: usize) -> Self {
        Self { taken: Vec::new(), max_blocks }
    }

    /// The shape of a recorded step of `rows` rows.
    pub(super) fn shape_of(&self, rows: usize) -> StepShape {
        let max_blocks = self.max_blocks;
        StepShape { number: 0, rows, max_rows: 1, n_seqs: rows, max_blocks, n_logits: rows }
    }

    /// Keeps the recording of a step of `rows` rows. Larger ones come first.
    pub(super) fn keep(&mut self, rows: usize, graph: B::Graph) {
        self.taken.insert(0, (rows, graph));
    }

    /// The recording that `batch` fits, if it is a decode step: one row for every sequence, and every row drawn.
    pub(super) fn fits(&self, batch: &StepBatch) -> Option<(StepShape, &B::Graph)> {
        let n = batch.n_seqs();
        let draws = |(i, at): (usize, &crate::step::SampleAt)| at.row as usize == i && at.seq_slot.is_some();
        if batch.rows() != n || batch.samples.len() != n || !batch.samples.iter().enumerate().all(draws) {
            return None;
        }
        let (rows, graph) = self.taken.iter().find(|taken| taken.0 >= n)?;
        Some((StepShape { number: batch.step, ..self.shape_of(*rows) }, graph))
    }

    /// Rows and recordings.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &B::Graph)> {
        self.taken.iter().map(|(rows, graph)| (*rows, graph))
    }
}

#[cfg(test)]
mod tests {
    use super::sizes;

    #[test]
    fn sizes_reach_their_end_and_waste_little() {
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(6), [1, 2, 4, 6]);
        for n_max in [8, 16, 64, 100, 256, 512, 4000] {
            let sizes = sizes(n_max);
            assert_eq!(sizes.last(), Some(&n_max.min(512)));
            assert!(sizes.len() < 32, "{sizes:?}");
            for pair in sizes.windows(2) {
                assert!(pair[0] < pair[1] && 2 * (pair[1] - pair[0] - 1) < pair[1], "{sizes:?}");
            }
            for n in 1..=n_max.min(512) {
                let size = *sizes.iter().find(|&&size| size >= n).unwrap();
                assert_eq!(size.next_power_of_two(), n.next_power_of_two(), "{n} in {sizes:?}");
            }
        }
    }
}
