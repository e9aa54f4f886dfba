//! `dist-cli plan`: what would run, how fast, and why not otherwise. It touches no weight and no device.

use dist_core::planner;

use crate::flags::plan::PlanArgs;
use crate::problem::Problem;
use crate::render;

/// Runs the command.
pub fn run(args: PlanArgs) -> anyhow::Result<()> {
    let request = args.into_request()?;
    let report = planner::plan(&request.model, &request.topology, request.workload, &request.options)?;
    render::result(&if request.json { render::plan_json(&report)? } else { render::plan_text(&report) })?;
    if report.best.is_some() {
        return Ok(());
    }
    let problem = Problem::failed(format!("{} runs on none of these splits", request.model.name));
    Err(problem.help("take more devices or memory, or less at once: --max-seq-len, --max-seqs").into())
}
