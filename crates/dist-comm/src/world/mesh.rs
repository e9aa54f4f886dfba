//! Connections between ranks: each dials those before it and is dialled by those behind it. Every connection proves
//! the secret and says whose it is and what for; strangers cost a slot for a few seconds.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use dist_core::Rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::auth::{Nonce, Secret};
use crate::codec::FrameDecoder;
use crate::control::board::Board;
use crate::deadline::Deadline;
use crate::rendezvous::handshake::{Acceptor, HandshakeError};
use crate::rendezvous::{Member, Refusal, RendezvousError};
use crate::rendezvous_io::dial::{DialError, dial};
use crate::rendezvous_io::{HANDSHAKE_DEADLINE, local_error};

/// A connection and whom it leads to.
pub(super) type Line = (Rank, TcpStream, FrameDecoder);

/// Connections that may be unproved at one time; the oldest makes room.
const STRANGERS_MAX: usize = 64;

/// Longest wait before the clock is looked at.
const POLL_MAX: Duration = Duration::from_millis(100);

/// Pause between two attempts to reach a rank.
const RETRY: Duration = Duration::from_millis(20);

/// What a connection between ranks is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    session: [u8; 16],
    from: Rank,
    to: Rank,
    channel: String,
}

#[derive(Debug)]
struct Stranger {
    stream: TcpStream,
    acceptor: Acceptor,
    since: Instant,
}

/// A rank's means to connect to the others.
#[derive(Debug)]
pub(super) struct Mesh {
    me: Rank,
    members: Vec<Member>,
    session: [u8; 16],
    secret: Secret,
    listener: TcpListener,
    strangers: Vec<Stranger>,
    /// Proved connections that nobody here has asked for yet: their rank is ahead of us.
    early: Vec<(Claim, TcpStream, FrameDecoder)>,
}

impl Mesh {
    pub(super) fn new(
        me: Rank,
        members: Vec<Member>,
        session: [u8; 16],
        secret: Secret,
        listener: TcpListener,
    ) -> Result<Self, RendezvousError> {
        listener.set_nonblocking(true).map_err(|error| local_error("data address", &error))?;
        Ok(Self { me, members, session, secret, listener, strangers: Vec::new(), early: Vec::new() })
    }

    /// A connection to each other one of `ranks`, which all call this with the same channel. `board` tells of ranks that
    /// are gone meanwhile.
    pub(super) fn connect(
        &mut self,
        channel: &str,
        ranks: &[Rank],
        limit: Duration,
        board: Option<&Board>,
    ) -> Result<Vec<Line>, RendezvousError> {
        let deadline = Deadline::after(limit);
        let mut lines = Vec::new();
        for &peer in ranks.iter().filter(|&&rank| rank < self.me) {
            lines.push(self.dial(peer, channel, &deadline, board)?);
        }
        let mut awaited: Vec<_> = ranks.iter().copied().filter(|&rank| rank > self.me).collect();
        while !awaited.is_empty() {
            while let Some(at) = self.early.iter().position(|(claim, ..)| claim.channel == channel) {
                let (claim, stream, decoder) = self.early.swap_remove(at);
                awaited.retain(|&rank| rank != claim.from);
                lines.push((claim.from, stream, decoder));
            }
            for &peer in &awaited {
                check_loss(board, peer, channel)?;
            }
            if let Some(&peer) = awaited.first() {
                if deadline.is_over() {
                    return Err(self.failed(peer, channel, &deadline, "it did not connect"));
                }
                self.turn(&deadline);
            }
        }
        lines.sort_by_key(|&(rank, ..)| rank);
        Ok(lines)
    }

    fn failed(&self, peer: Rank, channel: &str, deadline: &Deadline, cause: &str) -> RendezvousError {
        let (channel, waited) = (channel.to_owned(), deadline.waited());
        RendezvousError::Mesh { rank: self.me, peer, channel, waited, cause: cause.to_owned() }
    }

    fn dial(
        &self,
        peer: Rank,
        channel: &str,
        deadline: &Deadline,
        board: Option<&Board>,
    ) -> Result<Line, RendezvousError> {
        let addr = match self.members.get(peer.0) {
            Some(member) => member.addr,
            None => return Err(self.failed(peer, channel, deadline, "there is no such rank")),
        };
        let claim = Claim { session: self.session, from: self.me, to: peer, channel: channel.to_owned() };
        loop {
            let is_in_vain = || check_loss(board, peer, channel).is_err();
            let cause = match dial(addr, &self.secret, |_| Ok(claim.clone()), deadline, is_in_vain) {
                Ok((stream, decoder)) => return Ok((peer, stream, decoder)),
                Err(DialError::Refused(refusal)) => {
                    return Err(self.failed(peer, channel, deadline, &refusal.to_string()));
                }
                Err(DialError::Foreign(cause)) => return Err(self.failed(peer, channel, deadline, &cause)),
                Err(DialError::Failed(cause)) => cause,
            };
            check_loss(board, peer, channel)?;
            if deadline.is_over() {
                return Err(self.failed(peer, channel, deadline, &format!("{addr}: {cause}")));
            }
            std::thread::sleep(RETRY.min(deadline.left()));
        }
    }

    /// Accepts and hears whoever is there, waiting a little.
    fn turn(&mut self, deadline: &Deadline) {
        let limit = deadline.left().min(POLL_MAX);
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut fds = vec![PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
        let streams = self.strangers.iter().map(|stranger| stranger.stream.as_fd());
        fds.extend(streams.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        if poll(&mut fds, Some(&limit)).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(fds);
        for stranger in std::mem::take(&mut self.strangers) {
            self.hear(stranger);
        }
        while let Ok((stream, _)) = self.listener.accept() {
            if self.strangers.len() >= STRANGERS_MAX {
                self.strangers.remove(0);
            }
            self.strangers.extend(greet(stream));
        }
    }

    /// Reads once; keeps it as a stranger, as a proved connection, or not at all.
    fn hear(&mut self, mut stranger: Stranger) {
        let mut bytes = [0; 4096];
        let n = match stranger.stream.read(&mut bytes) {
            Ok(n) if n > 0 => n,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                if stranger.since.elapsed() < HANDSHAKE_DEADLINE {
                    self.strangers.push(stranger);
                }
                return;
            }
            Ok(_) | Err(_) => return,
        };
        match stranger.acceptor.on_bytes::<Claim>(&self.secret, &bytes[..n]) {
            Ok(None) => self.strangers.push(stranger),
            Ok(Some(claim)) => self.judge(stranger, claim),
            Err(error) => {
                tracing::warn!(%error, "connection closed");
                if error == HandshakeError::Secret
                    && let Ok(frame) = Acceptor::rejection()
                {
                    // It is closed either way.
                    let _ = stranger.stream.write(&frame);
                }
            }
        }
    }

    fn judge(&mut self, mut stranger: Stranger, claim: Claim) {
        let is_known = self.early.iter().any(|(other, ..)| *other == claim);
        let fits = claim.session == self.session
            && claim.to == self.me
            && claim.from > self.me
            && claim.from.0 < self.members.len()
            && !is_known;
        let Claim { from, to, channel, .. } = &claim;
        let refusal = || Refusal::Unexpected { what: format!("{channel} from {from} to {to}") };
        let verdict = fits.then_some(()).ok_or_else(refusal);
        let Ok(Some(frame)) = stranger.acceptor.verdict(&self.secret, &verdict) else { return };
        let is_sent = matches!(stranger.stream.write(&frame), Ok(n) if n == frame.len());
        if is_sent && fits && stranger.stream.set_nonblocking(false).is_ok() {
            self.early.push((claim, stranger.stream, stranger.acceptor.into_decoder()));
        }
    }
}

/// An error if somebody is gone whose loss makes a connection to `peer` useless.
fn check_loss(board: Option<&Board>, peer: Rank, channel: &str) -> Result<(), RendezvousError> {
    let loss = board.filter(|board| board.is_alarmed()).and_then(|board| board.loss(Some(peer)));
    loss.map_or(Ok(()), |(rank, why)| {
        Err(RendezvousError::RankLost { rank, channel: channel.to_owned(), why })
    })
}

/// Sends the challenge.
fn greet(mut stream: TcpStream) -> Option<Stranger> {
    stream.set_nonblocking(true).ok()?;
    stream.set_nodelay(true).ok()?;
    let (acceptor, challenge) = Acceptor::new(Nonce::random().ok()?).ok()?;
    let n = stream.write(&challenge).ok()?;
    (n == challenge.len()).then(|| Stranger { stream, acceptor, since: Instant::now() })
}
