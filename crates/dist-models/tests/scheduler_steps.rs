//! What is decided in which step, as data; and what is refused, with the words of the refusal.

#[path = "scheduler_fake/device.rs"]
mod device;

use std::collections::VecDeque;

use device::FakeDevice;
use dist_models::request::{FinishReason, Request, RequestId, Sampling};
use dist_models::scheduler::{Commit, Limits, Scheduler};
use dist_models::step::{InputToken, StepBatch, StepOutput};

const N_VOCAB: usize = 100;

const LIMITS: Limits = Limits {
    max_seqs: 4,
    max_batch_tokens: 8,
    max_seq_len: 64,
    max_sample_rows: 8,
    n_blocks: 16,
    block_size: 4,
};

fn sampling() -> Sampling {
    Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        seed: 0,
        n: 1,
        max_new_tokens: 9,
        min_new_tokens: 0,
        stop: Vec::new(),
        stop_ids: Vec::new(),
        ignore_eos: false,
        logprobs: None,
        prompt_logprobs: false,
    }
}

/// A scheduler, a device, and the batches between them.
struct Stage {
    scheduler: Scheduler,
    device: FakeDevice,
    in_flight: VecDeque<(StepBatch, StepOutput)>,
    seen: Vec<String>,
}

impl Stage {
    fn new(limits: Limits) -> Self {
        let scheduler = Scheduler::new(limits, Vec::new(), N_VOCAB);
        Self {
            scheduler,
            device: FakeDevice::new(limits, N_VOCAB),
            in_flight: VecDeque::new(),
            seen: Vec::new(),
        }
    }

    /// One line of a script: `add a prompt=10 new=3 n=2 score penalty`, `cancel a`, `schedule`, `commit`, `step`.
    fn play(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["add", name, ref rest @ ..] => {
                self.scheduler.add(request(name, rest)).expect("scripts are served");
            }
            ["cancel", name] => assert!(self.scheduler.cancel(id(name))),
            ["schedule"] => self.schedule(),
            ["commit"] => self.commit(),
            ["step"] => {
                self.schedule();
                self.commit();
            }
            _ => panic!("not a line of a script: {line}"),
        }
    }

    fn schedule(&mut self) {
        let Some(batch) = self.scheduler.schedule() else { return self.seen.push("nothing".into()) };
        let output = self.device.run(&batch);
        let rows: Vec<String> = (0..batch.n_seqs()).map(|seq| self.show(&batch, seq)).collect();
        self.seen.push(rows.join(", "));
        self.in_flight.push_back((batch, output));
    }

    fn commit(&mut self) {
        let commits = match self.in_flight.pop_front() {
            Some((batch, output)) => self.scheduler.commit(&batch, &output),
            None => self.scheduler.take_ended(),
        };
        for commit in commits {
            if let Commit::Finished { id, sample_idx, reason } = commit {
                self.seen.push(format!("{reason:?} {}{}", name(id.0), "'".repeat(sample_idx as usize)));
            }
        }
    }

    /// `a[0..8]` or `a@8` for one row; `'` marks the second sample, `?` a token that only the device knows, `+3` scores.
    fn show(&self, batch: &StepBatch, seq: usize) -> String {
        let rows = batch.q_offsets[seq]..batch.q_offsets[seq + 1];
        let first = batch.positions[rows.start as usize];
        let of_seq: Vec<_> = batch.samples.iter().filter(|sample| rows.contains(&sample.row)).collect();
        let n_scores = of_seq.iter().filter(|sample| sample.how.target.is_some()).count();
        let mark = "'".repeat(of_seq.first().map_or(0, |sample| sample.how.sample_idx as usize));
        let range = match rows.len() {
            1 => format!("@{first}"),
            n => format!("[{first}..{}]", first as usize + n),
        };
        let unseen = if matches!(batch.tokens[rows.start as usize], InputToken::Last(_)) { "?" } else { "" };
        let scores = if n_scores > 0 { format!("+{n_scores}") } else { String::new() };
        // The first token of a prompt is its request's number.
        let name = name(u64::from(self.device.tokens(batch, seq)[0]));
        format!("{name}{mark}{range}{unseen}{scores}")
    }
}

fn id(name: &str) -> RequestId {
    RequestId(u64::from(name.as_bytes()[0] - b'a'))
}

fn name(id: u64) -> char {
    char::from(b'a' + id as u8)
}

fn request(name: &str, words: &[&str]) -> Request {
    let id = id(name);
    let mut request = Request { id, prompt: Vec::new(), sampling: sampling() };
    for word in words {
        let (key, n) = word.split_once('=').unwrap_or((word, "0"));
        let n: usize = n.parse().expect("a number follows =");
        match key {
            "prompt" => request.prompt = vec![id.0 as u32; n],
            "new" => request.sampling.max_new_tokens = n,
            "n" => request.sampling.n = n as u32,
            "score" => request.sampling.prompt_logprobs = true,
            "penalty" => request.sampling.presence_penalty = 0.5,
            _ => panic!("not a word of a request: {word}"),
        }
    }
    request
}

#[track_caller]
fn check_schedule(limits: Limits, script: &str, expected: &str) {
    let mut stage = Stage::new(limits);
    for line in script.split(';') {
        stage.play(line);
    }
    assert_eq!(stage.seen.join("; "), expected);
}

#[test]
fn a_long_prompt_is_prefilled_in_chunks() {
    check_schedule(
        LIMITS,
        "add a prompt=10 new=2; step; step; step; step",
        "a[0..8]; a[8..10]; a@10; Length a; nothing",
    );
}

#[test]
fn decode_rows_come_first_and_prompts_fill_the_rest() {
    check_schedule(
        LIMITS,
        "add a prompt=3; step; add b prompt=9; add c prompt=2; step; step; step",
        "a[0..3]; a@3, b[0..7]; a@4, b[7..9], c[0..2]; a@5, b@9, c@2",
    );
}

#[test]
fn no_more_run_than_have_seats() {
    let limits = Limits { max_seqs: 1, ..LIMITS };
    check_schedule(
        limits,
        "add a prompt=1 new=2; add b prompt=1; step; step; step",
        "a@0; a@1; Length a; b@0",
    );
    let limits = Limits { max_sample_rows: 1, ..LIMITS };
    check_schedule(limits, "add a prompt=1 new=1; add b prompt=1; step; step", "a@0; Length a; b@0");
}

#[test]
fn nobody_overtakes_who_waits_for_blocks() {
    let limits = Limits { n_blocks: 4, ..LIMITS };
    check_schedule(
        limits,
        "add a prompt=7 new=2; add b prompt=11 new=1; add c prompt=1 new=1; step; step; step; step",
        "a[0..7]; a@7; Length a; b[0..8]; b[8..11], c@0; Length b; Length c",
    );
}

#[test]
fn the_last_to_arrive_gives_up_its_blocks() {
    let limits = Limits { n_blocks: 3, max_batch_tokens: 16, ..LIMITS };
    check_schedule(
        limits,
        "add a prompt=4 new=4; add b prompt=3 new=4; step; step; step; step; step; step",
        // At position 4 both need a second block: b has none left, pauses, and is computed again only if a needs more.
        "a[0..4], b[0..3]; a@4, b@3; a@5; a@6; Length a; b@4; b@5; Length b",
    );
    check_schedule(
        limits,
        "add a prompt=7 new=4; add b prompt=4 new=3; step; step; step; step; step; step",
        "a[0..7], b[0..4]; a@7; a@8; a@9; Length a; b[0..5]; b@5; Length b",
    );
}

#[test]
fn samples_share_the_blocks_before_the_last_prompt_token() {
    check_schedule(
        LIMITS,
        "add a prompt=9 new=2 n=3; step; step; step; step",
        "a[0..8]; a@8, a'@8, a''@8; a@9, a'@9, a''@9; Length a; Length a'; Length a''; nothing",
    );
    // Of eight tokens only the first four lie in a block without the last one.
    check_schedule(LIMITS, "add a prompt=8 n=2; step; step", "a[0..8]; a@8, a'[4..8]");
}

#[test]
fn scored_rows_keep_their_budget() {
    let limits = Limits { max_sample_rows: 3, ..LIMITS };
    check_schedule(limits, "add a prompt=5 new=1 score; step; step", "a[0..3]+3; a[3..5]+1; Length a");
    check_schedule(
        limits,
        "add a prompt=5 new=0 score; step; step; step",
        "a[0..3]+3; a@3+1; Length a; nothing",
    );
}

#[test]
fn one_sample_scores_for_all() {
    check_schedule(
        LIMITS,
        "add a prompt=4 new=1 n=2 score; step",
        "a[0..4]+3, a'[0..4]; Length a; Length a'",
    );
    check_schedule(LIMITS, "add a prompt=3 new=0 n=2 score; step", "a[0..2]+2; Length a'; Length a");
}

#[test]
fn with_batches_in_flight_the_device_knows_first() {
    check_schedule(
        LIMITS,
        "add a prompt=2 new=3; schedule; schedule; commit; schedule; schedule; commit; commit; schedule",
        "a[0..2]; a@2?; a@3?; nothing; Length a; nothing",
    );
    check_schedule(
        LIMITS,
        "add a prompt=2 penalty; schedule; schedule; commit; schedule",
        "a[0..2]; nothing; a@2",
    );
}

#[test]
fn who_is_taken_back_ends_without_a_step() {
    check_schedule(LIMITS, "add a prompt=2 n=2; cancel a; step", "nothing; Cancelled a; Cancelled a'");
    check_schedule(
        LIMITS,
        "add a prompt=2; schedule; schedule; cancel a; add b prompt=3; schedule; commit; commit; commit; step",
        "a[0..2]; a@2?; b[0..3]; Cancelled a; b@3",
    );
}

#[test]
fn a_stop_token_is_reported_and_banned_before_the_minimum() {
    let mut scheduler = Scheduler::new(LIMITS, vec![7], N_VOCAB);
    let sampling = Sampling { min_new_tokens: 1, stop_ids: vec![5], logprobs: Some(2), ..sampling() };
    scheduler.add(Request { id: RequestId(0), prompt: vec![1], sampling }).unwrap();
    let mut device = FakeDevice::new(LIMITS, N_VOCAB);
    let first = scheduler.schedule().unwrap();
    assert_eq!(first.samples[0].how.banned, [5, 7]);
    assert_eq!((first.samples[0].n_top, first.samples[0].how.position), (2, 1));
    scheduler.commit(&first, &device.run(&first));
    let second = scheduler.schedule().unwrap();
    assert!(second.samples[0].how.banned.is_empty());
    let mut output = device.run(&second);
    output.sampled[0].id = 7;
    let commits = scheduler.commit(&second, &output);
    assert!(matches!(commits[0], Commit::Token { is_stop: true, .. }), "{commits:?}");
    assert!(matches!(commits[1], Commit::Finished { reason: FinishReason::Stop, .. }), "{commits:?}");
    assert!(scheduler.is_idle());
}

#[test]
fn penalties_count_prompt_and_output() {
    let mut scheduler = Scheduler::new(LIMITS, Vec::new(), N_VOCAB);
    let sampling = Sampling { frequency_penalty: 0.5, ..sampling() };
    scheduler.add(Request { id: RequestId(0), prompt: vec![9, 3, 9], sampling }).unwrap();
    let mut device = FakeDevice::new(LIMITS, N_VOCAB);
    for expected in [vec![(3, 1, 0), (9, 2, 0)], vec![(3, 1, 1), (9, 2, 0)]] {
        let batch = scheduler.schedule().unwrap();
        let counts = &batch.samples[0].how.counts;
        let counts: Vec<_> = counts.iter().map(|count| (count.id, count.n_prompt, count.n_output)).collect();
        assert_eq!(counts, expected);
        let mut output = device.run(&batch);
        output.sampled[0].id = 3;
        scheduler.commit(&batch, &output);
    }
}

#[track_caller]
fn check_refusal(change: impl FnOnce(&mut Request), words: &str) {
    let limits = Limits { n_blocks: 4, ..LIMITS };
    let mut scheduler = Scheduler::new(limits, Vec::new(), N_VOCAB);
    let mut request = Request { id: RequestId(0), prompt: vec![1, 2], sampling: sampling() };
    change(&mut request);
    let refusal = scheduler.add(request).expect_err("it cannot be served");
    assert_eq!(refusal.to_string(), words);
    assert!(scheduler.is_idle(), "a refused request leaves no trace");
}

#[test]
fn what_cannot_be_served_is_refused_in_words() {
    check_refusal(|r| r.prompt.clear(), "the prompt is empty");
    check_refusal(
        |r| r.prompt = vec![1; 64],
        "the prompt is too long: 64 tokens (longest that leaves room: 63, context: 64)",
    );
    check_refusal(
        |r| r.sampling.max_new_tokens = 0,
        "max_new_tokens is 0 and no prompt log-probabilities are asked for: nothing to do",
    );
    check_refusal(
        |r| r.sampling.max_new_tokens = usize::MAX,
        "the KV cache is too small for prompt and new tokens: 4 blocks of 4 tokens (needed: 16)",
    );
    check_refusal(|r| r.sampling.n = 0, "n must be from 1 to 4 (the sequences that run at once): 0");
    check_refusal(|r| r.sampling.n = 5, "n must be from 1 to 4 (the sequences that run at once): 5");
    check_refusal(|r| r.sampling.logprobs = Some(65), "logprobs must be at most 64: 65");
    check_refusal(|r| r.prompt[1] = 100, "prompt has a token outside the vocabulary of 100: 100");
    check_refusal(
        |r| r.sampling.stop_ids = vec![300],
        "stop_ids has a token outside the vocabulary of 100: 300",
    );
    check_refusal(|r| r.sampling.stop = vec![String::new()], "a stop string is empty");
}

#[test]
fn numbers_without_meaning_are_refused() {
    let temperature = "temperature must be a finite number of at least 0";
    check_refusal(|r| r.sampling.temperature = -0.5, &format!("{temperature}: -0.5"));
    check_refusal(|r| r.sampling.temperature = f32::NAN, &format!("{temperature}: NaN"));
    check_refusal(|r| r.sampling.top_p = 0.0, "top_p must be above 0 and at most 1: 0");
    check_refusal(|r| r.sampling.top_p = f32::NAN, "top_p must be above 0 and at most 1: NaN");
    check_refusal(|r| r.sampling.min_p = 1.5, "min_p must be from 0 to 1: 1.5");
    check_refusal(
        |r| r.sampling.repetition_penalty = 0.0,
        "repetition_penalty must be a finite number above 0: 0",
    );
    check_refusal(
        |r| r.sampling.presence_penalty = f32::NAN,
        "presence_penalty must be a finite number: NaN",
    );
    check_refusal(
        |r| r.sampling.frequency_penalty = f32::NAN,
        "frequency_penalty must be a finite number: NaN",
    );
    check_refusal(|r| r.sampling.logit_bias = vec![(1, f32::NAN)], "logit_bias must be a number: NaN");
    check_refusal(
        |r| r.sampling.logit_bias = vec![(100, 1.0)],
        "logit_bias has a token outside the vocabulary of 100: 100",
    );
}

#[test]
fn a_name_is_free_again_when_its_end_was_told() {
    let mut scheduler = Scheduler::new(LIMITS, Vec::new(), N_VOCAB);
    let request = Request { id: RequestId(3), prompt: vec![1], sampling: sampling() };
    scheduler.add(request.clone()).unwrap();
    let refusal = scheduler.add(request.clone()).unwrap_err();
    assert_eq!(refusal.to_string(), "a request with this id has not ended yet: 3");
    scheduler.cancel(RequestId(3));
    assert!(scheduler.add(request.clone()).is_err(), "its end has not been handed out");
    scheduler.take_ended();
    scheduler.add(request).unwrap();
}
