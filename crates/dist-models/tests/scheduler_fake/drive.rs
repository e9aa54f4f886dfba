//! The engine's loop over the fake device, with everything that happens to a request written down.

use std::collections::{BTreeMap, VecDeque};

use dist_models::request::{FinishReason, Request, RequestId, TokenLogprob};
use dist_models::scheduler::{Commit, Limits, Scheduler};
use dist_models::step::{StepBatch, StepOutput};

use crate::device::FakeDevice;

pub(crate) const N_VOCAB: usize = 13;
pub(crate) const EOS: u32 = 12;

/// A request and when it comes, leaves, or is stopped by its text.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) request: Request,
    /// Turn of the loop before which it is added.
    pub(crate) arrives: usize,
    /// Turn before which it is taken back.
    pub(crate) cancelled: Option<usize>,
    /// New tokens of the first sample after which its text ends it.
    pub(crate) text_stops: Option<usize>,
}

/// What became of one sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sample {
    pub(crate) tokens: Vec<TokenLogprob>,
    pub(crate) reason: Option<FinishReason>,
    pub(crate) has_stop: bool,
    /// Turn in which it ended.
    pub(crate) ended: usize,
}

/// What became of all.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Story {
    pub(crate) samples: BTreeMap<(RequestId, u32), Sample>,
    pub(crate) prompts: BTreeMap<RequestId, Vec<TokenLogprob>>,
    pub(crate) refused: Vec<RequestId>,
    pub(crate) n_preemptions: u64,
}

/// Runs the plans with `depth` batches in flight until nothing is left, and checks that nothing is.
pub(crate) fn drive(limits: Limits, plans: &[Plan], depth: usize, max_turns: usize) -> Story {
    let mut run = Run {
        scheduler: Scheduler::new(limits, vec![EOS], N_VOCAB),
        device: FakeDevice::new(limits, N_VOCAB),
        in_flight: VecDeque::new(),
        story: Story::default(),
        plans,
        turn: 0,
    };
    let last_arrival = plans.iter().map(|plan| plan.arrives).max().unwrap_or(0);
    while run.turn <= last_arrival || !run.scheduler.is_idle() {
        assert!(run.turn < max_turns, "somebody starves: {:?}", run.scheduler);
        run.turn(depth);
    }
    let stats = run.scheduler.stats();
    assert_eq!(
        (stats.n_running, stats.n_waiting, stats.n_free_blocks),
        (0, 0, limits.n_blocks),
        "nothing leaks"
    );
    run.story.n_preemptions = stats.n_preemptions;
    run.story
}

struct Run<'a> {
    scheduler: Scheduler,
    device: FakeDevice,
    in_flight: VecDeque<(StepBatch, StepOutput)>,
    story: Story,
    plans: &'a [Plan],
    turn: usize,
}

impl Run<'_> {
    fn turn(&mut self, depth: usize) {
        for plan in self.plans.iter().filter(|plan| plan.arrives == self.turn) {
            if self.scheduler.add(plan.request.clone()).is_err() {
                self.story.refused.push(plan.request.id);
            }
        }
        for plan in self.plans.iter().filter(|plan| plan.cancelled == Some(self.turn)) {
            self.scheduler.cancel(plan.request.id);
        }
        while self.in_flight.len() < depth {
            let Some(batch) = self.scheduler.schedule() else { break };
            let output = self.device.run(&batch);
            self.in_flight.push_back((batch, output));
        }
        let commits = match self.in_flight.pop_front() {
            Some((batch, output)) => self.scheduler.commit(&batch, &output),
            None => self.scheduler.take_ended(),
        };
        for commit in commits {
            self.write_down(commit);
        }
        self.turn += 1;
    }

    fn write_down(&mut self, commit: Commit) {
        match commit {
            Commit::Prompt { id, logprobs } => self.story.prompts.entry(id).or_default().extend(logprobs),
            Commit::Token { id, sample_idx, token, is_stop } => self.token(id, sample_idx, token, is_stop),
            Commit::Finished { id, sample_idx, reason } => {
                let sample = self.story.samples.entry((id, sample_idx)).or_default();
                // The text may have stopped the sample at the very token that ended it anyway.
                if sample.reason.is_none() {
                    (sample.reason, sample.ended) = (Some(reason), self.turn);
                }
            }
        }
    }

    fn token(&mut self, id: RequestId, sample_idx: u32, token: TokenLogprob, is_stop: bool) {
        let sample = self.story.samples.entry((id, sample_idx)).or_default();
        assert!(sample.reason.is_none(), "nothing comes after the end");
        sample.tokens.push(token);
        sample.has_stop |= is_stop;
        let plan =
            self.plans.iter().find(|plan| plan.request.id == id).expect("only what was planned comes back");
        if sample_idx == 0 && plan.text_stops == Some(sample.tokens.len()) {
            self.scheduler.finish(id, sample_idx, FinishReason::Stop);
            (sample.reason, sample.ended) = (Some(FinishReason::Stop), self.turn);
        }
    }
}
