//! Who is here, who was refused and why: the judgement of a rendezvous, without connections or time.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use dist_core::Rank;
use serde::{Deserialize, Serialize};

use super::{ConnId, Member, Presentation};
use crate::error::Departure;

/// Why a rank that knows the secret is not taken. It is sent to that rank, and rank 0 reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The ranks do not agree how many they are.
    #[error("it expects {theirs} ranks (rank 0: {ours})")]
    WorldSize {
        /// What rank 0 expects.
        ours: usize,
        /// What the refused rank expects.
        theirs: usize,
    },
    /// There is no such rank.
    #[error("there is no {rank} in a world of {world_size}")]
    NoSuchRank {
        /// The rank it claims to be.
        rank: Rank,
        /// How many there are.
        world_size: usize,
    },
    /// Somebody else is this rank already.
    #[error("{rank} is process {pid} on {host} already (this one: process {their_pid} on {their_host})")]
    Duplicate {
        /// The rank that both claim to be.
        rank: Rank,
        /// Process of the first one.
        pid: u32,
        /// Machine of the first one.
        host: String,
        /// Process of the refused one.
        their_pid: u32,
        /// Machine of the refused one.
        their_host: String,
    },
    /// It was made for another plan.
    #[error(
        "it holds another plan, start it with the same flags or run `dist-cli shard`: {theirs} (rank 0: {ours})"
    )]
    Plan {
        /// Rank 0's hash.
        ours: String,
        /// The refused rank's hash.
        theirs: String,
    },
    /// It reads another checkpoint.
    #[error("it reads another checkpoint, give it the same files: {theirs} (rank 0: {ours})")]
    Checkpoint {
        /// Rank 0's hash.
        ours: String,
        /// The refused rank's hash.
        theirs: String,
    },
    /// It belongs to an earlier or later forming of the ranks.
    #[error("it is of generation {theirs} (rank 0: {ours})")]
    Generation {
        /// Rank 0's generation.
        ours: u64,
        /// The refused rank's generation.
        theirs: u64,
    },
    /// A connection between ranks that nobody here waits for.
    #[error("no such connection is expected: {what}")]
    Unexpected {
        /// What it claims to be.
        what: String,
    },
}

/// How a rendezvous fails.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RendezvousError {
    /// Not all came, or some were refused.
    #[error("rendezvous failed after {:.1} s: {}{turned_away}", waited.as_secs_f64(), absent(missing, refused))]
    Incomplete {
        /// How long rank 0 waited.
        waited: Duration,
        /// Ranks that did not come at all.
        missing: Vec<Rank>,
        /// Ranks that came and were refused.
        refused: Vec<(Rank, Refusal)>,
        /// Connections that proved nothing: a missing rank with another secret or version is one of them.
        turned_away: TurnedAway,
    },
    /// Rank 0 refused us.
    #[error("rank 0 refused {rank}: {refusal}")]
    Refused {
        /// Who we are.
        rank: Rank,
        /// Why.
        refusal: Refusal,
    },
    /// Rank 0 gave up.
    #[error("rank 0 gave up: {why}")]
    Aborted {
        /// Its words.
        why: String,
    },
    /// Rank 0 could not be reached, or went away.
    #[error("no rendezvous with rank 0 at {addr} within {:.1} s: {cause}", waited.as_secs_f64())]
    Unreachable {
        /// Where it should listen.
        addr: String,
        /// How long we tried.
        waited: Duration,
        /// What happened the last time.
        cause: String,
    },
    /// Another rank could not be reached.
    #[error("no connection between {rank} and {peer} ({channel}) within {:.1} s: {cause}", waited.as_secs_f64())]
    Mesh {
        /// Who we are.
        rank: Rank,
        /// Who was not reached.
        peer: Rank,
        /// What the connection is for.
        channel: String,
        /// How long we tried.
        waited: Duration,
        /// What happened.
        cause: String,
    },
    /// A rank is gone after all had met.
    #[error("{rank} is lost before the ranks could connect ({channel}): {why}")]
    RankLost {
        /// Which one.
        rank: Rank,
        /// What the connection was for.
        channel: String,
        /// How it went.
        why: Departure,
    },
    /// Something on this machine.
    #[error("{what}: {cause}")]
    Local {
        /// What was tried.
        what: String,
        /// The system's answer.
        cause: String,
    },
}

/// Connections that rank 0 closed because they did not prove the secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TurnedAway {
    /// How many.
    pub count: u64,
    /// What the last one did.
    pub last: String,
}

impl fmt::Display for TurnedAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, last } = self;
        match count {
            0 => Ok(()),
            1 => write!(f, "; one connection was turned away: {last}"),
            _ => write!(f, "; {count} connections were turned away, the last one: {last}"),
        }
    }
}

fn absent(missing: &[Rank], refused: &[(Rank, Refusal)]) -> String {
    let mut parts = Vec::new();
    if !missing.is_empty() {
        let ranks: Vec<_> = missing.iter().map(|rank| rank.0.to_string()).collect();
        parts.push(format!("missing ranks: {}", ranks.join(", ")));
    }
    parts.extend(refused.iter().map(|(rank, refusal)| format!("{rank} was refused: {refusal}")));
    parts.join("; ")
}

/// The ranks as they come.
#[derive(Debug)]
pub(super) struct Roll {
    ours: Presentation,
    admitted: BTreeMap<Rank, (ConnId, Member)>,
    refused: BTreeMap<Rank, Refusal>,
}

impl Roll {
    pub(super) const fn new(ours: Presentation) -> Self {
        Self { ours, admitted: BTreeMap::new(), refused: BTreeMap::new() }
    }

    pub(super) fn admit(&mut self, conn: ConnId, theirs: Presentation) -> Result<(), Refusal> {
        let rank = theirs.rank;
        if let Err(refusal) = self.check(&theirs) {
            // A straggler of another generation and a second rank 2 do not spoil what the first one is.
            let is_ours = rank.0 < self.ours.world_size && !self.admitted.contains_key(&rank);
            if is_ours && !matches!(refusal, Refusal::Generation { .. }) {
                self.refused.insert(rank, refusal.clone());
            }
            return Err(refusal);
        }
        self.refused.remove(&rank);
        self.admitted.insert(rank, (conn, theirs.member));
        Ok(())
    }

    fn check(&self, theirs: &Presentation) -> Result<(), Refusal> {
        let ours = &self.ours;
        if theirs.generation != ours.generation {
            return Err(Refusal::Generation { ours: ours.generation, theirs: theirs.generation });
        }
        if theirs.world_size != ours.world_size {
            return Err(Refusal::WorldSize { ours: ours.world_size, theirs: theirs.world_size });
        }
        if theirs.rank.0 >= ours.world_size {
            return Err(Refusal::NoSuchRank { rank: theirs.rank, world_size: ours.world_size });
        }
        let first = match theirs.rank {
            Rank(0) => Some(&ours.member),
            rank => self.admitted.get(&rank).map(|(_, member)| member),
        };
        if let Some(first) = first {
            return Err(Refusal::Duplicate {
                rank: theirs.rank,
                pid: first.pid,
                host: first.host.clone(),
                their_pid: theirs.member.pid,
                their_host: theirs.member.host.clone(),
            });
        }
        if theirs.plan_hash != ours.plan_hash {
            return Err(Refusal::Plan { ours: ours.plan_hash.clone(), theirs: theirs.plan_hash.clone() });
        }
        if theirs.checkpoint_hash != ours.checkpoint_hash {
            let (ours, theirs) = (ours.checkpoint_hash.clone(), theirs.checkpoint_hash.clone());
            return Err(Refusal::Checkpoint { ours, theirs });
        }
        Ok(())
    }

    pub(super) fn leave(&mut self, conn: ConnId) -> Option<Rank> {
        let rank = self.connections().find(|&(_, other)| other == conn)?.0;
        self.admitted.remove(&rank);
        Some(rank)
    }

    pub(super) fn connections(&self) -> impl Iterator<Item = (Rank, ConnId)> {
        self.admitted.iter().map(|(&rank, &(conn, _))| (rank, conn))
    }

    /// All members in order, if all are here.
    pub(super) fn members(&self) -> Option<Vec<Member>> {
        if self.admitted.len() + 1 != self.ours.world_size {
            return None;
        }
        let others = self.admitted.values().map(|(_, member)| member.clone());
        Some(std::iter::once(self.ours.member.clone()).chain(others).collect())
    }

    /// Whether everyone who is absent has been refused, so that waiting on helps nobody.
    pub(super) fn is_hopeless(&self) -> bool {
        !self.refused.is_empty() && self.missing().is_empty()
    }

    pub(super) fn error(&self, waited: Duration, turned_away: TurnedAway) -> RendezvousError {
        let refused = self.refused.iter().map(|(&rank, refusal)| (rank, refusal.clone())).collect();
        RendezvousError::Incomplete { waited, missing: self.missing(), refused, turned_away }
    }

    /// Ranks that neither are here nor were refused.
    fn missing(&self) -> Vec<Rank> {
        let known: BTreeSet<_> = self.admitted.keys().chain(self.refused.keys()).copied().collect();
        (1..self.ours.world_size).map(Rank).filter(|rank| !known.contains(rank)).collect()
    }
}
