//! The same answer everywhere: bits of log-probabilities and sampled tokens do not depend on the batch, on chunks, on
//! threads, on the instructions used, nor on preemption. Ranks are `ranks_threads.rs`.

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;
#[path = "support/trails.rs"]
mod trails;

use dist_core::Mesh;
use dist_core::plan::Limits;
use dist_kernels::cpu::CpuPath;
use dist_models::checkpoint::Checkpoint;
use dist_models::engine::{Engine, Followers};
use dist_models::request::Request;
use fixtures::{fixture, plan, runner, wide};
use trails::{Trail, drain, requests};

/// How the requests are run.
#[derive(Clone, Copy)]
struct Setting {
    limits: Limits,
    n_blocks: usize,
    threads: usize,
    path: CpuPath,
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
