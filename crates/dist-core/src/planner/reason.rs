//! Why a split lost or cannot run, with its numbers, as sentences for people.

use std::fmt;

use super::price::nanoseconds;
use crate::plan::{MemoryBreakdown, Plan, PlanError, Predictions};
use crate::{Mesh, Rank};

/// Why a split cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// It has more ranks than there are devices.
    #[error("{needed} ranks on {there} devices")]
    Devices {
        /// Ranks.
        needed: usize,
        /// Devices.
        there: usize,
    },
    /// It has more stages than there are layers.
    #[error("{pp} stages of {n_layers} layers leave a stage without one")]
    Layers {
        /// Stages.
        pp: usize,
        /// Layers.
        n_layers: usize,
    },
    /// A rank does not fit its device.
    #[error(
        "{rank} needs {} of the {} that it may take of {device}: weights {}, KV cache {}, workspace {}",
        gigabytes(.needed.total()), gigabytes(*.available),
        gigabytes(.needed.weights), gigabytes(.needed.kv), gigabytes(.needed.workspace)
    )]
    Memory {
        /// Which one.
        rank: Rank,
        /// Its device.
        device: String,
        /// What it needs, the cache for the workload included.
        needed: MemoryBreakdown,
        /// What it may take.
        available: u64,
    },
    /// It breaks a rule of plans, e.g. heads that cannot be cut.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Why a split that runs is not the best one.
#[derive(Clone, Debug, PartialEq)]
pub struct Lost {
    /// The best one.
    pub to: Mesh,
    /// What the best one should cost.
    pub theirs: Predictions,
    /// What this one should cost.
    pub ours: Predictions,
    /// Ranks of this one and of the best one.
    pub n_ranks: (usize, usize),
}

impl Lost {
    pub(super) fn between(plan: &Plan, best: &Plan) -> Self {
        Self {
            to: best.mesh,
            theirs: best.predictions,
            ours: plan.predictions,
            n_ranks: (plan.mesh.world_size(), best.mesh.world_size()),
        }
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to, theirs, ours, n_ranks: (n_ours, n_theirs) } = self;
        if nanoseconds(ours.total_s) == nanoseconds(theirs.total_s) {
            let why = if n_ours > n_theirs { "takes fewer ranks" } else { "has the simpler split" };
            return write!(f, "as fast as {to}, which {why} ({n_theirs} against {n_ours} ranks)");
        }
        let slower = milliseconds(ours.total_s - theirs.total_s);
        let (ttft, tpot) = (milliseconds(ours.ttft_s), milliseconds(ours.tpot_s));
        let (best_ttft, best_tpot) = (milliseconds(theirs.ttft_s), milliseconds(theirs.tpot_s));
        write!(
            f,
            "{slower} slower over the workload than {to}: TTFT {ttft} against {best_ttft}, \
             TPOT {tpot} against {best_tpot}"
        )
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.3} ms", seconds * 1e3)
}

/// Bytes in decimal units with three digits.
fn gigabytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes < 1e9 { format!("{:.1} MB", bytes / 1e6) } else { format!("{:.2} GB", bytes / 1e9) }
}
