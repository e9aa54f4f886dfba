//! Collectives between the ranks of a distributed GPT.
//!
//! Every call has a number, a deadline and a [name](CallName), so that an error says which rank was missing, where, and
//! since when: `rank 2 never entered all_reduce #5121 (layer 11, attention output; decode step 73); it was last seen in
//! all_reduce #5119 4.2 s ago`. Sums are added in one balanced tree over rank index
//! ([`tree_split`](dist_core::shape::tree_split)), so every rank, every run and every algorithm has the same bits.
//!
//! It knows no model, no kernel and no plan; bytes come and go as [`RawBuf`].
//!
//! ```
//! use std::time::Duration;
//!
//! use dist_comm::{CallName, Comm, Local};
//! use dist_core::DType;
//! use dist_core::raw::RawBuf;
//!
//! fn rank_main(comm: &mut Comm) -> Result<f32, dist_comm::CommError> {
//!     let mut bytes = (1.0 + comm.rank().0 as f32).to_le_bytes();
//!     let buf = RawBuf::Host { bytes: &mut bytes, dtype: DType::F32 };
//!     comm.all_reduce_sum(buf, CallName::new("attention output").layer(0).step(1))?;
//!     Ok(f32::from_le_bytes(bytes))
//! }
//!
//! let sums = std::thread::scope(|scope| {
//!     let ends = Local::world(4, Duration::from_secs(10)).into_iter();
//!     let ranks: Vec<_> =
//!         ends.map(|local| scope.spawn(move || rank_main(&mut Comm::Local(local)))).collect();
//!     ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Result<Vec<_>, _>>()
//! });
//! assert_eq!(sums, Ok(vec![10.0; 4]));
//! ```

#![deny(unsafe_code)]

pub mod auth;
mod call;
pub mod codec;
mod control;
mod deadline;
mod error;
mod local;
pub mod probe;
pub mod rendezvous;
mod rendezvous_io;
#[cfg(target_os = "linux")]
mod shm;
mod solo;
mod tcp;
mod tree;
mod world;

use std::time::Duration;

use dist_core::Rank;
use dist_core::raw::RawBuf;

pub use call::{Call, CallName, Op};
pub use control::{Control, ControlError, Wait};
pub use error::{CommError, Departure, Missing, Seen};
pub use local::Local;
pub use rendezvous_io::{JoinRequest, SharedMemory};
pub use solo::Solo;
pub use tcp::Tcp;
pub use world::{Ahead, GroupOptions, World};

/// How long a call waits for other ranks unless told otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);

/// One rank's end of a communicator: of the whole world, or of one axis of a mesh.
///
/// All ranks of a communicator make the same collectives in the same order with the same names. Ranks in arguments
/// count within the communicator. After an error it is of no use: later calls return the same error.
#[derive(Debug)]
#[non_exhaustive]
pub enum Comm {
    /// One rank.
    Solo(Solo),
    /// Ranks as threads of one process.
    Local(Local),
    /// Ranks as processes, on one machine or several.
    Tcp(Box<Tcp>),
}

impl From<Tcp> for Comm {
    fn from(tcp: Tcp) -> Self {
        Self::Tcp(Box::new(tcp))
    }
}

impl Comm {
    /// This rank's place in the communicator.
    #[must_use]
    pub fn rank(&self) -> Rank {
        match self {
            Self::Solo(_) => Rank(0),
            Self::Local(local) => local.rank(),
            Self::Tcp(tcp) => tcp.rank(),
        }
    }

    /// Ranks of the communicator.
    #[must_use]
    pub fn world_size(&self) -> usize {
        match self {
            Self::Solo(_) => 1,
            Self::Local(local) => local.world_size(),
            Self::Tcp(tcp) => tcp.world_size(),
        }
    }

    /// From now on calls wait for at most `deadline`.
    pub fn set_deadline(&mut self, deadline: Duration) {
        match self {
            Self::Solo(_) => {}
            Self::Local(local) => local.set_deadline(deadline),
            Self::Tcp(tcp) => tcp.set_deadline(deadline),
        }
    }

    /// Tells ranks that wait for this one that it is getting on, where calls are far apart: a deadline counts from the
    /// last word of this kind. Between threads nobody listens.
    pub fn get_on(&self) {
        if let Self::Tcp(tcp) = self {
            tcp.get_on();
        }
    }

    /// Replaces `buf` by the sum of all ranks' `buf`, in `f32`; the same bits on every rank.
    pub fn all_reduce_sum(&mut self, buf: RawBuf<'_>, name: CallName) -> Result<(), CommError> {
        match self {
            Self::Solo(_) => Ok(()),
            Self::Local(local) => local.all_reduce_sum(buf, name),
            Self::Tcp(tcp) => tcp.all_reduce_sum(buf, name),
        }
    }

    /// Fills `dst` with all ranks' `src` in rank order; `src` is of one size everywhere and `dst` world-size times that.
    pub fn all_gather(&mut self, src: RawBuf<'_>, dst: RawBuf<'_>, name: CallName) -> Result<(), CommError> {
        match self {
            Self::Solo(solo) => solo.all_gather(&src, dst, name),
            Self::Local(local) => local.all_gather(src, dst, name),
            Self::Tcp(tcp) => tcp.all_gather(src, dst, name),
        }
    }

    /// Replaces `buf` by that of `root`.
    pub fn broadcast(&mut self, buf: RawBuf<'_>, root: Rank, name: CallName) -> Result<(), CommError> {
        match self {
            Self::Solo(solo) => solo.broadcast(&buf, root, name),
            Self::Local(local) => local.broadcast(buf, root, name),
            Self::Tcp(tcp) => tcp.broadcast(buf, root, name),
        }
    }

    /// Gives `buf` to rank `to`, which receives as much under the same name. May return before it has arrived.
    pub fn send(&mut self, buf: RawBuf<'_>, to: Rank, name: CallName) -> Result<(), CommError> {
        match self {
            Self::Solo(solo) => solo.pair(Op::Send { to }, &buf, to, name),
            Self::Local(local) => local.send(buf, to, name),
            Self::Tcp(tcp) => tcp.send(buf, to, name),
        }
    }

    /// Fills `buf` with the next message of rank `from`.
    pub fn recv(&mut self, buf: RawBuf<'_>, from: Rank, name: CallName) -> Result<(), CommError> {
        match self {
            Self::Solo(solo) => solo.pair(Op::Recv { from }, &buf, from, name),
            Self::Local(local) => local.recv(buf, from, name),
            Self::Tcp(tcp) => tcp.recv(buf, from, name),
        }
    }

    /// Waits until all ranks are here.
    pub fn barrier(&mut self, name: CallName) -> Result<(), CommError> {
        match self {
            Self::Solo(_) => Ok(()),
            Self::Local(local) => local.barrier(name),
            Self::Tcp(tcp) => tcp.barrier(name),
        }
    }
}
