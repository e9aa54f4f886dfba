//! Random streams of requests under random limits: whatever else runs, however little memory there is, and however
//! many batches are in flight, every request gets what it would get alone.

#[path = "scheduler_fake/device.rs"]
mod device;
#[path = "scheduler_fake/drive.rs"]
mod drive;

use dist_models::request::{FinishReason, Request, RequestId, Sampling};
use dist_models::scheduler::Limits;
use drive::{N_VOCAB, Plan, Sample, Story, drive};
use proptest::prelude::*;
use proptest::strategy::ValueTree;

fn limits() -> impl Strategy<Value = Limits> {
    (1..6usize, 1..24usize, 8..48usize, 1..8usize, 1..24usize, prop_oneof![1..5usize, Just(16)]).prop_map(
        |(max_seqs, max_batch_tokens, max_seq_len, max_sample_rows, n_blocks, block_size)| Limits {
            max_seqs,
            max_batch_tokens,
            max_seq_len,
            max_sample_rows,
            n_blocks,
            block_size,
        },
    )
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let lengths = (0..14usize, 0..6usize, 1..4u32);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.3));
    let values = (any::<u64>(), prop::collection::vec(0..N_VOCAB as u32, 0..2), prop::option::of(0..3u32));
    (lengths, flags, values).prop_map(|(lengths, flags, (seed, stop_ids, logprobs))| {
        let (max_new_tokens, min_new_tokens, n) = lengths;
        let (ignore_eos, prompt_logprobs, has_bias, is_penalised) = flags;
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: if is_penalised { 1.1 } else { 1.0 },
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: if has_bias { vec![(1, 0.5)] } else { Vec::new() },
            seed,
            n,
            max_new_tokens,
            min_new_tokens,
            stop: Vec::new(),
            stop_ids,
            ignore_eos,
            logprobs,
            prompt_logprobs,
        }
    })
}

fn plans() -> impl Strategy<Value = Vec<Plan>> {
    let prompt = prop::collection::vec(0..N_VOCAB as u32, 1..24);
    let leaves = (prop::option::weighted(0.2, 0..30usize), prop::option::weighted(0.2, 1..8usize));
    let plan =
        (prompt, sampling(), 0..12usize, leaves).prop_map(|(prompt, sampling, arrives, leaves)| Plan {
            request: Request { id: RequestId(0), prompt, sampling },
            arrives,
            cancelled: leaves.0.map(|after| arrives + after),
            text_stops: leaves.1,
        });
    prop::collection::vec(plan, 1..9).prop_map(|mut plans| {
        plans.sort_by_key(|plan| plan.arrives);
        for (i, plan) in plans.iter_mut().enumerate() {
            plan.request.id = RequestId(i as u64);
        }
        plans
    })
}

/// Turns that suffice even if samples run one after the other, one row a turn, each token seen before the next is drawn:
/// a batch is committed as many turns after its schedule as batches are in flight.
fn turns_alone(plan: &Plan, depth: usize) -> usize {
    let sampling = &plan.request.sampling;
    (plan.request.prompt.len() + sampling.max_new_tokens + 1) * sampling.n as usize * depth
}

fn max_turns(plans: &[Plan], depth: usize) -> usize {
    let last_arrival = plans.iter().map(|plan| plan.arrives).max().unwrap_or(0);
    last_arrival + plans.iter().map(|plan| turns_alone(plan, depth)).sum::<usize>() + 2
}

/// The story of one request with the device for itself.
fn alone(limits: Limits, plan: &Plan) -> Story {
    let ample =
        Limits { n_blocks: 1000, max_seqs: 8, max_batch_tokens: 1000, max_sample_rows: 1000, ..limits };
    let plan = Plan { arrives: 0, cancelled: None, text_stops: None, ..plan.clone() };
    drive(ample, std::slice::from_ref(&plan), 1, max_turns(std::slice::from_ref(&plan), 1))
}

/// What became of the sample is what became of it alone, up to where it was taken back or stopped.
fn assert_same(plan: &Plan, sample_idx: u32, sample: &Sample, alone: &Sample) {
    let n = sample.tokens.len();
    assert_eq!(&sample.tokens[..], &alone.tokens[..n.min(alone.tokens.len())], "tokens are those alone");
    let stops_here = sample_idx == 0 && plan.text_stops == Some(n);
    match sample.reason.expect("every sample ends") {
        FinishReason::Cancelled => assert!(plan.cancelled.is_some()),
        FinishReason::Stop if stops_here => {}
        reason => {
            assert_eq!(
                (Some(reason), n, sample.has_stop),
                (alone.reason, alone.tokens.len(), alone.has_stop)
            );
        }
    }
}

fn assert_as_alone(limits: Limits, plans: &[Plan], story: &Story) {
    for plan in plans.iter().filter(|plan| !story.refused.contains(&plan.request.id)) {
        let (id, alone) = (plan.request.id, alone(limits, plan));
        for sample_idx in 0..plan.request.sampling.n {
            let key = (id, sample_idx);
            assert_same(plan, sample_idx, &story.samples[&key], &alone.samples[&key]);
        }
        let (scores, scores_alone) = (story.prompts.get(&id), alone.prompts.get(&id));
        match scores {
            Some(scores) if plan.cancelled.is_some() => {
                assert!(scores_alone.is_some_and(|alone| alone.starts_with(scores)));
            }
            None if plan.cancelled.is_some() => {}
            _ => assert_eq!(scores, scores_alone, "prompt scores are those alone"),
        }
        let n_scores = scores_alone.map_or(0, Vec::len);
        let is_scored = plan.request.sampling.prompt_logprobs;
        assert_eq!(n_scores, if is_scored { plan.request.prompt.len() - 1 } else { 0 }, "each once");
    }
}

/// First come, first served: a sample has ended when all before it and itself could have run one by one.
fn assert_nobody_starves(plans: &[Plan], story: &Story, depth: usize) {
    let (mut arrived, mut n_turns) = (0, 0);
    for plan in plans {
        arrived = arrived.max(plan.arrives);
        n_turns += turns_alone(plan, depth);
        for (key, sample) in story.samples.range((plan.request.id, 0)..=(plan.request.id, u32::MAX)) {
            assert!(sample.ended <= arrived + n_turns + 2, "{key:?} ended in turn {}", sample.ended);
        }
    }
}

fn tokens(story: &Story) -> Vec<(RequestId, u32, Vec<u32>)> {
    let ids = |sample: &Sample| sample.tokens.iter().map(|token| token.id).collect();
    story.samples.iter().map(|(&(id, sample_idx), sample)| (id, sample_idx, ids(sample))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn every_request_gets_what_it_gets_alone(limits in limits(), plans in plans(), depth in 1..4usize) {
        let story = drive(limits, &plans, depth, max_turns(&plans, depth));
        assert_as_alone(limits, &plans, &story);
        assert_nobody_starves(&plans, &story, depth);
    }

    #[test]
    fn batches_in_flight_change_nothing(limits in limits(), mut plans in plans()) {
        // Who is taken back has more or less by then, as the depth has it.
        for plan in &mut plans {
            plan.cancelled = None;
        }
        let one = drive(limits, &plans, 1, max_turns(&plans, 1));
        let two = drive(limits, &plans, 2, max_turns(&plans, 2));
        prop_assert_eq!(tokens(&one), tokens(&two));
        prop_assert_eq!(&one.prompts, &two.prompts);
        prop_assert_eq!(&one.refused, &two.refused);
    }

    #[test]
    fn the_same_calls_give_the_same_story(limits in limits(), plans in plans()) {
        let max_turns = max_turns(&plans, 2);
        prop_assert_eq!(drive(limits, &plans, 2, max_turns), drive(limits, &plans, 2, max_turns));
    }
}

/// The streams above are worth something only if they reach the paths that they are about.
#[test]
fn streams_preempt_share_and_stop() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut n_preempted, mut n_refused, mut n_stopped, mut n_cancelled) = (0, 0, 0, 0);
    for _ in 0..300 {
        let limits = limits().new_tree(&mut runner).unwrap().current();
        let plans = plans().new_tree(&mut runner).unwrap().current();
        let story = drive(limits, &plans, 2, max_turns(&plans, 2));
        n_preempted += usize::from(story.n_preemptions > 0);
        n_refused += story.refused.len();
        n_stopped += story.samples.values().filter(|sample| sample.has_stop).count();
        let is_cancelled = |sample: &&Sample| sample.reason == Some(FinishReason::Cancelled);
        n_cancelled += story.samples.values().filter(is_cancelled).count();
    }
    assert!(
        n_preempted >= 20 && n_stopped >= 50 && n_cancelled >= 20,
        "{n_preempted} {n_stopped} {n_cancelled}"
    );
    assert!(n_refused >= 50, "{n_refused}");
}
