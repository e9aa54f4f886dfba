//! The golden log-probabilities: computed a layer at a time they are those of Hugging Face, and every mesh says them
//! again from its own files.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/checkpoints.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod checkpoints;
#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use checkpoints::{fixture_dir, open, shard, splits};
use dist_comm::{Comm, Local};
use dist_core::{Coord, DType, Mesh, Rank};
use dist_kernels::cpu::CpuPath;
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, Followers, start_rank};
use dist_models::export::probe::{self, ProbeError, TOLERANCE};
use dist_models::manifest::{Golden, Split};
use dist_models::runner::Comms;
use dist_models::step::StepBatch;
use fixtures::{NAMES, backend, fixture, plan, wide};

/// Bound of the issue for float32 models.
const F32_BOUND: f32 = 2e-4;

#[test]
fn a_layer_at_a_time_is_the_whole_model() {
    for name in NAMES {
        let (checkpoint, cases) = fixture(name);
        for case in cases.iter().filter(|case| case.ids.len() > 1) {
            let found = probe::logprobs(&checkpoint, &case.ids, 1).unwrap();
            assert_eq!(found.len(), case.logprobs.len());
            for (found, expected) in found.iter().zip(&case.logprobs) {
                assert!((found - expected).abs() <= F32_BOUND, "{name}: {found}, expected {expected}");
            }
        }
    }
}

/// Each rank's groups: its stage's tensor-parallel ranks, and the stages that it passes rows to and from.
fn groups(mesh: Mesh) -> Vec<Comms> {
    let deadline = Duration::from_secs(60);
    let rank = |tp, pp| mesh.rank(Coord { tp, pp, dp: 0 });
    let mut across: Vec<_> = (0..mesh.tp)
        .map(|tp| Local::group((0..mesh.pp).map(|pp| rank(tp, pp)).collect(), deadline).into_iter())
        .collect();
    let stages = (0..mesh.pp).map(|pp| Local::group((0..mesh.tp).map(|tp| rank(tp, pp)).collect(), deadline));
    let mut comms = Vec::new();
    for stage in stages {
        for (end, across) in stage.into_iter().zip(&mut across) {
            comms.push(Comms { tp: Comm::Local(end), pp: Comm::Local(across.next().unwrap()) });
        }
    }
    comms
}

/// Asks the ranks of a mesh, each a thread.
fn ask(checkpoint: &Checkpoint, golden: &Golden, mesh: Mesh) -> Result<f32, ProbeError> {
    let plan = plan(checkpoint.config(), mesh, wide(checkpoint.config()), 16);
    let start = |rank: usize, comms: Comms| {
        start_rank(backend(1, CpuPath::Auto), comms, checkpoint, &plan, Rank(rank), &mut |_| {
            ControlFlow::Continue(())
        })
        .unwrap()
    };
    std::thread::scope(|scope| {
        let mut comms = groups(mesh).into_iter();
        let leader = comms.next().unwrap();
        let mut senders = Vec::new();
        for (i, comms) in comms.enumerate() {
            let (sender, batches) = channel::<Arc<StepBatch>>();
            senders.push(sender);
            let start = &start;
            scope.spawn(move || {
                let mut runner = start(i + 1, comms);
                for batch in batches {
                    runner.submit(&batch).unwrap();
                    runner.collect().unwrap();
                }
            });
        }
        let mut engine = Engine::new(start(0, leader), Followers::Threads(senders), &plan, None);
        probe::verify(&mut engine, golden, checkpoint.config().n_ctx)
    })
}

#[test]
fn every_mesh_says_what_was_said_at_export() {
    let root = tempfile::tempdir().unwrap();
    let mut worst = 0.0_f32;
    for name in NAMES {
        let source = open(&fixture_dir(name));
        for split in splits(source.config()) {
            let out = root.path().join(format!("{name}-{}-{}", split.tp, split.pp()));
            let sharded = open(&shard(&source, &split, &out));
            let golden = sharded.golden().unwrap();
            assert_eq!(golden.logprobs.len(), 31);
            worst = worst.max(ask(&sharded, golden, split.mesh()).unwrap());
        }
    }
    println!("log-probabilities differ by {worst:.2e} over all meshes, the tolerance is {TOLERANCE:.0e}");
    assert!(worst < TOLERANCE / 10.0, "{worst}");
}

#[test]
fn a_model_that_changed_is_noticed() {
    for name in NAMES {
        let source = open(&fixture_dir(name));
        let root = tempfile::tempdir().unwrap();
        let dir = shard(&source, &Split::solo(source.config()), root.path());
        let exported = open(&dir);
        let golden = exported.golden().unwrap();
        // The same weights, one number of the configuration another: what a wrong manifest would do.
        let mut case = serde_json::from_slice::<serde_json::Value>(
            &std::fs::read(fixture_dir(name).join("config.json")).unwrap(),
        )
        .unwrap();
        let field = if case.get("layer_norm_epsilon").is_some() {
            "layer_norm_epsilon"
        } else {
            "activation_function"
        };
        case[field] = if field == "layer_norm_epsilon" { 0.5.into() } else { "gelu".into() };
        let weights = std::fs::read(fixture_dir(name).join("model.safetensors")).unwrap();
        let weights = dist_kernels::weight::HostBytes::new(weights);
        let changed = Checkpoint::from_bytes("changed", case.to_string().as_bytes(), weights, None).unwrap();
        let told = ask(&changed, golden, Mesh::SOLO).unwrap_err();
        assert!(matches!(told, ProbeError::Differs { .. }), "{told}");
    }
}

/// Of a prompt that does not fit, the beginning is asked.
#[test]
fn a_short_context_asks_less() {
    let source = open(&fixture_dir("gpt2"));
    let root = tempfile::tempdir().unwrap();
    let exported = open(&shard(&source, &Split::solo(source.config()), root.path()));
    let golden = exported.golden().unwrap();
    let mut limits = wide(exported.config());
    limits.max_seq_len = 9;
    let plan = plan(exported.config(), Mesh::SOLO, limits, 16);
    let mut engine =
        Engine::new(fixtures::runner(&exported, &plan, 1, CpuPath::Auto), Followers::None, &plan, None);
    assert!(probe::verify(&mut engine, golden, 9).unwrap() < TOLERANCE);
    assert!(probe::verify(&mut engine, golden, 1).unwrap() < f32::MIN_POSITIVE, "nothing is asked");
}

#[test]
fn golden_values_are_of_the_type_that_was_asked_for() {
    let source = open(&fixture_dir("gpt2"));
    let root = tempfile::tempdir().unwrap();
    let split = Split::even(source.config(), 2, 1);
    let request = dist_models::export::ExportRequest {
        dtype: Some(DType::BF16),
        ..checkpoints::request(&source, &split, root.path())
    };
    let dir = request.write(&mut checkpoints::keep_on()).unwrap().dir;
    let sharded = open(&dir);
    let golden = sharded.golden().unwrap();
    assert!(ask(&sharded, golden, split.mesh()).unwrap() < TOLERANCE);
    // In f32 the same model says something else.
    assert!(ask(&source, golden, Mesh::SOLO).is_err());
}
