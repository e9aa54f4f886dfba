//! Ranks that follow: what the leader tells them, the loop that obeys, and what is left when a rank is lost.
//!
//! The loss of another rank is a value, [`RankLost`], and no error: a command ends with its sentence, a server forms
//! the ranks anew.

use std::fmt::Write as _;
use std::time::Duration;

use dist_comm::codec::{FrameError, from_bytes, to_bytes};
use dist_comm::{CommError, ControlError, Wait, World};
use dist_core::{Rank, decoder_specs};
use dist_kernels::Backend;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::engine::EngineError;
use crate::runner::{RunError, Runner, Usage, with_causes};
use crate::step::StepBatch;

/// How long a last word may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Another rank, or the way to it, is gone; the sentence names it, the call and how long was waited.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RankLost {
    /// Seen in a collective.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Seen between two steps.
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl RankLost {
    /// The ranks that are to blame.
    pub fn ranks(&self) -> Vec<Rank> {
        match self {
            Self::Comm(CommError::Timeout { missing, .. }) => {
                missing.iter().map(|missing| missing.rank).collect()
            }
            Self::Comm(CommError::RankLost { rank, .. })
            | Self::Control(ControlError::RankLost { rank, .. } | ControlError::Timeout { rank, .. }) => {
                vec![*rank]
            }
            Self::Comm(_) | Self::Control(_) => Vec::new(),
        }
    }
}

/// How a follower ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The leader said so.
    Told,
    /// Another rank is gone.
    Lost(RankLost),
}

/// What the leader tells the followers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Command {
    /// The next step, after so many steps have been collected.
    Step { collects: u32, batch: Box<StepBatch> },
    /// What has been done since the last report.
    Report,
    /// The end.
    Stop,
}

/// A command as it goes over the wire, without a copy of the batch.
#[derive(Serialize)]
enum CommandRef<'a> {
    Step { collects: u32, batch: &'a StepBatch },
    Report,
    Stop,
}

/// The leader's way to ranks that are processes.
#[derive(Debug)]
pub struct Leader {
    world: World,
    limit: Duration,
}

impl Leader {
    /// Waits until every other rank has its weights; `limit` is how long one may be silent, now and later.
    pub fn new(mut world: World, limit: Duration) -> Result<Self, ControlError> {
        for rank in (1..world.members().len()).map(Rank) {
            world.control().recv(rank, Wait::UntilSilentFor(limit))?;
        }
        Ok(Self { world, limit })
    }

    pub(crate) fn step(&mut self, batch: &StepBatch, collects: u32) -> Result<(), ControlError> {
        let command = to_bytes(&CommandRef::Step { collects, batch })?;
        self.world.control().broadcast(&command, self.limit)
    }

    /// What every follower did since the last report, in order of their ranks.
    pub(crate) fn reports(&mut self) -> Result<Vec<Usage>, ControlError> {
        let control = self.world.control();
        control.broadcast(&to_bytes(&CommandRef::Report)?, self.limit)?;
        let mut reports = Vec::new();
        for rank in (1..self.world.members().len()).map(Rank) {
            let report = self.world.control().recv(rank, Wait::UntilSilentFor(self.limit))?;
            reports.push(from_bytes(&report)?);
        }
        Ok(reports)
    }

    /// Every follower ends well; one that is gone already is no matter any more.
    pub(crate) fn stop(&mut self) {
        let told = to_bytes(&CommandRef::Stop).map_err(ControlError::from);
        let told = told.and_then(|command| self.world.control().broadcast(&command, FAREWELL));
        if let Err(error) = told {
            tracing::debug!(%error, "a follower was not told to stop");
        }
    }

    /// Tells all ranks why this one ends.
    pub(crate) fn fail(&self, why: &str) {
        self.world.fail(why);
    }
}

/// Runs a rank that follows, its weights taken in, until the leader says stop or a rank is lost.
///
/// `limit` is how long the leader may be silent; an idle leader is not silent, its watchdog speaks.
pub fn rank_main<B: Backend>(
    world: &mut World,
    runner: &mut Runner<B>,
    limit: Duration,
) -> Result<Ended, EngineError> {
    match follow(world, runner, limit) {
        Ok(()) => Ok(Ended::Told),
        Err(error) => {
            if let Some(lost) = error.lost() {
                return Ok(Ended::Lost(lost));
            }
            world.fail(&with_causes(&error));
            Err(error)
        }
    }
}

fn follow<B: Backend>(world: &mut World, runner: &mut Runner<B>, limit: Duration) -> Result<(), EngineError> {
    world.control().send(Rank(0), b"ready", limit)?;
    loop {
        let command = world.control().recv(Rank(0), Wait::UntilSilentFor(limit))?;
        let command = from_bytes(&command).map_err(|error: FrameError| ControlError::from(error))?;
        match command {
            Command::Step { collects, batch } => {
                // As the leader does it: what a step drew has to be here before a step that goes on from it.
                for _ in 0..collects {
                    runner.collect()?;
                }
                runner.submit(&batch)?;
            }
            Command::Report => {
                let report = to_bytes(&runner.take_usage()).map_err(ControlError::from)?;
                world.control().send(Rank(0), &report, limit)?;
            }
            Command::Stop => return Ok(()),
        }
    }
}

impl EngineError {
    /// The loss of another rank, if that is what it is.
    pub fn lost(&self) -> Option<RankLost> {
        match self {
            Self::Run(RunError::Comm(error @ (CommError::Timeout { .. } | CommError::RankLost { .. }))) => {
                Some(error.clone().into())
            }
            Self::Control(error @ (ControlError::Timeout { .. } | ControlError::RankLost { .. })) => {
                Some(error.clone().into())
            }
            _ => None,
        }
    }
}

/// Tells checkpoints apart without reading their matrices: by the hashes of a manifest, or else SHA-256 over the
/// configuration and every bias and norm.
pub fn checkpoint_identity(checkpoint: &Checkpoint) -> Result<String, CheckpointError> {
    if let Some(identity) = checkpoint.identity() {
        return Ok(identity.to_string());
    }
    let mut hasher = Sha256::new();
    // The name is the folder's, which may differ from machine to machine.
    let config = dist_core::ModelConfig { name: String::new(), ..checkpoint.config().clone() };
    hasher.update(format!("{config:?}"));
    hasher.update(checkpoint.weight_bytes().to_le_bytes());
    for spec in decoder_specs(checkpoint.config()).iter().filter(|spec| spec.shape.len() == 1) {
        hasher.update(spec.name.as_bytes());
        hasher.update(bytemuck::cast_slice(&checkpoint.vector(spec, 1, 0)?));
    }
    let mut text = String::new();
    for byte in hasher.finalize() {
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}
