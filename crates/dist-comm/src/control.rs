//! The channel between rank 0 and every other rank: commands as opaque bytes, in order. The watchdog beside it
//! (`control/watch.rs`) says whether the other end is alive, so that an idle rank may wait for as long as it takes.

pub(crate) mod board;
mod progress;
pub(crate) mod watch;

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dist_core::Rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::codec::{CONTROL_LIMIT, FrameDecoder, FrameError, frame};
use crate::deadline::Deadline;
use crate::error::{Departure, Seen};
use watch::Watch;

/// Longest wait for a socket before the watchdog's news are looked at.
const POLL_MAX: Duration = Duration::from_millis(20);

/// How long what a lost rank sent before may still be on its way.
const GRACE: Duration = Duration::from_millis(100);

/// How long to wait for a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It is due.
    Within(Duration),
    /// There may be nothing to do for hours: wait until the other end has been silent for so long.
    UntilSilentFor(Duration),
}

/// What can go wrong on the control channel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A rank is gone; it need not be the one at the other end.
    #[error("{rank} is lost: {why}{}", last_seen(.last.as_deref()))]
    RankLost {
        /// Which one.
        rank: Rank,
        /// How it went.
        why: Departure,
        /// Where it was last seen.
        last: Option<Box<Seen>>,
    },
    /// The other end is there but does not do its part.
    #[error("no command passed between us and {rank} for {:.1} s{}", waited.as_secs_f64(), last_seen(.last.as_deref()))]
    Timeout {
        /// The other end.
        rank: Rank,
        /// How long was waited.
        waited: Duration,
        /// Where it was last seen.
        last: Option<Box<Seen>>,
    },
    /// Our own message, or what the other end sent.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// There is no such channel: they lead from rank 0 to the others.
    #[error("no control channel leads to {0}")]
    NoChannel(Rank),
}

fn last_seen(last: Option<&Seen>) -> String {
    last.map_or_else(String::new, |seen| {
        let (op, number) = (seen.call.op, seen.call.number);
        format!("; it was last seen in {op} #{number} {:.1} s ago", seen.ago.as_secs_f64())
    })
}

/// A rank's end, or for rank 0 all ends, of the control channels.
#[derive(Debug)]
pub struct Control {
    lines: Vec<Line>,
    watch: Arc<Watch>,
}

#[derive(Debug)]
struct Line {
    rank: Rank,
    stream: TcpStream,
    decoder: FrameDecoder,
}

impl Control {
    pub(crate) fn new(lines: Vec<(Rank, TcpStream, FrameDecoder)>, watch: Arc<Watch>) -> io::Result<Self> {
        let mut own = Vec::new();
        for (rank, stream, mut decoder) in lines {
            stream.set_nonblocking(true)?;
            decoder.set_limit(CONTROL_LIMIT);
            own.push(Line { rank, stream, decoder });
        }
        Ok(Self { lines: own, watch })
    }

    /// Sends a command to every rank at the other ends, all within `limit`.
    pub fn broadcast(&mut self, command: &[u8], limit: Duration) -> Result<(), ControlError> {
        let frame = frame(command, CONTROL_LIMIT)?;
        let deadline = Deadline::after(limit);
        for line in &mut self.lines {
            line.send(&frame, &deadline, &self.watch)?;
        }
        Ok(())
    }

    /// Sends a command to one rank within `limit`.
    pub fn send(&mut self, to: Rank, command: &[u8], limit: Duration) -> Result<(), ControlError> {
        let frame = frame(command, CONTROL_LIMIT)?;
        let line = self.lines.iter_mut().find(|line| line.rank == to).ok_or(ControlError::NoChannel(to))?;
        line.send(&frame, &Deadline::after(limit), &self.watch)
    }

    /// The next command from a rank.
    pub fn recv(&mut self, from: Rank, wait: Wait) -> Result<Vec<u8>, ControlError> {
        let line = self.lines.iter_mut().find(|line| line.rank == from);
        line.ok_or(ControlError::NoChannel(from))?.recv(wait, &self.watch)
    }
}

impl Watch {
    /// An error if a rank is gone, or has been silent for `limit`.
    pub(crate) fn look(&self, limit: Duration) -> Result<(), ControlError> {
        let (board, now) = (self.board(), Instant::now());
        let seen = |rank| board.seen(rank, now).map(Box::new);
        if board.is_alarmed()
            && let Some((rank, why)) = board.loss(None)
        {
            return Err(ControlError::RankLost { rank, why, last: seen(rank) });
        }
        match board.longest_silence(now) {
            Some((rank, waited)) if waited >= limit => {
                self.tell_lost(rank);
                Err(ControlError::Timeout { rank, waited, last: seen(rank) })
            }
            _ => Ok(()),
        }
    }
}

impl Line {
    fn send(&mut self, mut bytes: &[u8], deadline: &Deadline, watch: &Watch) -> Result<(), ControlError> {
        let mut lost_since = None;
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(error) if is_for_now(&error) => {
                    self.look(false, &mut lost_since, watch)?;
                    if deadline.is_over() {
                        return Err(self.timeout(deadline.waited(), watch));
                    }
                    self.poll(PollFlags::OUT);
                }
                Err(_) => self.look(true, &mut lost_since, watch)?,
            }
        }
        Ok(())
    }

    fn recv(&mut self, wait: Wait, watch: &Watch) -> Result<Vec<u8>, ControlError> {
        let started = Instant::now();
        let mut lost_since = None;
        let mut bytes = [0; 16 << 10];
        loop {
            if let Some(payload) = self.decoder.next_frame()? {
                return Ok(payload.to_vec());
            }
            match self.stream.read(&mut bytes) {
                Ok(n) if n > 0 => {
                    self.decoder.feed(&bytes[..n]);
                    continue;
                }
                Err(error) if is_for_now(&error) => self.look(false, &mut lost_since, watch)?,
                Ok(_) | Err(_) => self.look(true, &mut lost_since, watch)?,
            }
            let silence = watch.board().silence(self.rank, Instant::now());
            let (waited, limit) = match wait {
                Wait::Within(limit) => (started.elapsed(), limit),
                Wait::UntilSilentFor(limit) => (silence, limit),
            };
            if waited >= limit {
                if matches!(wait, Wait::UntilSilentFor(_)) {
                    watch.tell_lost(self.rank);
                }
                return Err(self.timeout(waited, watch));
            }
            self.poll(PollFlags::IN);
        }
    }

    /// Whether somebody is lost, after a moment in which the reason may still come.
    fn look(
        &self,
        is_closed: bool,
        lost_since: &mut Option<Instant>,
        watch: &Watch,
    ) -> Result<(), ControlError> {
        let board = watch.board();
        if !is_closed && !board.is_alarmed() {
            return Ok(());
        }
        let loss = board.loss(Some(self.rank));
        if loss.is_none() && !is_closed {
            return Ok(());
        }
        if lost_since.get_or_insert_with(Instant::now).elapsed() < GRACE {
            std::thread::sleep(Duration::from_millis(1));
            return Ok(());
        }
        let (rank, why) = loss.unwrap_or((self.rank, Departure::Closed));
        watch.tell_loss(rank, &why);
        let last = board.seen(rank, Instant::now()).map(Box::new);
        Err(ControlError::RankLost { rank, why, last })
    }

    fn timeout(&self, waited: Duration, watch: &Watch) -> ControlError {
        let last = watch.board().seen(self.rank, Instant::now()).map(Box::new);
        ControlError::Timeout { rank: self.rank, waited, last }
    }

    fn poll(&self, events: PollFlags) {
        let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), events)];
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(POLL_MAX.subsec_nanos()) };
        if poll(&mut fds, Some(&limit)).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn is_for_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
