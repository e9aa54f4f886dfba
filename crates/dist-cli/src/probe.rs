//! The model's own proof: what it said about a fixed prompt at export, asked again before anything else.

use dist_core::plan::Plan;
use dist_models::export::probe::{self, ProbeError};
use dist_models::manifest::Golden;

use crate::launch;
use crate::model::Model;
use crate::problem::Problem;
use crate::session::{Device, Session};

/// What the model must say.
pub fn golden(model: &Model) -> anyhow::Result<Golden> {
    model.checkpoint.golden().cloned().ok_or_else(|| {
        let what = format!("--verify: {} has no golden log-probabilities", model.name);
        let help =
            "they are made at export: dist-cli export --model … --out DIR, then infer --model DIR --verify";
        Problem::usage(what).help(help).into()
    })
}

/// Asks it; a model that says something else is not used.
pub fn ask<B: Device>(session: &mut Session<B>, golden: &Golden, plan: &Plan) -> anyhow::Result<()> {
    let room = plan.limits.max_seq_len.min(plan.kv.n_blocks * plan.kv.block_size);
    match probe::verify(&mut session.engine, golden, room) {
        Ok(worst) => {
            tracing::info!(worst, "the probe prompt is as at export");
            Ok(())
        }
        Err(ProbeError::Engine(error)) => Err(launch::explain(error.into(), &mut session.locals)),
        Err(error) => {
            session.locals.give_up();
            let problem = Problem::failed("the model does not say what it said at export");
            let help =
                "the files may be damaged: dist-cli shard --verify --model DIR says which; else report it";
            Err(problem.because(error).help(help).into())
        }
    }
}
