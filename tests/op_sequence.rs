//! The sequence of steps is a snapshot, and no step takes memory: a lost fusion or a sneaked-in allocation shows here,
//! without any device.

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;

use std::ops::ControlFlow;

use dist_comm::{Comm, Solo};
use dist_core::cost::StepShape;
use dist_core::{CostModel, Mesh, Rank};
use dist_kernels::trace::TraceBackend;
use dist_models::decoder::{LoadError, OnProgress};
use dist_models::engine::{EngineError, start_rank};
use dist_models::runner::{Comms, Runner};
use dist_models::step::{InputToken, SampleAt, StepBatch};
use fixtures::{fixture, plan, wide};

fn decode_batch() -> StepBatch {
    StepBatch {
        generation: 0,
        step: 0,
        tokens: vec![InputToken::Known(5), InputToken::Known(6)],
        positions: vec![3, 17],
        slots: vec![3, 33],
        q_offsets: vec![0, 1, 2],
        context_lens: vec![4, 18],
        seq_slots: vec![0, 1],
        block_tables: vec![0, 0, 1, 2],
        max_blocks: 2,
        samples: vec![SampleAt { row: 0, seq_slot: Some(0), how: fixtures::greedy_row(), n_top: 1 }],
    }
}

fn started(name: &str, progress: OnProgress<'_>) -> Result<Runner<TraceBackend>, EngineError> {
    let (checkpoint, _) = fixture(name);
    let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), 8);
    let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
    start_rank(TraceBackend::default(), comms, &checkpoint, &plan, Rank(0), progress)
}

fn traced(name: &str) -> Runner<TraceBackend> {
    started(name, &mut |_| ControlFlow::Continue(())).expect("a fixture loads")
}

#[test]
fn loading_ends_when_nobody_wants_more() {
    let mut n_tensors = 0;
    let started = started("gpt2", &mut |_| {
        n_tensors += 1;
        if n_tensors == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let error = started.err().expect("an error");
    let EngineError::Load(LoadError::BrokenOff { done_bytes, total_bytes }) = error else {
        panic!("{error}")
    };
    assert!(n_tensors == 3 && 0 < done_bytes && done_bytes < total_bytes, "{done_bytes} of {total_bytes}");
}

fn steps_of(name: &str) -> Vec<String> {
    let mut runner = traced(name);
    runner.submit(&decode_batch()).expect("a step");
    runner.backend().take_steps()
}

#[test]
fn a_pre_norm_layer_is_seven_steps() {
    let layer = [
        "linear+bias+append_kv",
        "attention",
        "linear",
        "add_bias_layer_norm",
        "linear+bias+gelu_tanh",
        "linear",
        "add_bias_layer_norm",
    ];
    let mut expected = vec!["embed+tokens+positions", "layer_norm"];
    (0..3).for_each(|_| expected.extend(layer));
    expected.extend(["gather_rows", "logits", "sample"]);
    assert_eq!(steps_of("gpt2"), expected);
}

#[test]
fn a_post_norm_model_with_projections_keeps_what_it_normalised() {
    let layer = [
        "linear+bias+append_kv",
        "attention",
        "linear",
        "add_bias_layer_norm+keep_normed",
        "linear+bias+relu",
        "linear",
        "add_bias_layer_norm+keep_normed",
    ];
    let mut expected = vec!["embed+tokens", "linear", "embed+positions", ""];
    (0..2).for_each(|_| expected.extend(layer));
    expected.extend(["gather_rows", "linear", "logits", "sample"]);
    assert_eq!(steps_of("opt-post-norm-proj"), expected);
}

#[test]
fn banded_layers_alternate_and_have_no_qkv_bias() {
    let steps = steps_of("gpt-neo-banded");
    let attention: Vec<_> = steps.iter().filter(|step| step.starts_with("attention")).collect();
    assert_eq!(attention, ["attention", "attention+window", "attention", "attention+window"]);
    assert_eq!(steps.iter().filter(|step| *step == "linear+append_kv").count(), 4);
}

/// What the cost model counts: each step a launch, the step's arrays one, and its draws one on their way back.
#[test]
fn the_cost_model_counts_the_launches_of_a_step() {
    for name in fixtures::NAMES {
        let (checkpoint, _) = fixture(name);
        let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), 8);
        let work = CostModel::of(&plan).step(StepShape::decode(2, 17));
        assert_eq!(work[0].launches, steps_of(name).len() + 2, "{name}");
    }
}

#[test]
fn a_step_takes_no_memory() {
    let mut runner = traced("gpt2");
    let before = runner.backend().allocations();
    for _ in 0..3 {
        runner.submit(&decode_batch()).expect("a step");
    }
    assert_eq!(runner.backend().allocations(), before);
}

/// What the plan predicts is what is taken: cache and workspace, to the byte; the vectors of the model are weights.
#[test]
fn the_plan_knows_the_memory_of_a_run() {
    for name in fixtures::NAMES {
        let (checkpoint, _) = fixture(name);
        let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), 8);
        let vectors: usize = plan
            .specs(Rank(0))
            .iter()
            .filter(|spec| spec.shape.len() == 1)
            .map(|spec| spec.n_elements() * 4)
            .sum();
        let memory = plan.memory(Rank(0));
        let (_, taken) = traced(name).backend().allocations();
        assert_eq!((taken - vectors) as u64, memory.kv + memory.workspace, "{name}");
    }
}
