//! The decoder against Hugging Face transformers: logits, log-probabilities and greedy tokens of every fixture and of
//! the demo model.

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;

use dist_core::Mesh;
use dist_kernels::cpu::CpuPath;
use dist_models::checkpoint::{Checkpoint, OpenOptions};
use dist_models::engine::{Engine, Followers};
use dist_models::request::{Event, Request, RequestId, Sampling};
use dist_models::step::{InputToken, SampleAt, StepBatch};
use fixtures::{Case, NAMES, fixture, greedy, plan, repo, runner, wide};
use serde::Deserialize;

/// Bound of the issue for float32 models; the largest difference seen is printed by each test.
const F32_BOUND: f32 = 2e-4;
/// Bound for bf16 weights in float32 arithmetic (golden values are rounded to 1e-5).
const BF16_WEIGHTS_BOUND: f32 = 2e-3;

/// One chunk that holds a whole prompt and wants the logits after its last token.
fn whole_prompt(ids: &[u32]) -> StepBatch {
    let n = ids.len() as u32;
    let n_blocks = n.div_ceil(16);
    StepBatch {
        generation: 0,
        step: 0,
        tokens: ids.iter().map(|&id| InputToken::Known(id)).collect(),
        positions: (0..n).collect(),
        slots: (0..n as i32).collect(),
        q_offsets: vec![0, n],
        context_lens: vec![n],
        seq_slots: vec![0],
        block_tables: (0..n_blocks).collect(),
        max_blocks: n_blocks,
        samples: vec![SampleAt { row: n - 1, seq_slot: None, how: fixtures::greedy_row(), n_top: 0 }],
    }
}

fn max_diff(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    // A NaN must count as the largest difference, and `f32::max` would drop it.
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if d <= m { m } else { d })
}

/// Logits of every case, each prompt in one chunk; the largest difference.
#[expect(clippy::print_stdout, reason = "the difference that was seen belongs beside the bound")]
fn check_logits(checkpoint: &Checkpoint, cases: &[(Vec<u32>, Vec<f32>)], bound: f32) {
    let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), 64);
    let mut runner = runner(checkpoint, &plan, 2, CpuPath::Auto);
    for (ids, logits) in cases {
        let found = runner.logits(&whole_prompt(ids)).expect("a step");
        let diff = max_diff(&found, logits);
        println!("{}: {} tokens, logits differ by {diff:.2e}", checkpoint.config().name, ids.len());
        assert!(diff <= bound, "logits differ by {diff} after {} tokens", ids.len());
    }
}

struct Answer {
    prompt_logprobs: Vec<f32>,
    ids: Vec<u32>,
}

/// All prompts at once through the engine.
fn answers(checkpoint: &Checkpoint, prompts: &[Vec<u32>], sampling: &Sampling) -> Vec<Answer> {
    let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), 256);
    let runner = runner(checkpoint, &plan, 2, CpuPath::Auto);
    let mut engine = Engine::new(runner, Followers::None, &plan, None);
    for (i, prompt) in prompts.iter().enumerate() {
        let request = Request { id: RequestId(i as u64), prompt: prompt.clone(), sampling: sampling.clone() };
        engine.add(request).expect("a sound request");
    }
    let mut answers: Vec<Answer> =
        prompts.iter().map(|_| Answer { prompt_logprobs: vec![], ids: vec![] }).collect();
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            match event {
                Event::Prompt { id, logprobs } => {
                    answers[id.0 as usize].prompt_logprobs.extend(logprobs.iter().map(|t| t.logprob));
                }
                Event::Token { id, token, .. } => answers[id.0 as usize].ids.push(token.id),
                Event::Finished { .. } => {}
            }
        }
    }
    answers
}

#[test]
fn fixtures_have_the_reference_logits() {
    for name in NAMES {
        let (checkpoint, cases) = fixture(name);
        let cases: Vec<_> = cases.into_iter().map(|Case { ids, logits, .. }| (ids, logits)).collect();
        assert_eq!(cases.len(), 6, "{name}");
        check_logits(&checkpoint, &cases, F32_BOUND);
    }
}

#[test]
fn fixtures_have_the_reference_logprobs_and_greedy_tokens() {
    for name in NAMES {
        let (checkpoint, cases) = fixture(name);
        let prompts: Vec<_> = cases.iter().map(|case| case.ids.clone()).collect();
        let answers = answers(&checkpoint, &prompts, &greedy(12));
        for (case, answer) in cases.iter().zip(&answers) {
            let diff = max_diff(&answer.prompt_logprobs, &case.logprobs);
            assert!(diff <= F32_BOUND, "{name}: log-probabilities differ by {diff}");
            assert_eq!(answer.ids, case.greedy, "{name}: greedy tokens after {:?}", case.ids);
        }
    }
}

#[derive(Deserialize)]
struct DemoCase {
    ids: Vec<u32>,
    last_logits: Vec<f32>,
    logprobs: Vec<f32>,
    greedy_ids: Vec<u32>,
}

#[test]
fn the_demo_model_has_the_reference_results() {
    let dir = repo().join("crates/dist-cli/assets/demo-model");
    let checkpoint = Checkpoint::open(&dir, &OpenOptions { mmap: false }).expect("the demo model opens");
    let golden = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let cases: Vec<DemoCase> = serde_json::from_str(&golden).expect("golden cases");
    let logits: Vec<_> = cases.iter().map(|case| (case.ids.clone(), case.last_logits.clone())).collect();
    check_logits(&checkpoint, &logits, BF16_WEIGHTS_BOUND);
    let prompts: Vec<_> = cases.iter().map(|case| case.ids.clone()).collect();
    for (case, answer) in cases.iter().zip(answers(&checkpoint, &prompts, &greedy(48))) {
        let diff = max_diff(&answer.prompt_logprobs, &case.logprobs);
        assert!(diff <= BF16_WEIGHTS_BOUND, "log-probabilities differ by {diff}");
        assert_eq!(answer.ids, case.greedy_ids[case.ids.len()..], "greedy tokens");
    }
}
