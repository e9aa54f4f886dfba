//! Ranks as threads of one process: host memory only, through shared vectors behind locks. Not the fastest way between
//! two cores; the plainest one, and the oracle of the others.

mod hub;

use std::sync::Arc;
use std::time::Duration;

use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};

use crate::call::{Call, CallName, Op};
use crate::error::{CommError, Departure};
use crate::tree;
use hub::Hub;

/// One rank's end of a communicator between threads. Dropping it tells the others that this rank is gone.
#[derive(Debug)]
pub struct Local {
    hub: Arc<Hub>,
    me: usize,
    deadline: Duration,
    /// Collectives so far.
    calls: u64,
    /// Sends to and receives from each rank so far.
    pairs: Vec<[u64; 2]>,
    /// The error that ended it.
    broken: Option<CommError>,
}

impl Local {
    /// The ends of a world of `world_size` ranks, each to be moved to its thread; calls wait for at most `deadline`.
    #[must_use]
    pub fn world(world_size: usize, deadline: Duration) -> Vec<Self> {
        Self::group((0..world_size).map(Rank).collect(), deadline)
    }

    /// The ends of a communicator of some ranks of a larger world, e.g. of one axis of a mesh. Arguments count ranks
    /// within the group, errors name them as `members` does.
    #[must_use]
    pub fn group(members: Vec<Rank>, deadline: Duration) -> Vec<Self> {
        let n = members.len();
        let hub = Arc::new(Hub::new(members));
        let end =
            |me| Self { hub: Arc::clone(&hub), me, deadline, calls: 0, pairs: vec![[0; 2]; n], broken: None };
        (0..n).map(end).collect()
    }

    pub(crate) fn rank(&self) -> Rank {
        Rank(self.me)
    }

    pub(crate) fn world_size(&self) -> usize {
        self.hub.n()
    }

    pub(crate) fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Runs a call. An error ends the communicator: the others learn of it, and later calls give the same.
    fn run<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T, CommError>) -> Result<T, CommError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let result = call(self);
        if let Err(error) = &result {
            tracing::debug!(rank = self.me, %error, "communicator ended");
            self.hub.leave(self.me, Departure::Failed(error.to_string()));
            self.broken = Some(error.clone());
        }
        result
    }

    /// Numbers a collective.
    fn next(&mut self, op: Op, bytes: usize, dtype: DType, name: CallName) -> Call {
        self.calls += 1;
        Call { number: self.calls, op, bytes, dtype, name }
    }

    /// Waits until all ranks have brought their parts to `call`, then hands those out in rank order.
    fn meet(&self, call: Call, take: impl FnOnce(&[&[u8]])) -> Result<(), CommError> {
        self.hub.meet(self.me, call, self.deadline)?;
        let parts = self.hub.parts(call.number);
        take(&parts.iter().map(|part| part.as_slice()).collect::<Vec<_>>());
        Ok(())
    }

    pub(crate) fn all_reduce_sum(&mut self, buf: RawBuf, name: CallName) -> Result<(), CommError> {
        self.run(|local| {
            let (bytes, dtype) = host(buf)?;
            if dtype != DType::F32 || bytes.len() % 4 != 0 {
                let (what, cure) = ("partial sums other than whole f32", "plan f32 as the wire type");
                return Err(CommError::Unsupported { comm: "local", what, cure });
            }
            let call = local.next(Op::AllReduce, bytes.len(), dtype, name);
            local.hub.bring(local.me, call.number, bytes);
            local.meet(call, |parts| tree::sum(bytes, parts))
        })
    }

    pub(crate) fn all_gather(&mut self, src: RawBuf, dst: RawBuf, name: CallName) -> Result<(), CommError> {
        self.run(|local| {
            let ((src, dtype), (dst, _)) = (host(src)?, host(dst)?);
            let call = local.next(Op::AllGather, src.len(), dtype, name);
            let (found, expected) = (dst.len(), src.len() * local.world_size());
            if found != expected {
                return Err(CommError::BufferSize { call: Box::new(call), found, expected });
            }
            local.hub.bring(local.me, call.number, src);
            local.meet(call, |parts| {
                for (dst, part) in dst.chunks_mut(src.len().max(1)).zip(parts) {
                    dst.copy_from_slice(part);
                }
            })
        })
    }

    pub(crate) fn broadcast(&mut self, buf: RawBuf, root: Rank, name: CallName) -> Result<(), CommError> {
        self.run(|local| {
            let (bytes, dtype) = host(buf)?;
            let call = local.next(Op::Broadcast { root }, bytes.len(), dtype, name);
            if root.0 >= local.world_size() {
                return Err(local.no_such_rank(call, root));
            }
            if root.0 == local.me {
                local.hub.bring(local.me, call.number, bytes);
            }
            local.meet(call, |parts| {
                if root.0 != local.me {
                    bytes.copy_from_slice(parts[root.0]);
                }
            })
        })
    }

    pub(crate) fn barrier(&mut self, name: CallName) -> Result<(), CommError> {
        self.run(|local| {
            let call = local.next(Op::Barrier, 0, DType::U8, name);
            local.meet(call, |_| ())
        })
    }

    pub(crate) fn send(&mut self, buf: RawBuf, to: Rank, name: CallName) -> Result<(), CommError> {
        self.run(|local| {
            let (bytes, dtype) = host(buf)?;
            let call = local.next_of_pair(to, Op::Send { to }, (bytes.len(), dtype), name)?;
            local.hub.send(local.me, (to.0, bytes), call, local.deadline)
        })
    }

    pub(crate) fn recv(&mut self, buf: RawBuf, from: Rank, name: CallName) -> Result<(), CommError> {
        self.run(|local| {
            let (bytes, dtype) = host(buf)?;
            let call = local.next_of_pair(from, Op::Recv { from }, (bytes.len(), dtype), name)?;
            local.hub.recv(local.me, (from.0, bytes), call, local.deadline)
        })
    }

    /// Numbers a send or a receive.
    fn next_of_pair(
        &mut self,
        peer: Rank,
        op: Op,
        (bytes, dtype): (usize, DType),
        name: CallName,
    ) -> Result<Call, CommError> {
        let mut call = Call { number: 0, op, bytes, dtype, name };
        if peer.0 >= self.world_size() || peer.0 == self.me {
            return Err(self.no_such_rank(call, peer));
        }
        let count = &mut self.pairs[peer.0][usize::from(matches!(op, Op::Recv { .. }))];
        *count += 1;
        call.number = *count;
        Ok(call)
    }

    fn no_such_rank(&self, call: Call, rank: Rank) -> CommError {
        CommError::NoSuchRank { call: Box::new(call), rank, world_size: self.world_size() }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let why = if std::thread::panicking() { Departure::Panicked } else { Departure::Left };
        self.hub.leave(self.me, why);
    }
}

/// The bytes of host memory.
fn host(buf: RawBuf<'_>) -> Result<(&mut [u8], DType), CommError> {
    match buf {
        RawBuf::Host { bytes, dtype } => Ok((bytes, dtype)),
        RawBuf::Device { .. } => {
            let (what, cure) = ("device memory", "use NCCL between accelerators, or copy to the host first");
            Err(CommError::Unsupported { comm: "local", what, cure })
        }
    }
}
