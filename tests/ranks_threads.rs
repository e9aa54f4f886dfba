//! One model over many ranks, each a thread: tensor parallel, pipeline parallel and both give one rank's answer, bit for
//! bit where heads and widths divide and within the noise of f32 summation order elsewhere, and all ranks of a mesh hold
//! the same bits.

#![allow(clippy::print_stdout, reason = "shown with --nocapture: how far from the bound")]

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;
#[path = "support/noise.rs"]
mod noise;
#[path = "support/reorder.rs"]
mod reorder;
#[path = "support/trails.rs"]
mod trails;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use dist_comm::{Comm, Local};
use dist_core::{Coord, Mesh, ModelConfig, Rank};
use dist_kernels::args::K_SEGMENTS;
use dist_kernels::cpu::CpuPath;
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, Followers, start_rank};
use dist_models::request::{Request, RequestId};
use dist_models::runner::Comms;
use dist_models::step::{StepBatch, StepOutput};
use fixtures::{Case, NAMES, backend, fixture, plan, wide};
use trails::{Trail, drain, golden_requests, max_diff, requests};

/// Each rank's groups: its stage's tensor-parallel ranks, and the stages that it passes rows to and from.
fn groups(mesh: Mesh) -> Vec<Comms> {
    let deadline = Duration::from_secs(120);
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

/// What a mesh gave.
struct Ran {
    /// As the leader tells it.
    trails: Vec<Trail>,
    /// What each following rank saw of every step: all of them on the first and on the last stage, none between.
    seen: Vec<Vec<StepOutput>>,
}

/// Every rank a thread, the leader with the engine, the followers with what it sends them.
fn run_mesh(checkpoint: &Checkpoint, requests: &[Request], mesh: Mesh) -> Ran {
    let plan = plan(checkpoint.config(), mesh, wide(checkpoint.config()), 512);
    let start = |rank: usize, comms: Comms| {
        start_rank(backend(1, CpuPath::Auto), comms, checkpoint, &plan, Rank(rank), &mut |_| {
            ControlFlow::Continue(())
        })
        .expect("a fixture loads")
    };
    std::thread::scope(|scope| {
        let mut comms = groups(mesh).into_iter();
        let leader = comms.next().expect("rank 0");
        let (mut senders, mut followers) = (Vec::new(), Vec::new());
        for (i, comms) in comms.enumerate() {
            let (sender, batches) = channel::<Arc<StepBatch>>();
            senders.push(sender);
            let start = &start;
            followers.push(scope.spawn(move || {
                let mut runner = start(i + 1, comms);
                let mut seen = Vec::new();
                for batch in batches {
                    runner.submit(&batch).expect("a step");
                    seen.extend(runner.collect().expect("a step"));
                }
                seen
            }));
        }
        let mut engine = Engine::new(start(0, leader), Followers::Threads(senders), &plan, None);
        for request in requests {
            engine.add(request.clone()).expect("a sound request");
        }
        let trails = drain(&mut engine, requests.len());
        drop(engine);
        let seen = followers.into_iter().map(|rank| rank.join().expect("a rank ends well")).collect();
        Ran { trails, seen }
    })
}

/// The golden prompts with their likeliest tokens, and as many others, half of them drawn.
fn mixed(cases: &[Case], config: &ModelConfig) -> Vec<Request> {
    let mut all = golden_requests(cases);
    all.extend(requests(6, config.n_vocab as u32));
    for (i, request) in all.iter_mut().enumerate() {
        request.id = RequestId(i as u64);
    }
    all
}

/// Whether `tp` ranks add in the order of one: each rank's share of every row-parallel product then is whole segments.
fn divides(config: &ModelConfig, tp: usize) -> bool {
    let widths = [config.n_heads * config.d_head, config.d_ff];
    config.n_heads.is_multiple_of(tp) && widths.iter().all(|width| width.is_multiple_of(K_SEGMENTS))
}

/// Ranks of the first and the last stage drew the same, to the last bit of the likeliest tokens, and the leader tells it.
#[track_caller]
fn assert_ranks_agree(name: &str, mesh: Mesh, ran: &Ran) {
    let mut reference: Option<&Vec<StepOutput>> = None;
    for (i, seen) in ran.seen.iter().enumerate() {
        let (rank, stage) = (Rank(i + 1), mesh.coord(Rank(i + 1)).pp);
        if stage == 0 || stage == mesh.pp - 1 {
            let first = *reference.get_or_insert(seen);
            assert!(seen == first, "{name}, {mesh}: {rank} drew otherwise than the ranks before it");
        } else {
            assert!(seen.is_empty(), "{name}, {mesh}: {rank} is on a stage between and sees no output");
        }
    }
    // Steps mix requests, so that the same bits are in another order here.
    let drawn = reference.expect("a mesh of several ranks").iter().flat_map(|output| &output.sampled);
    let told = ran.trails.iter().flat_map(|trail| {
        let tokens = trail.tokens.iter().map(|&(_, bits)| bits);
        trail.prompt.iter().copied().chain(tokens)
    });
    let drawn = sorted(drawn.map(|sampled| sampled.logprob.to_bits()));
    assert!(drawn == sorted(told), "{name}, {mesh}: the leader tells other bits than the ranks drew");
}

fn sorted(bits: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut bits: Vec<u32> = bits.collect();
    bits.sort_unstable();
    bits
}

/// One fixture at every mesh that it allows.
fn check_fixture(name: &str) {
    let (checkpoint, cases) = fixture(name);
    let config = checkpoint.config();
    let (requests, bound) = (mixed(&cases, config), noise::bound(name));
    let reference = run_mesh(&checkpoint, &requests, Mesh::SOLO).trails;
    let (mut n_meshes, mut n_equal) = (0, 0);
    for (tp, pp) in [1, 2, 4].into_iter().flat_map(|tp| [1, 2, 3].map(|pp| (tp, pp))).skip(1) {
        let mesh = Mesh { tp, pp, dp: 1 };
        if pp > config.n_layers {
            continue;
        }
        let ran = run_mesh(&checkpoint, &requests, mesh);
        let diff = max_diff(&ran.trails[..cases.len()], &reference[..cases.len()]);
        println!("{name}, {mesh}: log-probabilities differ by {diff:.2e}, the bound is {bound:.2e}");
        assert!(diff <= bound, "{name}, {mesh}: {diff:e} is over the bound of {bound:e}");
        for (case, trail) in cases.iter().zip(&ran.trails) {
            assert_eq!(trail.ids(), case.greedy, "{name}, {mesh}: greedy tokens");
        }
        if divides(config, tp) {
            assert!(ran.trails == reference, "{name}, {mesh}: widths divide, so bits must be equal");
            n_equal += 1;
        }
        assert_ranks_agree(name, mesh, &ran);
        n_meshes += 1;
    }
    let stages = config.n_layers.min(3);
    assert_eq!(n_meshes, 3 * stages - 1, "{name}: every legal mesh was run");
    assert!(n_equal >= 2 * stages - 1, "{name}: {n_equal} meshes of {n_meshes} were held to equal bits");
}

#[test]
fn gpt2_is_the_same_at_every_mesh() {
    check_fixture("gpt2");
}

#[test]
fn gpt2_erf_inner_is_the_same_at_every_mesh() {
    check_fixture("gpt2-erf-inner");
}

#[test]
fn gpt2_scaled_attn_is_the_same_at_every_mesh() {
    check_fixture("gpt2-scaled-attn");
}

#[test]
fn opt_is_the_same_at_every_mesh() {
    check_fixture("opt");
}

#[test]
fn opt_post_norm_proj_is_the_same_at_every_mesh() {
    check_fixture("opt-post-norm-proj");
}

#[test]
fn gpt_neo_banded_is_the_same_at_every_mesh() {
    check_fixture("gpt-neo-banded");
}

/// Four or six heads over three ranks: no order of one rank is kept, so the floor's bound is what there is.
#[test]
fn heads_that_do_not_divide_run_all_the_same() {
    for name in NAMES {
        let (checkpoint, cases) = fixture(name);
        let requests = golden_requests(&cases);
        let reference = run_mesh(&checkpoint, &requests, Mesh::SOLO).trails;
        for pp in [1, 2] {
            let mesh = Mesh { tp: 3, pp, dp: 1 };
            let ran = run_mesh(&checkpoint, &requests, mesh);
            for (case, trail) in cases.iter().zip(&ran.trails) {
                assert_eq!(trail.ids(), case.greedy, "{name}, {mesh}: greedy tokens");
            }
            let (diff, bound) = (max_diff(&ran.trails, &reference), noise::bound(name));
            println!("{name}, {mesh}: log-probabilities differ by {diff:.2e}, the bound is {bound:.2e}");
            assert!(diff <= bound, "{name}, {mesh}: {diff:e} is over the bound of {bound:e}");
            assert_ranks_agree(name, mesh, &ran);
        }
    }
}
