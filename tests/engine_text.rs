//! The engine with the demo model: text as it streams, stop strings, samples of one prompt, limits on length.

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;

use std::sync::Arc;

use dist_core::Mesh;
use dist_kernels::cpu::{CpuBackend, CpuPath};
use dist_models::checkpoint::{Checkpoint, OpenOptions};
use dist_models::engine::{Engine, Followers};
use dist_models::request::{Event, FinishReason, Request, RequestId, Sampling};
use dist_models::scheduler::RequestError;
use dist_models::tokenizer::Tokenizer;
use fixtures::{plan, repo, runner, wide};

/// One sample as a user sees it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Sample {
    ids: Vec<u32>,
    text: String,
    reason: Option<FinishReason>,
}

struct Demo {
    engine: Engine<CpuBackend>,
    tokenizer: Arc<Tokenizer>,
}

fn demo(n_blocks: usize) -> Demo {
    let dir = repo().join("crates/dist-cli/assets/demo-model");
    let checkpoint = Checkpoint::open(&dir, &OpenOptions { mmap: true }).expect("the demo model opens");
    let tokenizer = Arc::new(checkpoint.tokenizer().expect("a sound tokenizer").expect("a tokenizer"));
    let plan = plan(checkpoint.config(), Mesh::SOLO, wide(checkpoint.config()), n_blocks);
    let runner = runner(&checkpoint, &plan, 2, CpuPath::Auto);
    let engine = Engine::new(runner, Followers::None, &plan, Some(Arc::clone(&tokenizer)));
    Demo { engine, tokenizer }
}

impl Demo {
    fn run(&mut self, prompt: &str, sampling: &Sampling) -> Vec<Sample> {
        let prompt = self.tokenizer.encode(prompt).expect("text");
        self.run_ids(prompt, sampling)
    }

    fn run_ids(&mut self, prompt: Vec<u32>, sampling: &Sampling) -> Vec<Sample> {
        let mut samples = vec![Sample::default(); sampling.n as usize];
        let request = Request { id: RequestId(9), prompt, sampling: sampling.clone() };
        self.engine.add(request).expect("a sound request");
        while !self.engine.is_idle() {
            for event in self.engine.step().expect("a step") {
                match event {
                    Event::Token { sample_idx, token, text, .. } => {
                        let sample = &mut samples[sample_idx as usize];
                        assert_eq!(sample.reason, None, "nothing comes after the end");
                        sample.ids.push(token.id);
                        sample.text += &text;
                    }
                    Event::Finished { sample_idx, text, reason, .. } => {
                        let sample = &mut samples[sample_idx as usize];
                        assert_eq!(sample.reason.replace(reason), None, "a sample ends once");
                        sample.text += &text;
                    }
                    Event::Prompt { .. } => panic!("nobody asked for the prompt's log-probabilities"),
                }
            }
        }
        let stats = self.engine.stats();
        assert_eq!((stats.n_running, stats.n_waiting), (0, 0));
        samples
    }
}

const PROMPT: &str = "HAMLET.\nTo be, or not to be";

fn greedy(max_new_tokens: usize) -> Sampling {
    Sampling { ignore_eos: true, ..Sampling::greedy(max_new_tokens) }
}

#[test]
fn streamed_text_is_the_text_of_all_tokens() {
    let mut demo = demo(64);
    let sample = demo.run(PROMPT, &greedy(64)).remove(0);
    assert_eq!(sample.ids.len(), 64);
    assert_eq!(sample.text, demo.tokenizer.decode(&sample.ids));
    assert_eq!(sample.reason, Some(FinishReason::Length));
}

#[test]
fn a_stop_string_ends_the_text_just_before_it() {
    let mut demo = demo(64);
    let whole = demo.run(PROMPT, &greedy(64)).remove(0).text;
    // Strings from inside the text, across the borders of its tokens.
    for start in [5, 17, 40, 71] {
        let stop: String = whole.chars().skip(start).take(6).collect();
        let stopped =
            demo.run(PROMPT, &Sampling { stop: vec!["never said".into(), stop.clone()], ..greedy(64) });
        let expected = &whole[..whole.find(&stop).expect("cut from it")];
        assert_eq!(
            (stopped[0].text.as_str(), stopped[0].reason),
            (expected, Some(FinishReason::Stop)),
            "{stop:?}"
        );
        assert!(stopped[0].ids.len() < 64, "it stops early");
    }
}

#[test]
fn a_stop_token_counts_but_has_no_text() {
    let mut demo = demo(64);
    let whole = demo.run(PROMPT, &greedy(32)).remove(0);
    let stop = whole.ids[10];
    let first = whole.ids.iter().position(|&id| id == stop).expect("it is there");
    let stopped = demo.run(PROMPT, &Sampling { stop_ids: vec![stop], ..greedy(32) }).remove(0);
    assert_eq!(stopped.ids, whole.ids[..=first]);
    assert_eq!(stopped.text, demo.tokenizer.decode(&whole.ids[..first]));
    assert_eq!(stopped.reason, Some(FinishReason::Stop));
    let later = Sampling { stop_ids: vec![stop], min_new_tokens: first + 4, ..greedy(32) };
    assert!(
        demo.run(PROMPT, &later)[0].ids.len() > first + 1,
        "stop tokens are not drawn before the minimum"
    );
}

#[test]
fn samples_of_one_prompt_differ_and_do_not_depend_on_each_other() {
    let drawn = Sampling { temperature: 1.0, seed: 42, n: 4, ..greedy(24) };
    let samples = demo(64).run(PROMPT, &drawn);
    let distinct: std::collections::BTreeSet<_> = samples.iter().map(|sample| sample.ids.clone()).collect();
    assert_eq!(distinct.len(), 4, "four draws of 24 tokens at temperature 1");
    let alone = demo(64).run(PROMPT, &Sampling { n: 1, ..drawn.clone() });
    assert_eq!(alone[0], samples[0], "the first sample is that of n = 1");
    assert_eq!(demo(9).run(PROMPT, &drawn), samples, "with hardly any cache");
}

#[test]
fn the_context_ends_a_sample_and_too_long_a_prompt_is_refused() {
    let mut demo = demo(64);
    let long: Vec<u32> = (0..500).map(|i| 300 + i % 50).collect();
    let sample = demo.run_ids(long.clone(), &greedy(100)).remove(0);
    assert_eq!((sample.ids.len(), sample.reason), (12, Some(FinishReason::Length)));
    let prompt: Vec<u32> = long.iter().chain(&long).copied().take(512).collect();
    let refused = demo.engine.add(Request { id: RequestId(1), prompt, sampling: greedy(1) });
    let expected = RequestError::PromptTooLong { prompt_len: 512, longest: 511, max_seq_len: 512 };
    assert_eq!(refused, Err(expected));
}

#[test]
fn a_cancelled_request_ends_with_what_it_had() {
    let mut demo = demo(64);
    let prompt = demo.tokenizer.encode(PROMPT).expect("text");
    demo.engine.add(Request { id: RequestId(3), prompt, sampling: greedy(64) }).expect("a sound request");
    for _ in 0..5 {
        demo.engine.step().expect("a step");
    }
    assert!(demo.engine.cancel(RequestId(3)) && !demo.engine.cancel(RequestId(3)));
    let events = demo.engine.step().expect("a step");
    let cancelled = |event: &Event| matches!(event, Event::Finished { reason: FinishReason::Cancelled, .. });
    assert!(events.len() == 1 && events.iter().all(cancelled), "{events:?}");
    assert!(demo.engine.is_idle());
}
