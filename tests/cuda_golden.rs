//! The decoder on a GPU against Hugging Face transformers: log-probabilities of every fixture and of the demo model,
//! within twice of what bf16 itself costs, which is measured beside. Without a GPU the tests say so and pass.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what was seen, beside the bound; skips are loud"
)]

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;
#[path = "support/gpu.rs"]
mod gpu;
#[path = "support/rounding.rs"]
mod rounding;

use std::ops::ControlFlow;

use dist_comm::{Comm, Solo};
use dist_core::plan::Plan;
use dist_core::{DType, Mesh, Rank};
use dist_kernels::Backend;
use dist_kernels::cpu::CpuPath;
use dist_kernels::cuda::CudaBackend;
use dist_models::checkpoint::{Checkpoint, OpenOptions};
use dist_models::engine::{Engine, Followers, start_rank};
use dist_models::request::{Event, Request, RequestId};
use dist_models::runner::Comms;
use fixtures::{NAMES, backend, fixture, greedy, plan, repo, wide};
use gpu::gpu;
use rounding::Rounding;
use serde::Deserialize;

/// A prompt and the log-probabilities of all its tokens but the first.
type Golden = (Vec<u32>, Vec<f32>);

/// Log-probabilities of all prompts, which go through the engine together.
fn logprobs<B: Backend>(backend: B, checkpoint: &Checkpoint, plan: &Plan, cases: &[Golden]) -> Vec<Vec<f32>> {
    let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
    let runner = start_rank(backend, comms, checkpoint, plan, Rank(0), &mut |_| ControlFlow::Continue(()));
    let mut engine = Engine::new(runner.expect("a fixture loads"), Followers::None, plan, None);
    for (i, (prompt, _)) in cases.iter().enumerate() {
        let request = Request { id: RequestId(i as u64), prompt: prompt.clone(), sampling: greedy(4) };
        engine.add(request).expect("a sound request");
    }
    let mut found = vec![Vec::new(); cases.len()];
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            if let Event::Prompt { id, logprobs } = event {
                found[id.0 as usize].extend(logprobs.iter().map(|token| token.logprob));
            }
        }
    }
    found
}

/// The largest difference; NaN counts as one that no bound allows.
fn largest(found: &[Vec<f32>], cases: &[Golden]) -> f32 {
    let mut most = 0.0_f32;
    for (found, (_, expected)) in found.iter().zip(cases) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            let apart = (a - b).abs();
            most = if apart <= most { most } else { apart };
        }
    }
    most
}

/// A plan, and how far bf16 by itself is from the reference.
fn floor(checkpoint: &Checkpoint, cases: &[Golden]) -> (Plan, f32) {
    let config = checkpoint.config();
    let mut plan = plan(config, Mesh::SOLO, wide(config), 256);
    plan.kv.dtype = DType::BF16;
    let rounding = Rounding(backend(2, CpuPath::Auto));
    let floor = largest(&logprobs(rounding, checkpoint, &plan, cases), cases);
    assert!(floor > 1e-4 && floor < 0.3, "{}: a floor of {floor} is not that of bf16", config.name);
    (plan, floor)
}

fn check(gpu: CudaBackend, checkpoint: &Checkpoint, cases: &[Golden]) {
    let (mut plan, floor) = floor(checkpoint, cases);
    (plan.act_dtype, plan.wire_dtype) = (DType::BF16, DType::BF16);
    let found = largest(&logprobs(gpu, checkpoint, &plan, cases), cases);
    let name = &checkpoint.config().name;
    println!("{name}: log-probabilities differ by {found:.2e}, by {floor:.2e} for bf16 alone");
    assert!(found <= 2.0 * floor, "{name}: {found} is more than twice {floor}");
}

/// Needs no GPU: the bound of the other tests is what it says.
#[test]
fn what_bf16_costs_by_itself_is_measured() {
    for name in NAMES {
        let (checkpoint, cases) = golden_fixture(name);
        println!("{name}: {:.2e} for bf16 alone", floor(&checkpoint, &cases).1);
    }
    let (checkpoint, cases) = demo();
    println!("demo model: {:.2e} for bf16 alone", floor(&checkpoint, &cases).1);
}

fn golden_fixture(name: &str) -> (Checkpoint, Vec<Golden>) {
    let (checkpoint, cases) = fixture(name);
    (checkpoint, cases.into_iter().map(|case| (case.ids, case.logprobs)).collect())
}

#[test]
fn fixtures_have_the_reference_logprobs_on_a_gpu() {
    for name in NAMES {
        let Some((_one, gpu)) = gpu("fixtures_have_the_reference_logprobs_on_a_gpu") else { return };
        let (checkpoint, cases) = golden_fixture(name);
        check(gpu, &checkpoint, &cases);
    }
}

#[derive(Deserialize)]
struct DemoCase {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
}

fn demo() -> (Checkpoint, Vec<Golden>) {
    let dir = repo().join("crates/dist-cli/assets/demo-model");
    let checkpoint = Checkpoint::open(&dir, &OpenOptions { mmap: false }).expect("the demo model opens");
    let golden = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let cases: Vec<DemoCase> = serde_json::from_str(&golden).expect("golden cases");
    (checkpoint, cases.into_iter().map(|case| (case.ids, case.logprobs)).collect())
}

#[test]
fn the_demo_model_has_the_reference_logprobs_on_a_gpu() {
    let Some((_one, gpu)) = gpu("the_demo_model_has_the_reference_logprobs_on_a_gpu") else { return };
    let (checkpoint, cases) = demo();
    check(gpu, &checkpoint, &cases);
}
