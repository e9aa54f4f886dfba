//! What a machine has and what is wrong with it: facts are gathered in one place each, findings are a function of facts.

mod facts;
mod findings;
mod gpu;
mod network;

pub use facts::{Machine, Rates, Version};
pub use findings::{Finding, Severity, findings};
pub use gpu::{Device, Gpu};
pub use network::Network;

use dist_comm::probe::PairReport;
use serde::{Deserialize, Serialize};

/// One rank and the machine that it is on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankFacts {
    /// Which rank.
    pub rank: usize,
    /// Its process.
    pub pid: u32,
    /// Ranks on its machine.
    pub local_size: usize,
    /// Its machine.
    pub machine: Machine,
}

/// All that was seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// In order of ranks; one without other ranks.
    pub ranks: Vec<RankFacts>,
    /// What lies between each two ranks.
    pub pairs: Vec<PairReport>,
    /// What is worth saying.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Of what was gathered.
    pub fn new(ranks: Vec<RankFacts>, pairs: Vec<PairReport>) -> Self {
        let findings = findings(&ranks, &pairs);
        Self { ranks, pairs, findings }
    }

    /// Whether a run can be expected to work.
    pub fn is_fit(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity != Severity::Error)
    }
}
