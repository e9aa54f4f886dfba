//! A planner's report: what was chosen, and why everything else lost.

use std::fmt::Write as _;

use dist_core::Rank;
use dist_core::plan::{MemoryBreakdown, Plan, Predictions};
use dist_core::planner::PlanReport;
use serde::Serialize;

use crate::machine::gigabytes;

const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct ReportObject<'a> {
    schema_version: u32,
    best: Option<BestObject<'a>>,
    alternatives: Vec<OtherObject>,
    rejected: Vec<RejectedObject>,
}

#[derive(Serialize)]
struct BestObject<'a> {
    hash: String,
    memory: Vec<MemoryBreakdown>,
    plan: &'a Plan,
}

#[derive(Serialize)]
struct OtherObject {
    mesh: dist_core::Mesh,
    stages: Vec<usize>,
    predictions: Predictions,
    memory: MemoryBreakdown,
    reason: String,
}

#[derive(Serialize)]
struct RejectedObject {
    mesh: dist_core::Mesh,
    reason: String,
}

fn memory(plan: &Plan) -> Vec<MemoryBreakdown> {
    (0..plan.mesh.world_size()).map(|rank| plan.memory(Rank(rank))).collect()
}

/// The report as one object.
pub fn plan_json(report: &PlanReport) -> serde_json::Result<String> {
    let best = report.best.as_ref();
    let best = best.map(|plan| BestObject { hash: plan.hash().to_string(), memory: memory(plan), plan });
    let alternatives = report.alternatives.iter().map(|other| OtherObject {
        mesh: other.mesh,
        stages: other.stages.clone(),
        predictions: other.predictions,
        memory: other.memory,
        reason: other.lost.to_string(),
    });
    let rejected = report.rejected.iter();
    let rejected =
        rejected.map(|rejected| RejectedObject { mesh: rejected.mesh, reason: rejected.reason.to_string() });
    let object = ReportObject {
        schema_version: SCHEMA_VERSION,
        best,
        alternatives: alternatives.collect(),
        rejected: rejected.collect(),
    };
    Ok(serde_json::to_string(&object)? + "\n")
}

/// The report for people.
pub fn plan_text(report: &PlanReport) -> String {
    let mut out = String::new();
    if let Some(plan) = &report.best {
        let p = plan.predictions;
        let _ = writeln!(out, "{}: {}, layers a stage {:?}", plan.model.name, plan.mesh, plan.stages);
        let _ = writeln!(
            out,
            "  foretold: TTFT {:.2} ms, TPOT {:.2} ms, {:.1} tok/s (what the devices' rates allow)",
            p.ttft_s * 1e3,
            p.tpot_s * 1e3,
            p.tokens_per_s
        );
        for (rank, memory) in memory(plan).into_iter().enumerate() {
            let _ = writeln!(
                out,
                "  rank {rank}: {} = weights {} + KV cache {} + workspace {}",
                gigabytes(memory.total()),
                gigabytes(memory.weights),
                gigabytes(memory.kv),
                gigabytes(memory.workspace)
            );
        }
        let _ = writeln!(out, "  plan {}", plan.hash());
    }
    for other in &report.alternatives {
        let _ = writeln!(out, "not {}: {}", other.mesh, other.lost);
    }
    for rejected in &report.rejected {
        let _ = writeln!(out, "not {}: {}", rejected.mesh, rejected.reason);
    }
    out
}
