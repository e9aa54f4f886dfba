//! The same answer everywhere: bits of log-probabilities and sampled tokens do not depend on the batch, on chunks, on
//! threads, on the instructions used, on preemption, nor on the tensor-parallel degree where widths divide.

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use dist_comm::{Comm, Local};
use dist_core::plan::Limits;
use dist_core::{Coord, Mesh, Rank};
use dist_kernels::cpu::{CpuBackend, CpuPath};
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, Followers, start_rank};
use dist_models::request::{Event, Request, RequestId, Sampling};
use dist_models::runner::Comms;
use dist_models::step::StepBatch;
use fixtures::{backend, fixture, greedy, plan, runner, wide};

/// Everything that a request gave, log-probabilities as bits.
#[derive(Clone, Debug, Default, PartialEq)]
struct Trail {
    prompt: Vec<u32>,
    tokens: Vec<(u32, u32)>,
}

/// How the requests are run.
#[derive(Clone, Copy)]
struct Setting {
    limits: Limits,
    n_blocks: usize,
    threads: usize,
    path: CpuPath,
}

fn requests(n: usize, n_vocab: u32) -> Vec<Request> {
    let request = |i: usize| {
        let len = 1 + (i * 7) % 40;
        let prompt = (0..len).map(|j| (3 + i * 31 + j * j * 17 + j) as u32 % n_vocab).collect();
        let drawn = Sampling { temperature: 0.9, top_k: 50, top_p: 0.95, seed: i as u64, ..greedy(20) };
        Request {
            id: RequestId(i as u64),
            prompt,
            sampling: if i.is_multiple_of(2) { greedy(20) } else { drawn },
        }
    };
    (0..n).map(request).collect()
}

fn drain(engine: &mut Engine<CpuBackend>, n: usize) -> Vec<Trail> {
    let mut trails = vec![Trail::default(); n];
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            match event {
                Event::Prompt { id, logprobs } => {
                    trails[id.0 as usize].prompt.extend(logprobs.iter().map(|t| t.logprob.to_bits()));
                }
                Event::Token { id, token, .. } => {
                    trails[id.0 as usize].tokens.push((token.id, token.logprob.to_bits()));
                }
                Event::Finished { .. } => {}
            }
        }
    }
    trails
}

fn run(checkpoint: &Checkpoint, requests: &[Request], setting: Setting) -> (Vec<Trail>, u64) {
    let plan = plan(checkpoint.config(), Mesh::SOLO, setting.limits, setting.n_blocks);
    let runner = runner(checkpoint, &plan, setting.threads, setting.path);
    let mut engine = Engine::new(runner, Followers::None, &plan, None);
    for request in requests {
        engine.add(request.clone()).expect("a sound request");
    }
    let n = requests.iter().map(|request| request.id.0 as usize + 1).max().unwrap_or(0);
    (drain(&mut engine, n), engine.stats().n_preemptions)
}

#[test]
fn bits_do_not_depend_on_how_a_request_is_run() {
    for name in ["gpt2", "gpt-neo-banded", "opt-post-norm-proj"] {
        let (checkpoint, _) = fixture(name);
        let requests = requests(64, checkpoint.config().n_vocab as u32);
        let wide = wide(checkpoint.config());
        let base = Setting { limits: wide, n_blocks: 512, threads: 1, path: CpuPath::Auto };
        let (reference, _) = run(&checkpoint, &requests, base);
        assert!(
            reference.iter().all(|trail| trail.tokens.len() == 20),
            "{name}: every request ran to its end"
        );
        let chunked = Limits { max_batch_tokens: 5, max_seqs: 3, max_sample_rows: 4, ..wide };
        let settings = [
            ("2 threads", Setting { threads: 2, ..base }),
            ("4 threads", Setting { threads: 4, ..base }),
            ("portable", Setting { path: CpuPath::Portable, ..base }),
            ("chunks of 5 rows", Setting { limits: chunked, ..base }),
        ];
        for (what, setting) in settings {
            assert_eq!(run(&checkpoint, &requests, setting).0, reference, "{name}: {what}");
        }
        for (i, request) in requests.iter().enumerate().step_by(5) {
            let alone = run(&checkpoint, std::slice::from_ref(request), base).0;
            assert_eq!(alone[i], reference[i], "{name}: request {i} alone");
        }
    }
}

#[test]
fn preemption_leaves_no_trace() {
    let (checkpoint, _) = fixture("gpt2");
    let requests = requests(24, checkpoint.config().n_vocab as u32);
    let wide = wide(checkpoint.config());
    let base = Setting { limits: wide, n_blocks: 512, threads: 2, path: CpuPath::Auto };
    let (reference, none) = run(&checkpoint, &requests, base);
    let (tight, some) = run(&checkpoint, &requests, Setting { n_blocks: 9, ..base });
    assert!(none == 0 && some > 0, "{none} preemptions with room, {some} without");
    assert_eq!(tight, reference);
}

/// Each rank's groups: its stage's tensor-parallel ranks, and the stages that it passes rows to and from.
fn groups(mesh: Mesh) -> Vec<Comms> {
    let deadline = Duration::from_secs(60);
    let rank = |tp, pp| mesh.rank(Coord { tp, pp, dp: 0 });
    let tp_groups =
        (0..mesh.pp).map(|pp| Local::group((0..mesh.tp).map(|tp| rank(tp, pp)).collect(), deadline));
    let pp_groups =
        (0..mesh.tp).map(|tp| Local::group((0..mesh.pp).map(|pp| rank(tp, pp)).collect(), deadline));
    let mut pp_ends: Vec<_> = pp_groups.map(Vec::into_iter).collect();
    let mut comms = Vec::new();
    for stage in tp_groups {
        for (tp, end) in stage.into_iter().enumerate() {
            let pp = pp_ends[tp].next().expect("one end a stage");
            comms.push(Comms { tp: Comm::Local(end), pp: Comm::Local(pp) });
        }
    }
    comms
}

/// Every rank a thread, the leader with the engine, the followers with what it sends them.
fn run_mesh(checkpoint: &Checkpoint, requests: &[Request], mesh: Mesh) -> Vec<Trail> {
    let plan = plan(checkpoint.config(), mesh, wide(checkpoint.config()), 512);
    let start = |rank: usize, comms: Comms| {
        start_rank(backend(1, CpuPath::Auto), comms, checkpoint, &plan, Rank(rank), &mut |_| {})
            .expect("a fixture loads")
    };
    std::thread::scope(|scope| {
        let mut comms = groups(mesh).into_iter();
        let leader = comms.next().expect("rank 0");
        let mut senders = Vec::new();
        for (i, comms) in comms.enumerate() {
            let (sender, batches) = channel::<Arc<StepBatch>>();
            senders.push(sender);
            let start = &start;
            scope.spawn(move || {
                let mut runner = start(i + 1, comms);
                for batch in batches {
                    runner.submit(&batch).expect("a step");
                    runner.collect().expect("a step");
                }
            });
        }
        let runner = start(0, leader);
        let mut engine = Engine::new(runner, Followers::Threads(senders), &plan, None);
        for request in requests {
            engine.add(request.clone()).expect("a sound request");
        }
        drain(&mut engine, requests.len())
    })
}

#[test]
fn stages_give_the_same_bits() {
    for name in ["gpt2", "opt-post-norm-proj", "gpt-neo-banded"] {
        let (checkpoint, _) = fixture(name);
        let requests = requests(12, checkpoint.config().n_vocab as u32);
        let reference = run_mesh(&checkpoint, &requests, Mesh::SOLO);
        for (tp, pp) in [(1, 2), (2, 2), (4, 2)] {
            let mesh = Mesh { tp, pp, dp: 1 };
            assert_eq!(run_mesh(&checkpoint, &requests, mesh), reference, "{name}: {mesh}");
        }
    }
}

#[test]
fn tensor_parallel_degrees_that_divide_give_the_same_bits() {
    for name in ["gpt2", "opt", "opt-post-norm-proj", "gpt-neo-banded", "gpt2-scaled-attn"] {
        let (checkpoint, _) = fixture(name);
        let requests = requests(12, checkpoint.config().n_vocab as u32);
        let reference = run_mesh(&checkpoint, &requests, Mesh::SOLO);
        for tp in [2, 4] {
            let mesh = Mesh { tp, pp: 1, dp: 1 };
            assert_eq!(run_mesh(&checkpoint, &requests, mesh), reference, "{name}: tp {tp}");
        }
    }
}

#[test]
fn a_degree_that_does_not_divide_runs_all_the_same() {
    let (checkpoint, cases) = fixture("gpt2");
    let requests: Vec<Request> = cases
        .iter()
        .enumerate()
        .map(|(i, case)| Request { id: RequestId(i as u64), prompt: case.ids.clone(), sampling: greedy(12) })
        .collect();
    let trails = run_mesh(&checkpoint, &requests, Mesh { tp: 3, pp: 1, dp: 1 });
    for (case, trail) in cases.iter().zip(trails) {
        let ids: Vec<u32> = trail.tokens.iter().map(|&(id, _)| id).collect();
        assert_eq!(ids, case.greedy, "four heads over three ranks");
    }
}
