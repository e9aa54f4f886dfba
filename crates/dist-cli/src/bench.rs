//! Measures: rounds of one cell of the grid, and what the machine could do at best. It writes nothing.

mod ceiling;
mod origin;
mod statistics;

pub use ceiling::{Ceilings, read_rate};
pub use origin::Origin;
pub use statistics::Quantiles;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dist_core::cost::{StepShape, Work};
use dist_core::plan::{Plan, Predictions};
use dist_core::{Coord, CostModel, Mesh, Rank};
use dist_kernels::Backend;
use dist_models::engine::Engine;
use dist_models::request::{Event, Request, RequestId, Sampling};
use dist_models::runner::Usage;

use crate::problem::Problem;

/// One point of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt_len: usize,
    /// New tokens of each sequence.
    pub new_tokens: usize,
}

/// What the rounds of a cell took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Times {
    /// Arrival to first token, one a sequence and round.
    pub ttft: Vec<Duration>,
    /// Of every step, all sequences running, from the tokens before to these.
    pub steps: Vec<Duration>,
    /// Whole rounds.
    pub rounds: Vec<Duration>,
    /// Of all measured rounds together, what every rank did, in order of the ranks.
    pub usage: Vec<Usage>,
    /// How long these rounds took.
    pub wall: Duration,
}

impl Times {
    /// Busy time over wall time of each pipeline stage: the mean of its ranks.
    pub fn stage_busy(&self, mesh: Mesh) -> Vec<f64> {
        let busy = |rank: Rank| self.usage.get(rank.0).map_or(0.0, |usage| usage.busy.as_secs_f64());
        let of_stage = |pp| {
            let ranks = (0..mesh.tp).map(|tp| mesh.rank(Coord { tp, pp, dp: 0 }));
            ranks.map(busy).sum::<f64>() / mesh.tp as f64 / self.wall.as_secs_f64().max(1e-9)
        };
        (0..mesh.pp).map(of_stage).collect()
    }
}

/// A measured cell.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Which one.
    pub cell: Cell,
    /// What it took.
    pub times: Times,
    /// What the plan foretold.
    pub predictions: Predictions,
    /// What a decode step reads and computes, halfway through.
    pub decode: Work,
    /// What taking in one prompt reads and computes.
    pub prefill: Work,
    /// What the machine could do at best around that time.
    pub ceilings: Ceilings,
}

/// Everything that a report says.
pub struct Report {
    /// Where the numbers come from.
    pub origin: Origin,
    /// Where they were measured.
    pub device: crate::session::DeviceReport,
    /// What it can do at best, measured before the cells.
    pub ceilings: Ceilings,
    /// Name of the model.
    pub model: String,
    /// The plan that ran.
    pub plan: Plan,
    /// What loading took.
    pub load: Duration,
    /// Rounds before the measured ones.
    pub warmups: usize,
    /// Measured rounds.
    pub repeats: usize,
    /// The grid.
    pub cells: Vec<Measured>,
}

/// What a cell's steps read and compute on all ranks together: halfway through decoding, and for one prompt. Ranks that
/// share a stage count alike, as the busiest of them.
pub fn work_of(plan: &Plan, cell: Cell) -> (Work, Work) {
    let (cost, ranks) = (CostModel::of(plan), plan.mesh.tp as u128);
    let total = |shape| {
        let one = cost.step(shape).iter().fold(Work::default(), |sum, stage| sum + stage.total());
        Work { bytes: one.bytes * ranks, flops: one.flops * ranks }
    };
    let context = cell.prompt_len + cell.new_tokens / 2;
    (total(StepShape::decode(cell.batch, context)), total(StepShape::prefill(1, cell.prompt_len)))
}

/// Greedy, past every end of text, as many tokens as were asked for.
fn sampling(cell: Cell) -> Sampling {
    Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        n: 1,
        max_new_tokens: cell.new_tokens,
        min_new_tokens: 0,
        stop: Vec::new(),
        stop_ids: Vec::new(),
        ignore_eos: true,
        logprobs: None,
        prompt_logprobs: false,
    }
}

/// Tokens without a pattern, other ones for each sequence.
fn prompt(seq: usize, len: usize, n_vocab: usize) -> Vec<u32> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(seq as u64 + 1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab as u64) as u32
    };
    (0..len).map(|_| next()).collect()
}

/// Runs the rounds of a cell; `None` if the user interrupted.
pub fn measure<B: Backend>(
    engine: &mut Engine<B>,
    cell: Cell,
    n_vocab: usize,
    rounds: (usize, usize),
    interrupt: &AtomicBool,
) -> anyhow::Result<Option<Times>> {
    let (warmups, repeats) = rounds;
    for _ in 0..warmups {
        if !measure_round(engine, cell, n_vocab, interrupt, &mut Times::default())? {
            return Ok(None);
        }
    }
    let mut times = Times::default();
    engine.usage()?;
    let start = Instant::now();
    for _ in 0..repeats {
        if !measure_round(engine, cell, n_vocab, interrupt, &mut times)? {
            return Ok(None);
        }
    }
    times.wall = start.elapsed();
    times.usage = engine.usage()?;
    Ok(Some(times))
}

fn measure_round<B: Backend>(
    engine: &mut Engine<B>,
    cell: Cell,
    n_vocab: usize,
    interrupt: &AtomicBool,
    times: &mut Times,
) -> anyhow::Result<bool> {
    let start = Instant::now();
    for seq in 0..cell.batch {
        let prompt = prompt(seq, cell.prompt_len, n_vocab);
        let request = Request { id: RequestId(seq as u64), prompt, sampling: sampling(cell) };
        engine.add(request).map_err(|error| Problem::failed(error.to_string()))?;
    }
    // When each sequence got its last token, once it has one.
    let mut last = vec![None; cell.batch];
    let mut all_began = None;
    while !engine.is_idle() {
        if interrupt.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let events = engine.step()?;
        let now = Instant::now();
        let mut slowest = None;
        for event in events {
            let Event::Token { id, .. } = event else { continue };
            match last[id.0 as usize].replace(now) {
                None => times.ttft.push(now - start),
                // What took longer because others were still at their prompt is no step of the whole batch.
                Some(before) if all_began.is_some_and(|began| before >= began) => {
                    slowest = slowest.max(Some(now - before));
                }
                Some(_) => {}
            }
        }
        times.steps.extend(slowest);
        if all_began.is_none() && last.iter().all(Option::is_some) {
            all_began = Some(now);
        }
    }
    times.rounds.push(start.elapsed());
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_and_stay_in_the_vocabulary() {
        let (a, b) = (prompt(0, 100, 2048), prompt(1, 100, 2048));
        assert_ne!(a, b);
        assert!(a.iter().chain(&b).all(|&id| id < 2048));
        assert_eq!(a, prompt(0, 100, 2048));
    }
}
