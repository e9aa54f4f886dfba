//! Where a rank is, as it goes over the wire.

use dist_core::Rank;
use serde::{Deserialize, Serialize};

use crate::call::Op;

/// Where a rank is, as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// The communicator.
    pub(crate) group: String,
    /// Number of the call there.
    pub(crate) number: u64,
    pub(crate) op: WireOp,
    pub(crate) bytes: u64,
    /// The call's name as text.
    pub(crate) name: String,
    /// Milliseconds since it entered the call or, once it has left it, since then.
    pub(crate) since_ms: u64,
    /// Whether it is inside the call.
    pub(crate) is_inside: bool,
    /// Whom it waits for inside the call, if that takes long.
    pub(crate) waits_for: Option<Rank>,
}

/// An [`Op`] as it goes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum WireOp {
    AllReduce,
    AllGather,
    Broadcast(Rank),
    Barrier,
    Send(Rank),
    Recv(Rank),
}

impl From<Op> for WireOp {
    fn from(op: Op) -> Self {
        match op {
            Op::AllReduce => Self::AllReduce,
            Op::AllGather => Self::AllGather,
            Op::Broadcast { root } => Self::Broadcast(root),
            Op::Barrier => Self::Barrier,
            Op::Send { to } => Self::Send(to),
            Op::Recv { from } => Self::Recv(from),
        }
    }
}

impl From<WireOp> for Op {
    fn from(op: WireOp) -> Self {
        match op {
            WireOp::AllReduce => Self::AllReduce,
            WireOp::AllGather => Self::AllGather,
            WireOp::Broadcast(root) => Self::Broadcast { root },
            WireOp::Barrier => Self::Barrier,
            WireOp::Send(to) => Self::Send { to },
            WireOp::Recv(from) => Self::Recv { from },
        }
    }
}
