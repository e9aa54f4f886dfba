//! One rank's place among all: who is there, the control channel to rank 0, the watchdog, and the communicators that
//! are made of connections between ranks. This is what a rendezvous gives.

mod mesh;
#[cfg(target_os = "linux")]
mod share;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dist_core::Rank;

use crate::auth::Secret;
use crate::control::watch::Watch;
use crate::control::{Control, ControlError};
use crate::rendezvous::{Member, RendezvousError};
use crate::rendezvous_io::{JoinRequest, Joined, host, join, local_error};
use crate::tcp::Tcp;
use crate::tcp::link::Link;
#[cfg(not(target_os = "linux"))]
use crate::tcp::link::TcpLink;
use mesh::Mesh;

/// How long the word why a rank went may still be on its way.
const GRACE: Duration = Duration::from_millis(100);

/// What a communicator is like; the same on all its ranks.
#[derive(Clone, Copy, Debug)]
pub struct GroupOptions {
    /// How long a call waits for a rank that gets on with nothing: it enters no call and says no [`get_on`](crate::Comm::get_on).
    pub deadline: Duration,
    /// How far senders may be ahead of a receiver over shared memory.
    pub ahead: Ahead,
}

/// How far senders may be ahead of a receiver over shared memory: the size of the memory that they share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// All senders of a receiver together, by so many bytes.
    Together(usize),
    /// Each sender, by so many bytes.
    Each(usize),
}

impl GroupOptions {
    /// For ranks that make collectives.
    ///
    /// What comes in to a rank then goes round in 4 MiB: more than a core's own cache, so that the lines that a sender
    /// writes have long left the receiver's, and less than the cache that cores share. Two ranks pass 28 GB/s that way
    /// where 512 KiB pass 7 (AMD EPYC, 1 MiB of L2 a core).
    #[must_use]
    pub const fn collectives(deadline: Duration) -> Self {
        Self { deadline, ahead: Ahead::Together(4 << 20) }
    }

    /// For pipeline stages that pass messages of up to `message_bytes`: a sender goes on computing while its whole
    /// message waits.
    #[must_use]
    pub const fn messages(deadline: Duration, message_bytes: usize) -> Self {
        Self { deadline, ahead: Ahead::Each(2 * message_bytes) }
    }
}

/// One rank's place among all. Communicators stay usable after it is dropped.
#[derive(Debug)]
pub struct World {
    rank: Rank,
    members: Vec<Member>,
    mesh: Mesh,
    control: Control,
    watch: Arc<Watch>,
    /// How long ranks may take to connect.
    deadline: Duration,
}

impl World {
    /// Waits as rank 0 at `listener` for all other ranks.
    pub fn host(listener: &TcpListener, request: &JoinRequest) -> Result<Self, RendezvousError> {
        let joined = host(listener, request)?;
        Self::new(joined, request)
    }

    /// Joins as any other rank; `master` is where rank 0 listens, each address is tried.
    pub fn join(master: &[SocketAddr], request: &JoinRequest) -> Result<Self, RendezvousError> {
        let joined = join(master, request)?;
        Self::new(joined, request)
    }

    fn new(joined: Joined, request: &JoinRequest) -> Result<Self, RendezvousError> {
        let Joined { session, members, listener, lines } = joined;
        let secret: Secret = request.secret.clone();
        let mut mesh = Mesh::new(request.rank, members.clone(), session, secret, listener)?;
        let all: Vec<_> = (0..members.len()).map(Rank).collect();
        let peers = mesh.connect("watch", &all, request.deadline, None)?;
        let watch = Watch::start(request.rank, members.len(), peers)
            .map_err(|error| local_error("watchdog", &error))?;
        let watch = Arc::new(watch);
        let control = Control::new(lines, Arc::clone(&watch))
            .map_err(|error| local_error("control channel", &error))?;
        Ok(Self { rank: request.rank, members, mesh, control, watch, deadline: request.deadline })
    }

    /// Which rank we are.
    #[must_use]
    pub const fn rank(&self) -> Rank {
        self.rank
    }

    /// All ranks in order.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The channel between rank 0 and every other rank.
    pub const fn control(&mut self) -> &mut Control {
        &mut self.control
    }

    /// Whether all other ranks are there, for a rank that is busy by itself for long: an error names one that is gone, or
    /// that has been silent for `limit`.
    pub fn look(&self, limit: Duration) -> Result<(), ControlError> {
        self.watch.look(limit)
    }

    /// Tells all ranks that this one ends in error, before it is dropped.
    pub fn fail(&self, why: &str) {
        self.watch.tell_failed(why);
    }

    /// Makes a communicator of `members`, all of which call this with the same arguments; `name` tells it from the
    /// others that a rank is in. `None` if this rank is not a member. A rank that is lost meanwhile ends it at once.
    pub fn connect(
        &mut self,
        name: &str,
        members: &[Rank],
        options: GroupOptions,
    ) -> Result<Option<Tcp>, RendezvousError> {
        let Some(me) = members.iter().position(|&rank| rank == self.rank) else { return Ok(None) };
        let mut links = self.links(name, members, options).map_err(|error| self.blame(name, error))?;
        let link_to = |&rank: &Rank| {
            let at = links.iter().position(|&(peer, _)| peer == rank)?;
            Some(links.swap_remove(at).1)
        };
        let links = members.iter().map(link_to).collect();
        let watch = Arc::clone(&self.watch);
        Ok(Some(Tcp::new(name.to_owned(), (members.to_vec(), me), links, watch, options.deadline)))
    }

    #[cfg(target_os = "linux")]
    fn links(
        &mut self,
        name: &str,
        members: &[Rank],
        options: GroupOptions,
    ) -> Result<Vec<(Rank, Link)>, RendezvousError> {
        let lines = self.mesh.connect(name, members, self.deadline, Some(self.watch.board()))?;
        share::share(&self.members, self.rank, lines, options.ahead, self.deadline)
    }

    #[cfg(not(target_os = "linux"))]
    fn links(
        &mut self,
        name: &str,
        members: &[Rank],
        _options: GroupOptions,
    ) -> Result<Vec<(Rank, Link)>, RendezvousError> {
        let lines = self.mesh.connect(name, members, self.deadline, Some(self.watch.board()))?;
        let links = lines.into_iter().map(|(rank, stream, decoder)| {
            let link = TcpLink::new(stream, decoder).map_err(|error| local_error("link", &error))?;
            Ok((rank, Link::Tcp(link)))
        });
        links.collect()
    }

    /// Finds who is to blame for a failed connection, and tells the others.
    fn blame(&self, channel: &str, error: RendezvousError) -> RendezvousError {
        let since = Instant::now();
        // A connection that closes is seen before the word why, and perhaps by another rank.
        let loss = loop {
            let loss = self.watch.board().loss(None);
            if loss.is_some() || since.elapsed() >= GRACE {
                break loss;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        if let Some((rank, why)) = loss {
            self.watch.tell_loss(rank, &why);
            return RendezvousError::RankLost { rank, channel: channel.to_owned(), why };
        }
        match &error {
            RendezvousError::RankLost { rank, .. } | RendezvousError::Mesh { peer: rank, .. } => {
                self.watch.tell_lost(*rank);
            }
            other => self.watch.tell_failed(&other.to_string()),
        }
        error
    }
}
