//! What the sampling kernel reads: each row's parameters, and all changes of logits sorted by row and token.

use bytemuck::{Pod, Zeroable};

use crate::args::SampleRow;

/// Tokens of a chunk: one block's part of a row, see `sample.cu`.
pub(super) const CHUNK: usize = 8192;
/// The largest vocabulary that the kernel takes.
pub(super) const MAX_VOCAB: usize = 64 * CHUNK;
/// The most likeliest tokens that the kernel reports.
pub(super) const MAX_TOP: usize = 1024;
/// Bytes of the kernel's scratch for a chunk.
pub(super) const PARTIAL_BYTES: usize = 16;
/// Stands for "no token".
const NO_TOKEN: u32 = u32::MAX;

/// `SampleRow` of `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct RowParams {
    target: u32,
    /// Drawn where no logit is finite: the lowest id that is not banned.
    fallback: u32,
    /// Where the row's changes are on the GPU; before they are there, the number of the first one.
    changes: u64,
    n_changes: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: [u32; 2],
    sample_idx: u32,
    position: u32,
    padding: u32,
}

/// `SampleChange` of `sample.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct Change {
    id: u32,
    op: u32,
    value: f32,
    /// Written by the kernel.
    before: f32,
}

const PENALTY: u32 = 0;
const SUBTRACT: u32 = 1;
const ADD: u32 = 2;
const BAN: u32 = 3;

/// A step's rows and changes, kept between steps.
#[derive(Debug, Default)]
pub(super) struct PackedRows {
    pub(super) rows: Vec<RowParams>,
    pub(super) changes: Vec<Change>,
}

impl PackedRows {
    /// Takes in the rows of a step; what was there is forgotten.
    pub(super) fn fill(&mut self, rows: &[SampleRow]) {
        self.rows.clear();
        self.changes.clear();
        for row in rows {
            let first = self.changes.len();
            // A row that scores a token changes nothing.
            if row.target.is_none() {
                push_changes(&mut self.changes, row);
                // Stable: the changes of one token keep their order.
                self.changes[first..].sort_by_key(|change| change.id);
            }
            self.rows.push(RowParams {
                target: row.target.unwrap_or(NO_TOKEN),
                fallback: lowest_allowed(&row.banned),
                changes: first as u64,
                n_changes: (self.changes.len() - first) as u32,
                temperature: row.temperature,
                top_k: row.top_k,
                top_p: row.top_p,
                min_p: row.min_p,
                seed: [row.seed as u32, (row.seed >> 32) as u32],
                sample_idx: row.sample_idx,
                position: row.position,
                padding: 0,
            });
        }
    }

    /// The changes are at `address` from now on.
    pub(super) fn changes_are_at(&mut self, address: u64) {
        for row in &mut self.rows {
            row.changes = address + row.changes * size_of::<Change>() as u64;
        }
    }
}

/// Appends what `row` does to logits, in the order of the fields.
fn push_changes(changes: &mut Vec<Change>, row: &SampleRow) {
    let mut push = |id, op, value| changes.push(Change { id, op, value, before: 0.0 });
    for count in &row.counts {
        if count.n_prompt + count.n_output > 0 {
            push(count.id, PENALTY, row.repetition_penalty);
        }
        if count.n_output > 0 {
            let subtracted = row.presence_penalty + row.frequency_penalty * count.n_output as f32;
            push(count.id, SUBTRACT, subtracted);
        }
    }
    for &(id, bias) in &row.logit_bias {
        push(id, ADD, bias);
    }
    for &id in &row.banned {
        push(id, BAN, 0.0);
    }
}

/// The lowest id that is not banned.
fn lowest_allowed(banned: &[u32]) -> u32 {
    if !banned.contains(&0) {
        return 0;
    }
    let mut sorted = banned.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    // The ids before the first gap are banned.
    sorted.iter().zip(0..).take_while(|&(&id, at)| id == at).count() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::TokenCount;

    fn row() -> SampleRow {
        SampleRow {
            target: None,
            counts: vec![],
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: vec![],
            banned: vec![],
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 7 << 32 | 9,
            sample_idx: 0,
            position: 5,
        }
    }

    #[test]
    fn changes_of_a_token_stay_in_the_order_of_their_effect() {
        let counts = vec![
            TokenCount { id: 9, n_prompt: 1, n_output: 0 },
            TokenCount { id: 4, n_prompt: 0, n_output: 3 },
        ];
        let penalised = SampleRow {
            counts,
            repetition_penalty: 1.5,
            presence_penalty: 0.25,
            frequency_penalty: 0.5,
            logit_bias: vec![(4, -2.0), (1, 3.0)],
            banned: vec![4],
            ..row()
        };
        let mut packed = PackedRows::default();
        packed.fill(&[row(), penalised]);
        let changes: Vec<_> = packed.changes.iter().map(|c| (c.id, c.op, c.value)).collect();
        let expected = [
            (1, ADD, 3.0),
            (4, PENALTY, 1.5),
            (4, SUBTRACT, 1.75),
            (4, ADD, -2.0),
            (4, BAN, 0.0),
            (9, PENALTY, 1.5),
        ];
        assert_eq!(changes, expected);
        assert_eq!((packed.rows[0].changes, packed.rows[0].n_changes), (0, 0));
        assert_eq!((packed.rows[1].changes, packed.rows[1].n_changes), (0, 6));
        assert_eq!(packed.rows[0].seed, [9, 7]);
    }

    #[test]
    fn the_lowest_id_that_is_not_banned_is_found() {
        assert_eq!(lowest_allowed(&[]), 0);
        assert_eq!(lowest_allowed(&[1, 0, 0, 3]), 2);
        assert_eq!(lowest_allowed(&[2, 1, 0]), 3);
    }
}
