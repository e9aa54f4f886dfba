//! What can go wrong between ranks, each error naming the rank, the call and how long was waited.

use std::fmt;
use std::time::Duration;

use dist_core::{DType, Rank};

use crate::call::{Call, Op};

/// Where a rank was last seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// In this call.
    pub call: Call,
    /// So long before the error.
    pub ago: Duration,
}

/// A rank that did not come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Which one.
    pub rank: Rank,
    /// Its last call, if it ever made one.
    pub last: Option<Seen>,
}

/// How a rank went away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Departure {
    /// It let go of its communicator.
    Left,
    /// Its thread panicked.
    Panicked,
    /// An error of its own made it give up.
    Failed(String),
    /// Its connections closed without a word: its process was killed, or the link broke.
    Closed,
    /// It is there, but another rank waited for it in vain.
    GivenUp {
        /// The rank that says so.
        by: Rank,
    },
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("it left"),
            Self::Panicked => f.write_str("its thread panicked"),
            Self::Failed(error) => write!(f, "it gave up: {error}"),
            Self::Closed => f.write_str("its connections closed"),
            Self::GivenUp { by } => write!(f, "{by} waited for it in vain"),
        }
    }
}

/// An error of a collective. Ranks are those of the world, and the communicator is of no use afterwards.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommError {
    /// Ranks did not come before the deadline.
    #[error("{}", timeout_sentence(.call, .missing, *.waited))]
    Timeout {
        /// The call that waited.
        call: Box<Call>,
        /// Who did not come, in order.
        missing: Vec<Missing>,
        /// How long was waited.
        waited: Duration,
    },
    /// A rank is gone.
    #[error("{rank} is lost before {call}: {why}; {}", last_seen(.last.as_deref()))]
    RankLost {
        /// Which one.
        rank: Rank,
        /// The call that needed it.
        call: Box<Call>,
        /// Its last call, if it ever made one.
        last: Option<Box<Seen>>,
        /// How it went.
        why: Departure,
    },
    /// Two ranks mean different calls.
    #[error(
        "ranks have come apart: {our_rank} is in {ours} with {}, {their_rank} in {theirs} with {}",
        payload(.ours), payload(.theirs)
    )]
    Mismatch {
        /// The rank that reports it.
        our_rank: Rank,
        /// Its call.
        ours: Box<Call>,
        /// The other rank.
        their_rank: Rank,
        /// The other's call.
        theirs: Box<Call>,
    },
    /// Buffers whose sizes do not fit each other.
    #[error("{call} got a buffer of {found} bytes where {expected} are needed")]
    BufferSize {
        /// The call.
        call: Box<Call>,
        /// Size of the buffer.
        found: usize,
        /// Size that it should have.
        expected: usize,
    },
    /// A rank that the communicator does not have, or the caller itself.
    #[error("{call} names {rank}; the communicator has ranks 0 to {}, and nobody sends to itself", .world_size - 1)]
    NoSuchRank {
        /// The call.
        call: Box<Call>,
        /// The rank that was named.
        rank: Rank,
        /// Ranks of the communicator.
        world_size: usize,
    },
    /// Something that this kind of communicator does not do.
    #[error("{comm} ranks cannot take {what}: {cure}")]
    Unsupported {
        /// Kind of communicator.
        comm: &'static str,
        /// What was given.
        what: &'static str,
        /// What to do.
        cure: &'static str,
    },
}

/// What a call carries, for a mismatch.
fn payload(call: &Call) -> String {
    let of = |dtype: DType| format!("{} bytes of {dtype}", call.bytes);
    match call.op {
        Op::Barrier => "no bytes".to_owned(),
        Op::Broadcast { root } => format!("{} from {root}", of(call.dtype)),
        _ => of(call.dtype),
    }
}

fn seconds(ago: Duration) -> String {
    format!("{:.1} s ago", ago.as_secs_f64())
}

fn last_seen(last: Option<&Seen>) -> String {
    match last {
        Some(seen) => {
            let Call { op, number, .. } = seen.call;
            format!("it was last seen in {op} #{number} {}", seconds(seen.ago))
        }
        None => "it was never seen".to_owned(),
    }
}

fn timeout_sentence(call: &Call, missing: &[Missing], waited: Duration) -> String {
    let expected = match call.op {
        Op::Send { .. } => format!("took up {call}"),
        Op::Recv { .. } => format!("sent what {call} waits for"),
        _ => format!("entered {call}"),
    };
    let sentence = |missing: &Missing| {
        let seen = match &missing.last {
            Some(seen) => last_seen(Some(seen)),
            // A rank that is waited for in its first call says nothing by which it could be dated.
            None => format!("it was never seen in {:.1} s", waited.as_secs_f64()),
        };
        format!("{} never {expected}; {seen}", missing.rank)
    };
    let each: Vec<String> = missing.iter().map(sentence).collect();
    each.join(". ")
}
