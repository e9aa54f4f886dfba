//! An engine or a runner whose step has failed: every later call says so and names the first failure, none panics, and
//! no token comes that a healthy run would not have given.

#[path = "engine_fake/device.rs"]
mod device;

use std::error::Error;
use std::ops::ControlFlow;
use std::sync::mpsc::channel;

use device::{Call, FakeGpu, Fault};
use dist_comm::{Comm, Solo};
use dist_core::plan::{KvPlan, Limits, Plan, Predictions, SCHEMA_VERSION};
use dist_core::{DType, Mesh, Rank, presets};
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, EngineError, Followers, start_rank};
use dist_models::request::{Event, Request, RequestId, Sampling};
use dist_models::runner::{Comms, RunError, Runner};
use dist_models::step::{InputToken, SampleAt, StepBatch};

const N_VOCAB: usize = 500;
const NEW_TOKENS: usize = 6;

/// A small model whose decode steps of up to two rows are recorded.
fn plan() -> Plan {
    let mut model = presets::preset("gpt3-125m", None).expect("listed");
    (model.n_layers, model.d_model, model.d_embed, model.d_ff) = (1, 16, 16, 32);
    (model.n_heads, model.n_kv_heads, model.d_head, model.n_vocab) = (2, 2, 8, N_VOCAB);
    model.windows.truncate(1);
    Plan {
        schema_version: SCHEMA_VERSION,
        model,
        mesh: Mesh::SOLO,
        stages: vec![1],
        act_dtype: DType::F32,
        wire_dtype: DType::F32,
        kv: KvPlan { dtype: DType::F32, block_size: 16, n_blocks: 8 },
        limits: Limits { max_seq_len: 32, max_seqs: 2, max_batch_tokens: 8, max_sample_rows: 2 },
        predictions: Predictions { ttft_s: 0.0, tpot_s: 0.0, total_s: 0.0, tokens_per_s: 0.0 },
    }
}

fn runner(plan: &Plan) -> (Runner<FakeGpu>, Fault) {
    let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
    let checkpoint = Checkpoint::random(plan.model.clone(), 7);
    let (gpu, go_on) = (FakeGpu::default(), &mut |_| ControlFlow::Continue(()));
    let fault = gpu.fault.clone();
    (start_rank(gpu, comms, &checkpoint, plan, Rank(0), go_on).expect("nothing fails yet"), fault)
}

fn request(id: u64) -> Request {
    let sampling = Sampling { ignore_eos: true, ..Sampling::greedy(NEW_TOKENS) };
    Request { id: RequestId(id), prompt: vec![1, 2, 3], sampling }
}

fn engine(plan: &Plan, followers: Followers) -> (Engine<FakeGpu>, Fault) {
    let (runner, fault) = runner(plan);
    let mut engine = Engine::new(runner, followers, plan, None);
    (0..2).for_each(|id| engine.add(request(id)).expect("a sound request"));
    (engine, fault)
}

/// What an error and those behind it say, each once.
#[track_caller]
fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
    let told: Vec<String> =
        std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect();
    for (i, cause) in told.iter().enumerate().skip(1) {
        assert!(told[..i].iter().all(|before| !before.contains(cause)), "told twice: {told:?}");
    }
    told
}

/// Steps to the end or to the first error; who got which token.
fn run(engine: &mut Engine<FakeGpu>) -> (Vec<(u64, u32)>, Option<EngineError>) {
    let mut tokens = Vec::new();
    while !engine.is_idle() {
        match engine.step() {
            Ok(events) => tokens.extend(events.iter().filter_map(|event| match event {
                Event::Token { id, token, .. } => Some((id.0, token.id)),
                _ => None,
            })),
            Err(error) => return (tokens, Some(error)),
        }
    }
    (tokens, None)
}

/// Every call that can be made of an engine that has failed with `first`.
#[track_caller]
fn check_broken(engine: &mut Engine<FakeGpu>, first: &str) {
    for _ in 0..3 {
        let told = engine.step().expect_err("it has failed").to_string();
        assert!(told.contains(first) && told.contains("build a new one"), "{told}");
    }
    let told = engine.add(request(9)).expect_err("it has failed").to_string();
    assert!(told.contains(first) && told.contains("build a new one"), "{told}");
    let told = engine.usage().expect_err("it has failed").to_string();
    assert!(told.contains(first), "{told}");
    engine.cancel(RequestId(0));
    assert!(matches!(engine.step(), Err(EngineError::Broken { .. })));
}

#[test]
fn after_an_error_there_are_only_errors() {
    let plan = plan();
    let (whole, error) = run(&mut engine(&plan, Followers::None).0);
    assert!(error.is_none() && whole.len() == 2 * NEW_TOKENS, "{whole:?}, {error:?}");
    for call in [Call::Upload, Call::Embed, Call::Sample, Call::Fetch, Call::Finish, Call::Replay] {
        let mut n_failed = 0;
        for after in 0..100 {
            let (mut engine, fault) = engine(&plan, Followers::None);
            fault.arm(call, after);
            let (tokens, error) = run(&mut engine);
            assert!(whole.starts_with(&tokens), "{call:?} after {after}: {tokens:?}");
            let Some(error) = error else { break };
            let told = chain(&error);
            assert!(told.len() == 2 && told[1].contains("was told to fail"), "{told:?}");
            // Later errors have no causes: theirs is a text.
            check_broken(&mut engine, &told.join(": "));
            n_failed += 1;
        }
        assert!((1..100).contains(&n_failed), "{call:?} fails at every step, then none: {n_failed}");
    }
}

#[test]
fn a_follower_that_is_gone_breaks_the_engine() {
    let plan = plan();
    let (sender, receiver) = channel();
    let (mut engine, _) = engine(&plan, Followers::Threads(vec![sender]));
    engine.step().expect("the follower is there");
    drop(receiver);
    let (_, error) = run(&mut engine);
    let error = error.expect("the follower is gone");
    assert!(matches!(error, EngineError::FollowerLost { .. }), "{error}");
    check_broken(&mut engine, &error.to_string());
}

/// Where the first error says that it is.
fn place(call: Call, after: usize) -> String {
    let (mut engine, fault) = engine(&plan(), Followers::None);
    fault.arm(call, after);
    let told = run(&mut engine).1.expect("told to fail").to_string();
    told.strip_suffix(" failed on rank 0").expect("the rank").to_owned()
}

/// The prompts are step 0, launched one by one; all later steps are recorded ones, each asked for before the one before
/// it is done.
#[test]
fn an_error_names_every_step_that_it_may_be_of() {
    assert_eq!(place(Call::Embed, 0), "step 0");
    assert_eq!(place(Call::Replay, 0), "step 0 or step 1 (the graph of 2 rows)");
    assert_eq!(place(Call::Finish, 0), "step 0 or step 1 (the graph of 2 rows)");
    let recorded = "step 2 (the graph of 2 rows) or step 3 (the graph of 2 rows)";
    assert_eq!(place(Call::Finish, 2), recorded);
    assert_eq!(place(Call::Fetch, 3), recorded);
}

#[test]
fn a_step_that_cannot_be_recorded_is_named() {
    let (plan, gpu) = (plan(), FakeGpu::default());
    gpu.fault.arm(Call::Sample, 1);
    let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
    let checkpoint = Checkpoint::random(plan.model.clone(), 7);
    let started = start_rank(gpu, comms, &checkpoint, &plan, Rank(0), &mut |_| ControlFlow::Continue(()));
    let told = chain(&started.err().expect("told to fail"));
    assert_eq!(told[0], "the decode step of 1 rows could not be recorded on rank 0");
    assert!(told.len() == 2 && told[1].starts_with("cu"), "{told:?}");
}

#[test]
fn a_runner_that_has_failed_runs_no_step_either() {
    let plan = plan();
    let (mut runner, fault) = runner(&plan);
    let batch = StepBatch {
        generation: 0,
        step: 7,
        tokens: vec![InputToken::Known(5)],
        positions: vec![0],
        slots: vec![0],
        q_offsets: vec![0, 1],
        context_lens: vec![1],
        seq_slots: vec![0],
        block_tables: vec![0],
        max_blocks: 1,
        samples: Vec::<SampleAt>::new(),
    };
    fault.arm(Call::Embed, 0);
    let first = chain(&runner.submit(&batch).expect_err("told to fail")).join(": ");
    for error in [runner.submit(&batch).err(), runner.collect().err(), runner.logits(&batch).err()] {
        let error = error.expect("it has failed");
        assert!(matches!(&error, RunError::Broken { first: found } if *found == first), "{error}");
    }
}
