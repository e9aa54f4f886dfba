//! What a plan's workload should take, from the cost model's steps.

use super::Request;
use crate::cost::{CostModel, StepShape};
use crate::plan::{Plan, Predictions};
use crate::shape::div_ceil;

/// Whole nanoseconds: what plans are compared by, so that no tie hangs on a float's last bit.
pub(super) fn nanoseconds(seconds: f64) -> u64 {
    (seconds * 1e9).round() as u64
}

/// Seconds until `n_steps` alike have left the last stage, one entering as soon as the first stage is free.
fn pipelined(stage_seconds: &[f64], n_steps: usize) -> f64 {
    let slowest = stage_seconds.iter().copied().fold(0.0, f64::max);
    stage_seconds.iter().sum::<f64>() + (n_steps - 1) as f64 * slowest
}

impl Request<'_> {
    /// Predictions of the slowest copy.
    pub(super) fn price(&self, plan: &Plan) -> Predictions {
        let copies = (0..plan.mesh.dp).map(|dp| self.price_copy(plan, dp));
        copies.max_by(|a, b| a.total_s.total_cmp(&b.total_s)).expect("a mesh has a copy")
    }

    fn price_copy(&self, plan: &Plan, dp: usize) -> Predictions {
        let cost = CostModel::of(plan);
        let seconds = |shape| cost.stage_seconds(self.topology, dp, shape);
        let (w, budget) = (self.workload, plan.limits.max_batch_tokens);
        let n_running = self.n_running(plan.mesh);

        // One prompt alone, in chunks; costs grow evenly with the context, so that all are priced at its mean.
        let chunk = w.prompt_len.min(budget);
        let n_chunks = div_ceil(w.prompt_len, chunk);
        let context = (w.prompt_len - chunk) / 2;
        let one = StepShape { n_seqs: 1, rows: chunk, context, n_logits: 1 };
        let ttft_s = pipelined(&seconds(one), n_chunks);

        // All prompts: several a step where they are short.
        let a_step = (budget / w.prompt_len).clamp(1, n_running);
        let together = StepShape { n_seqs: a_step, n_logits: a_step, ..one };
        let prefill_s = pipelined(&seconds(together), div_ceil(n_running, a_step) * n_chunks);

        // Decode in as many groups as there are stages, so that each stage has one at any time.
        let n_groups = plan.mesh.pp.min(n_running);
        let group = StepShape::decode(div_ceil(n_running, n_groups), w.prompt_len + w.new_tokens / 2);
        let stages = seconds(group);
        let slowest = stages.iter().copied().fold(0.0, f64::max);
        let tpot_s = stages.iter().sum::<f64>().max(n_groups as f64 * slowest);

        let n_waves = div_ceil(div_ceil(w.n_seqs, plan.mesh.dp), n_running);
        let total_s = n_waves as f64 * (prefill_s + (w.new_tokens - 1) as f64 * tpot_s);
        Predictions { ttft_s, tpot_s, total_s, tokens_per_s: (n_running * plan.mesh.dp) as f64 / tpot_s }
    }
}
