//! Rank 0's side: polls its listener and all connections and does what the state machine says.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use dist_core::Rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{HANDSHAKE_DEADLINE, JoinRequest, Joined, local_error, present, since};
use crate::auth::{Nonce, random_bytes};
use crate::codec::{CONTROL_LIMIT, FrameDecoder};
use crate::rendezvous::{ConnId, Effect, Event, Rendezvous, RendezvousError, Setup};

/// Connections that may be unproved at one time, beyond the ranks themselves.
const STRANGERS_MAX: usize = 64;

/// Strangers that are told one by one: whoever connects again and again must not fill the user's terminal or a log.
const STRANGERS_TOLD: u64 = 8;

/// Longest wait before the clock is looked at.
const POLL_MAX: Duration = Duration::from_millis(100);

/// Waits at `listener` for all other ranks.
pub(crate) fn host(listener: &TcpListener, request: &JoinRequest) -> Result<Joined, RendezvousError> {
    let ip = listener.local_addr().map_err(|error| local_error("rendezvous address", &error))?.ip();
    let (ours, data) = present(request, ip).map_err(|error| local_error("data address", &error))?;
    let session = random_bytes().map_err(|error| local_error("session", &error))?;
    let setup = Setup {
        ours,
        secret: request.secret.clone(),
        session,
        deadline: request.deadline,
        handshake_deadline: HANDSHAKE_DEADLINE,
        strangers_max: STRANGERS_MAX + request.world_size,
    };
    listener.set_nonblocking(true).map_err(|error| local_error("rendezvous address", &error))?;
    let start = Instant::now();
    let mut driver = Driver {
        listener,
        state: Rendezvous::new(setup, Duration::ZERO),
        streams: BTreeMap::new(),
        next: 0,
        n_strangers: 0,
        start,
    };
    while driver.state.outcome().is_none() {
        driver.turn()?;
    }
    driver.finish(session, data)
}

struct Driver<'a> {
    listener: &'a TcpListener,
    state: Rendezvous,
    streams: BTreeMap<ConnId, TcpStream>,
    next: u64,
    n_strangers: u64,
    start: Instant,
}

impl Driver<'_> {
    fn turn(&mut self) -> Result<(), RendezvousError> {
        let (can_accept, readable) = self.wait();
        for conn in readable {
            self.read(conn);
        }
        if can_accept {
            self.accept()?;
        }
        let effects = self.state.on_tick(since(self.start));
        self.act(effects);
        Ok(())
    }

    fn wait(&self) -> (bool, Vec<ConnId>) {
        let limit = self.state.next_tick().saturating_sub(since(self.start)).min(POLL_MAX);
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut fds = vec![PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN)];
        fds.extend(
            self.streams.values().map(|stream| PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)),
        );
        if poll(&mut fds, Some(&limit)).is_err() {
            std::thread::sleep(Duration::from_millis(1));
            return (false, Vec::new());
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let conns = self.streams.keys().zip(&fds[1..]).filter(|(_, fd)| ready(fd)).map(|(&conn, _)| conn);
        (ready(&fds[0]), conns.collect())
    }

    fn accept(&mut self) -> Result<(), RendezvousError> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The peer went away again, or this process has too many files open for a moment.
                Err(_) => {
                    std::thread::sleep(Duration::from_millis(1));
                    return Ok(());
                }
            };
            if stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true)).is_err() {
                continue;
            }
            let conn = ConnId(self.next);
            self.next += 1;
            self.streams.insert(conn, stream);
            let nonce = Nonce::random().map_err(|error| local_error("handshake", &error))?;
            let effects = self.state.on_connect(conn, nonce, since(self.start));
            self.act(effects);
        }
    }

    /// Reads once: a peer that talks without end gets its turn like the others.
    fn read(&mut self, conn: ConnId) {
        let Some(stream) = self.streams.get_mut(&conn) else { return };
        let mut bytes = [0; 4096];
        let effects = match stream.read(&mut bytes) {
            Ok(n) if n > 0 => self.state.on_bytes(conn, &bytes[..n], since(self.start)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return;
            }
            Ok(_) | Err(_) => {
                self.streams.remove(&conn);
                self.state.on_close(conn)
            }
        };
        self.act(effects);
    }

    fn act(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(conn, bytes) => self.send(conn, &bytes),
                Effect::Close(conn) => drop(self.streams.remove(&conn)),
                Effect::Report(event) => self.report(&event),
            }
        }
    }

    fn report(&mut self, event: &Event) {
        match event {
            Event::Admitted(rank) => tracing::debug!(rank = rank.0, "rank admitted"),
            Event::Refused(rank, refusal) => tracing::warn!(rank = rank.0, %refusal, "rank refused"),
            Event::Left(rank) => tracing::warn!(rank = rank.0, "rank left before the others came"),
            Event::Stranger { why } => {
                self.n_strangers += 1;
                if self.n_strangers <= STRANGERS_TOLD {
                    tracing::warn!(%why, "connection closed");
                } else if self.n_strangers.is_power_of_two() {
                    tracing::warn!(n = self.n_strangers, %why, "connections closed so far, this is the last");
                } else {
                    tracing::debug!(%why, "connection closed");
                }
            }
        }
    }

    /// Frames here are small and the socket is empty; one that takes less than all of them is not a rank of ours.
    fn send(&mut self, conn: ConnId, bytes: &[u8]) {
        let Some(stream) = self.streams.get_mut(&conn) else { return };
        if !matches!(stream.write(bytes), Ok(n) if n == bytes.len()) {
            self.streams.remove(&conn);
            let effects = self.state.on_close(conn);
            self.act(effects);
        }
    }

    fn finish(mut self, session: [u8; 16], listener: TcpListener) -> Result<Joined, RendezvousError> {
        let members = match self.state.outcome() {
            Some(Ok(members)) => members.clone(),
            Some(Err(error)) => return Err(error.clone()),
            None => return Err(local_error("rendezvous", &"it ended without an outcome")),
        };
        let mut lines = Vec::new();
        for (rank, conn) in self.state.connections() {
            let gone = || local_error(&format!("{rank}"), &"it went away as the rendezvous ended");
            lines.push((
                rank,
                self.streams.remove(&conn).ok_or_else(gone)?,
                FrameDecoder::new(CONTROL_LIMIT),
            ));
        }
        lines.sort_by_key(|&(rank, ..): &(Rank, _, _)| rank);
        Ok(Joined { session, members, listener, lines })
    }
}
