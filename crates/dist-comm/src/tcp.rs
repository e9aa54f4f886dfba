//! Ranks as processes: collectives over shared memory on one machine and over TCP between machines. Sums are those of
//! [`Local`](crate::Local), bit for bit, whatever the way and the algorithm.
//!
//! Calls between two ranks are matched in the order in which they are made: a message that was sent before a collective
//! is received before it.

mod exchange;
pub(crate) mod link;
pub(crate) mod packet;
mod wait;

use std::sync::Arc;
use std::time::{Duration, Instant};

use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};

use crate::call::{Call, CallName, Op};
use crate::control::watch::Watch;
use crate::error::CommError;
use link::Link;

/// An all-reduce in which each rank sends no more than this in one shot to all others does so; above it each rank adds a
/// part. Measured with `cargo bench -p dist-comm -- 2 4` on two cores: two ranks take 3.5 µs in one shot and 6.2 µs in
/// parts for 32 KiB, 6.2 and 6.4 µs for 64 KiB; four take 10.3 and 10.5 µs for 4 KiB, 22 and 16 µs for 16 KiB. It changes
/// time, never bits.
const ONE_SHOT_SENT_MAX: usize = 32 << 10;

/// One rank's end of a communicator between processes. Made by [`World::connect`](crate::World::connect).
#[derive(Debug)]
pub struct Tcp {
    /// Names the communicator in what the ranks tell each other.
    group: String,
    /// The ranks of the world that meet here.
    members: Vec<Rank>,
    me: usize,
    /// The way to each member; none to ourselves.
    links: Vec<Option<Link>>,
    watch: Arc<Watch>,
    deadline: Duration,
    one_shot_bytes_max: usize,
    n_cores: usize,
    /// Collectives so far.
    calls: u64,
    /// The last call in which all members were seen, and when.
    met: Option<(Call, Instant)>,
    /// Sends to and receives from each member so far.
    pairs: Vec<[u64; 2]>,
    /// Where a part is added before it replaces ours.
    scratch: Vec<u8>,
    /// The error that ended it.
    broken: Option<CommError>,
}

impl Tcp {
    pub(crate) fn new(
        group: String,
        (members, me): (Vec<Rank>, usize),
        links: Vec<Option<Link>>,
        watch: Arc<Watch>,
        deadline: Duration,
    ) -> Self {
        let n = members.len();
        Self {
            group,
            members,
            me,
            links,
            watch,
            deadline,
            one_shot_bytes_max: ONE_SHOT_SENT_MAX / n.saturating_sub(1).max(1),
            n_cores: crate::deadline::n_cores(),
            calls: 0,
            met: None,
            pairs: vec![[0; 2]; n],
            scratch: vec![0; packet::PACKET_BYTES],
            broken: None,
        }
    }

    /// Chooses where the algorithm of an all-reduce changes, at most [`PACKET_BYTES`](Self::PACKET_BYTES); the same on
    /// every rank.
    pub fn set_one_shot_bytes_max(&mut self, bytes: usize) {
        self.one_shot_bytes_max = bytes.min(packet::PACKET_BYTES);
    }

    /// The largest piece that travels at once.
    pub const PACKET_BYTES: usize = packet::PACKET_BYTES;

    /// Whether the way to each other member is shared memory.
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        self.links.iter().flatten().all(|link| link.fd().is_none())
    }

    /// Whether the way to one member is shared memory.
    pub(crate) fn shares_memory_with(&self, rank: Rank) -> bool {
        self.links.get(rank.0).and_then(Option::as_ref).is_some_and(|link| link.fd().is_none())
    }

    pub(crate) fn rank(&self) -> Rank {
        Rank(self.me)
    }

    pub(crate) fn world_size(&self) -> usize {
        self.members.len()
    }

    pub(crate) fn get_on(&self) {
        self.watch.board().get_on();
    }

    pub(crate) fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Runs a call. An error ends the communicator: the others learn of it, and later calls give the same.
    fn run(&mut self, call: impl FnOnce(&mut Self) -> Result<(), CommError>) -> Result<(), CommError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let result = call(self);
        match &result {
            Ok(()) => self.watch.board().leave(Instant::now()),
            // The call is never left: the next beat may overtake the word why, and a rank that looks idle is blamed.
            Err(error) => {
                tracing::debug!(%error, "communicator ended");
                self.tell_why(error);
                self.broken = Some(error.clone());
            }
        }
        result
    }

    fn tell_why(&self, error: &CommError) {
        match error {
            CommError::Timeout { missing, .. } if !missing.is_empty() => {
                let rank = missing[0].rank;
                self.watch.board().wait_for(Some(rank));
                self.watch.tell_lost(rank);
            }
            CommError::RankLost { rank, why, .. } => self.watch.tell_loss(*rank, why),
            _ => self.watch.tell_failed(&error.to_string()),
        }
    }

    /// Numbers a collective. What is wrong with its arguments is said before it is entered, because that does not depend
    /// on the others.
    fn next(&mut self, op: Op, bytes: usize, dtype: DType, name: CallName) -> Call {
        self.calls += 1;
        Call { number: self.calls, op, bytes, dtype, name }
    }

    /// Enters a call, unless somebody is lost already: then what may still be there to receive helps nobody.
    fn enter(&self, call: &Call) -> Result<(), CommError> {
        let board = self.watch.board();
        if board.is_alarmed()
            && let Some(loss) = board.loss(None)
        {
            return Err(self.lost(call, loss, Duration::ZERO));
        }
        board.enter(&self.group, &self.named(*call), Instant::now());
        Ok(())
    }

    pub(crate) fn all_reduce_sum(&mut self, buf: RawBuf<'_>, name: CallName) -> Result<(), CommError> {
        self.run(|tcp| {
            let (bytes, dtype) = host(buf)?;
            if dtype != DType::F32 || bytes.len() % 4 != 0 {
                let (what, cure) = ("partial sums other than whole f32", "plan f32 as the wire type");
                return Err(CommError::Unsupported { comm: "tcp", what, cure });
            }
            let call = tcp.next(Op::AllReduce, bytes.len(), dtype, name);
            tcp.enter(&call)?;
            if bytes.len() <= tcp.one_shot_bytes_max {
                tcp.reduce_one_shot(&call, bytes)
            } else {
                tcp.reduce_direct(&call, bytes)
            }
        })
    }

    pub(crate) fn all_gather(
        &mut self,
        src: RawBuf<'_>,
        dst: RawBuf<'_>,
        name: CallName,
    ) -> Result<(), CommError> {
        self.run(|tcp| {
            let ((src, dtype), (dst, _)) = (host(src)?, host(dst)?);
            let call = tcp.next(Op::AllGather, src.len(), dtype, name);
            let (found, expected) = (dst.len(), src.len() * tcp.world_size());
            if found != expected {
                return Err(CommError::BufferSize { call: Box::new(call), found, expected });
            }
            tcp.enter(&call)?;
            tcp.gather(&call, src, dst)
        })
    }

    pub(crate) fn broadcast(&mut self, buf: RawBuf<'_>, root: Rank, name: CallName) -> Result<(), CommError> {
        self.run(|tcp| {
            let (bytes, dtype) = host(buf)?;
            let call = tcp.next(Op::Broadcast { root }, bytes.len(), dtype, name);
            if root.0 >= tcp.world_size() {
                return Err(tcp.no_such_rank(call, root));
            }
            tcp.enter(&call)?;
            if root.0 == tcp.me {
                let others = tcp.others();
                tcp.give(&call, &others, bytes)
            } else {
                tcp.take(&call, root.0, bytes)
            }
        })
    }

    pub(crate) fn barrier(&mut self, name: CallName) -> Result<(), CommError> {
        self.run(|tcp| {
            let call = tcp.next(Op::Barrier, 0, DType::U8, name);
            tcp.enter(&call)?;
            tcp.gather(&call, &[], &mut [])
        })
    }

    pub(crate) fn send(&mut self, buf: RawBuf<'_>, to: Rank, name: CallName) -> Result<(), CommError> {
        self.run(|tcp| {
            let (bytes, dtype) = host(buf)?;
            let call = tcp.next_of_pair(to, Op::Send { to }, (bytes.len(), dtype), name)?;
            tcp.give(&call, &[to.0], bytes)
        })
    }

    pub(crate) fn recv(&mut self, buf: RawBuf<'_>, from: Rank, name: CallName) -> Result<(), CommError> {
        self.run(|tcp| {
            let (bytes, dtype) = host(buf)?;
            let call = tcp.next_of_pair(from, Op::Recv { from }, (bytes.len(), dtype), name)?;
            tcp.take(&call, from.0, bytes)
        })
    }

    /// Numbers a send or a receive and enters it.
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
        self.enter(&call)?;
        Ok(call)
    }

    fn no_such_rank(&self, call: Call, rank: Rank) -> CommError {
        CommError::NoSuchRank { call: Box::new(call), rank, world_size: self.world_size() }
    }

    /// The other members, beginning behind us, so that not all knock at the same door first.
    fn others(&self) -> Vec<usize> {
        let n = self.members.len();
        (1..n).map(|step| (self.me + step) % n).collect()
    }

    /// The call with ranks of the world instead of places in this communicator.
    fn named(&self, call: Call) -> Call {
        let name = |rank: Rank| self.members.get(rank.0).copied().unwrap_or(rank);
        let op = match call.op {
            Op::Broadcast { root } => Op::Broadcast { root: name(root) },
            Op::Send { to } => Op::Send { to: name(to) },
            Op::Recv { from } => Op::Recv { from: name(from) },
            op => op,
        };
        Call { op, ..call }
    }
}

/// The bytes of host memory.
fn host(buf: RawBuf<'_>) -> Result<(&mut [u8], DType), CommError> {
    match buf {
        RawBuf::Host { bytes, dtype } => Ok((bytes, dtype)),
        RawBuf::Device { .. } => {
            let (what, cure) = ("device memory", "use NCCL between accelerators, or copy to the host first");
            Err(CommError::Unsupported { comm: "tcp", what, cure })
        }
    }
}
