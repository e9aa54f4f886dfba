//! Decode steps as graphs on a GPU: the bits of the same steps asked for kernel by kernel, the launches that they should
//! have, and rows that do not know their neighbours. Without a GPU the tests say so and pass.

#![allow(clippy::print_stderr, reason = "skips are loud")]

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;
#[path = "support/gpu.rs"]
mod gpu;

use std::ops::ControlFlow;

use dist_comm::{Comm, Solo};
use dist_core::plan::Plan;
use dist_core::{DType, Mesh, Rank};
use dist_kernels::cuda::CudaBackend;
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, Followers, start_rank};
use dist_models::request::{Event, Request, RequestId, Sampling};
use dist_models::runner::{Comms, Runner};
use fixtures::{NAMES, fixture, greedy, plan, wide};
use gpu::gpu;

const NEW_TOKENS: usize = 12;

fn plan_of(checkpoint: &Checkpoint) -> Plan {
    let config = checkpoint.config();
    let mut plan = plan(config, Mesh::SOLO, wide(config), 256);
    (plan.kv.dtype, plan.act_dtype, plan.wire_dtype) = (DType::BF16, DType::BF16, DType::BF16);
    plan
}

fn start(gpu: CudaBackend, checkpoint: &Checkpoint, plan: &Plan) -> Runner<CudaBackend> {
    let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
    let go_on = &mut |_| ControlFlow::Continue(());
    start_rank(gpu, comms, checkpoint, plan, Rank(0), go_on).expect("a fixture loads")
}

/// Tokens of each request, with the bits of their log-probabilities.
type Written = Vec<Vec<(u32, u32)>>;

/// Lets all requests run at once.
fn write(engine: &mut Engine<CudaBackend>, requests: &[(Vec<u32>, Sampling)]) -> Written {
    for (i, (prompt, sampling)) in requests.iter().enumerate() {
        let (prompt, sampling) = (prompt.clone(), sampling.clone());
        engine.add(Request { id: RequestId(i as u64), prompt, sampling }).expect("a sound request");
    }
    let mut written = vec![Vec::new(); requests.len()];
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            if let Event::Token { id, token, .. } = event {
                written[id.0 as usize].push((token.id, token.logprob.to_bits()));
            }
        }
    }
    assert!(written.iter().all(|tokens| tokens.len() == NEW_TOKENS), "every request gets all its tokens");
    written
}

/// Requests that draw in different ways.
fn requests(prompts: &[Vec<u32>], n: usize, logprobs: Option<u32>) -> Vec<(Vec<u32>, Sampling)> {
    let sampling = |i: usize| Sampling {
        temperature: if i.is_multiple_of(3) { 0.0 } else { 0.9 },
        top_p: if i % 3 == 2 { 0.8 } else { 1.0 },
        seed: i as u64,
        ignore_eos: true,
        logprobs,
        ..greedy(NEW_TOKENS)
    };
    (0..n).map(|i| (prompts[i % prompts.len()].clone(), sampling(i))).collect()
}

#[test]
fn a_recorded_step_gives_the_bits_of_its_launches() {
    for name in NAMES {
        let Some((_one, gpu)) = gpu("a_recorded_step_gives_the_bits_of_its_launches") else { return };
        let (checkpoint, cases) = fixture(name);
        let plan = plan_of(&checkpoint);
        let mut engine = Engine::new(start(gpu, &checkpoint, &plan), Followers::None, &plan, None);
        let prompts: Vec<_> = cases.into_iter().map(|case| case.ids).collect();
        for n in [1, 3, 5] {
            let n = n.min(plan.limits.max_seqs);
            let graph = write(&mut engine, &requests(&prompts, n, None));
            // Whoever wants likeliest tokens gets them step by step.
            let steps = write(&mut engine, &requests(&prompts, n, Some(2)));
            assert_eq!(graph, steps, "{name}: {n} requests");
        }
    }
}

#[test]
fn a_row_does_not_know_its_neighbours() {
    let Some((_one, gpu)) = gpu("a_row_does_not_know_its_neighbours") else { return };
    let (checkpoint, cases) = fixture(NAMES[0]);
    let plan = plan_of(&checkpoint);
    let n_vocab = checkpoint.config().n_vocab as u32;
    let mut engine = Engine::new(start(gpu, &checkpoint, &plan), Followers::None, &plan, None);
    let prompts: Vec<_> = cases.into_iter().map(|case| case.ids).collect();
    let all = requests(&prompts, 4.min(plan.limits.max_seqs), None);
    let mut others = all.clone();
    for (i, (prompt, sampling)) in others.iter_mut().enumerate().skip(1) {
        for id in prompt {
            *id = (*id + i as u32) % n_vocab;
        }
        sampling.temperature = 1.3;
    }
    let (found, with_others) = (write(&mut engine, &all), write(&mut engine, &others));
    assert_eq!(found[0], with_others[0]);
    assert_ne!(found[1], with_others[1], "the neighbours are others");
}

#[test]
fn a_decode_step_has_the_launches_that_it_needs() {
    for name in NAMES {
        let Some((_one, gpu)) = gpu("a_decode_step_has_the_launches_that_it_needs") else { return };
        let (checkpoint, _) = fixture(name);
        let plan = plan_of(&checkpoint);
        let runner = start(gpu, &checkpoint, &plan);
        let config = checkpoint.config();
        // Embedding and first norm; per layer qkv with its cache, attention, projection, norm, two products, norm; rows
        // that draw, logits, draw. Narrow embeddings are projected on both ends, and positions added after.
        let narrow = if config.d_embed == config.d_model { 0 } else { 3 };
        let expected = 2 + 7 * config.n_layers + 3 + narrow;
        let rows: Vec<_> = runner.graphs().map(|(rows, _)| rows).collect();
        assert_eq!(rows.last(), Some(&plan.limits.max_seqs), "{name}: {rows:?}");
        for (rows, graph) in runner.graphs() {
            assert_eq!(graph.n_nodes(), expected, "{name}, {rows} rows");
        }
    }
}

#[test]
fn without_graphs_every_kernel_is_launched_by_itself() {
    let Some((_one, gpu)) = gpu("without_graphs_every_kernel_is_launched_by_itself") else { return };
    let (checkpoint, cases) = fixture(NAMES[0]);
    let plan = plan_of(&checkpoint);
    let runner = start(gpu.without_graphs(), &checkpoint, &plan);
    assert_eq!(runner.graphs().count(), 0);
    let mut engine = Engine::new(runner, Followers::None, &plan, None);
    write(&mut engine, &requests(&[cases[0].ids.clone()], 2, None));
}
