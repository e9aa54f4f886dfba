//! The noise floor: how far log-probabilities of one rank move when only the order of its sums changes.
//!
//! `cargo run -p dist-models --example noise_floor` measures it and writes `benches/results/noise-floor.json`;
//! tests of many ranks read their bounds from there, so that no bound comes from what it has to judge.

#![allow(dead_code, reason = "each test binary takes what it needs")]

use std::collections::BTreeMap;

use dist_core::Mesh;
use dist_kernels::cpu::CpuPath;
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, Followers};
use serde::{Deserialize, Serialize};

use super::fixtures::{Case, fixture, plan, repo, runner, wide};
use super::reorder::reordered;
use super::trails::{Trail, drain, golden_requests, max_diff};

/// Orders that are drawn for each fixture.
pub(crate) const N_ORDERS: u64 = 32;

/// What a split over ranks may differ by, in floors. Such a split is one more order of summation, and the floor is the
/// largest of many, so one floor would nearly do; the rest is room for the tail of the distribution, and far less than
/// what a wrong bias, scale or cut makes.
pub(crate) const FLOORS: f32 = 4.0;

/// The file of the floor.
pub(crate) const FILE: &str = "benches/results/noise-floor.json";

/// What `benches/results/noise-floor.json` holds.
#[derive(Serialize, Deserialize)]
pub(crate) struct NoiseFloor {
    /// In words.
    pub(crate) what: String,
    /// Processor.
    pub(crate) device: String,
    /// Type of weights and sums.
    pub(crate) dtype: String,
    /// The commit that was measured.
    pub(crate) commit: String,
    /// What was typed.
    pub(crate) command: String,
    /// Orders drawn for each fixture.
    pub(crate) orders: u64,
    /// Largest absolute difference of log-probabilities from the stored order, for each fixture.
    pub(crate) floors: BTreeMap<String, f32>,
}

/// The floors as written.
pub(crate) fn written() -> NoiseFloor {
    let text = std::fs::read_to_string(repo().join(FILE)).expect("the noise floor is committed");
    serde_json::from_str(&text).expect("a noise floor")
}

/// How far log-probabilities of a fixture may differ between one rank and many.
pub(crate) fn bound(name: &str) -> f32 {
    FLOORS * written().floors[name]
}

/// A run of the fixture's golden prompts on one rank.
pub(crate) fn solo(checkpoint: &Checkpoint, cases: &[Case]) -> Vec<Trail> {
    let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), 256);
    let mut engine = Engine::new(runner(checkpoint, &plan, 1, CpuPath::Auto), Followers::None, &plan, None);
    for request in golden_requests(cases) {
        engine.add(request).expect("a sound request");
    }
    drain(&mut engine, cases.len())
}

/// The largest difference that `n_orders` other orders of summation make; greedy tokens must not move.
pub(crate) fn measure(name: &str, n_orders: u64) -> f32 {
    let (checkpoint, cases) = fixture(name);
    let stored = solo(&checkpoint, &cases);
    let diff_of = |seed| {
        let permuted = solo(&reordered(name, seed), &cases);
        for (case, trail) in cases.iter().zip(&permuted) {
            assert_eq!(trail.ids(), case.greedy, "{name}: order {seed} gives other tokens");
        }
        max_diff(&stored, &permuted)
    };
    (0..n_orders).map(diff_of).fold(0.0, f32::max)
}
