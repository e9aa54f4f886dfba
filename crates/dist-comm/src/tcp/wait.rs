//! All waiting of a communicator between processes, and who is to blame when it was in vain.

use std::io;
use std::time::{Duration, Instant};

use dist_core::Rank;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Tcp;
use super::link::Link;
use super::packet::Label;
use crate::call::{Call, CallName, Op};
use crate::control::board::{Board, SILENT_AFTER};
use crate::deadline::{Deadline, Patience};
use crate::error::{CommError, Departure, Missing, Seen};

/// How long what a lost rank sent before may still be on its way, and how long the word why it went.
const GRACE: Duration = Duration::from_millis(100);

/// How much longer than its deadline a call waits for the word of a rank that is there: it may be giving up for a reason
/// that it knows best, and at the same moment.
const LAST_WORD: Duration = Duration::from_millis(250);

/// A wait of so long is told to the others, with the rank that is waited for.
const LONG: Duration = Duration::from_millis(50);

/// Longest wait for a socket before flags and clocks are looked at again.
const POLL_MAX: Duration = Duration::from_millis(5);

/// A rank that gets on with something else is waited for, but not for ever: for at most so many deadlines.
const DEADLINES_MAX: u32 = 60;

/// What a step of waiting found.
enum Step {
    Done,
    Wait,
}

impl Tcp {
    /// Sends a packet, waiting while there is no room.
    pub(super) fn push(
        &mut self,
        call: &Call,
        peer: usize,
        label: Label,
        payload: &[u8],
    ) -> Result<(), CommError> {
        let label = label.to_bytes();
        self.until(call, peer, PollFlags::OUT, |tcp| {
            let Some(link) = &mut tcp.links[peer] else { return Ok(Step::Done) };
            if link.try_push(&label, payload)? {
                return Ok(Step::Done);
            }
            // The peer may itself wait for room towards us.
            for link in tcp.links.iter_mut().flatten() {
                link.drain()?;
            }
            Ok(Step::Wait)
        })
    }

    /// Waits for a packet of `len` bytes and checks that it is the one that belongs here.
    pub(super) fn arrive(
        &mut self,
        call: &Call,
        peer: usize,
        label: Label,
        len: usize,
    ) -> Result<(), CommError> {
        self.until(call, peer, PollFlags::IN, |tcp| {
            let Some(link) = &mut tcp.links[peer] else { return Ok(Step::Done) };
            Ok(if link.is_ready()? { Step::Done } else { Step::Wait })
        })?;
        let found = self.links[peer].as_ref().and_then(|link| link.front());
        let Some((found, payload)) = found else { return Ok(()) };
        match Label::from_bytes(found) {
            Some(found) if found == label && payload.len() == len => Ok(()),
            found => Err(self.mismatch(call, peer, found.unwrap_or(label))),
        }
    }

    /// Waits until everything that was pushed is with the system.
    pub(super) fn flush_all(&mut self, call: &Call) -> Result<(), CommError> {
        for peer in self.others() {
            self.until(call, peer, PollFlags::OUT, |tcp| {
                let Some(link) = &mut tcp.links[peer] else { return Ok(Step::Done) };
                Ok(if link.flush()? { Step::Done } else { Step::Wait })
            })?;
        }
        Ok(())
    }

    /// Tries a step until it is done, the deadline has passed or somebody is lost.
    fn until(
        &mut self,
        call: &Call,
        peer: usize,
        events: PollFlags,
        mut step: impl FnMut(&mut Self) -> io::Result<Step>,
    ) -> Result<(), CommError> {
        if let Ok(Step::Done) = step(self) {
            return Ok(());
        }
        let deadline = Deadline::after(self.deadline);
        let mut patience = Patience::among(self.world_size(), self.n_cores);
        let mut lost_since: Option<Instant> = None;
        loop {
            let broken = match step(self) {
                Ok(Step::Done) => {
                    if deadline.waited() >= LONG {
                        self.watch.board().wait_for(None);
                    }
                    return Ok(());
                }
                Ok(Step::Wait) => None,
                Err(error) => Some(error),
            };
            if broken.is_none() && !patience.is_time_to_look() {
                patience.pause();
                continue;
            }
            let board = self.watch.board();
            let is_lost =
                broken.is_some() || board.is_alarmed() && board.loss(Some(self.members[peer])).is_some();
            if is_lost {
                let since = *lost_since.get_or_insert_with(Instant::now);
                // The word why may be behind the closed connection, and data before it.
                if since.elapsed() >= GRACE {
                    return Err(self.broken(call, peer, deadline.waited(), broken));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            if deadline.waited() >= LONG {
                board.wait_for(Some(self.members[peer]));
            }
            if deadline.is_over() && !self.is_getting_on(peer, deadline.waited()) {
                return Err(self.timeout(call, peer, deadline.waited()));
            }
            self.rest(peer, events, &mut patience);
        }
    }

    /// Whether the rank for which the peer waits, or the peer itself, has done something within the deadline, or may
    /// still say why not.
    fn is_getting_on(&self, peer: usize, waited: Duration) -> bool {
        let (board, now) = (self.watch.board(), Instant::now());
        let rank = board.root_of_wait(self.members[peer], now);
        let is_silent = board.silence(rank, now) >= SILENT_AFTER;
        let stood = board.standstill(rank, now).unwrap_or(waited);
        let has_time = stood < self.deadline && waited < self.deadline.saturating_mul(DEADLINES_MAX);
        !is_silent && (has_time || waited < self.deadline.saturating_add(LAST_WORD))
    }

    /// Waits for a socket, or a little.
    fn rest(&self, peer: usize, events: PollFlags, patience: &mut Patience) {
        if self.links[peer].as_ref().and_then(Link::fd).is_none() {
            return patience.pause();
        }
        let mut fds = Vec::new();
        for (idx, link) in self.links.iter().enumerate() {
            if let Some(fd) = link.as_ref().and_then(Link::fd) {
                let events = if idx == peer { events | PollFlags::IN } else { PollFlags::IN };
                let wanted = events.contains(PollFlags::OUT) || idx == peer;
                if wanted {
                    fds.push(PollFd::from_borrowed_fd(fd, events));
                }
            }
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(POLL_MAX.subsec_nanos()) };
        if poll(&mut fds, Some(&limit)).is_err() {
            patience.pause();
        }
    }

    /// Nobody came in time: who did not, and where each was last seen.
    fn timeout(&self, call: &Call, peer: usize, waited: Duration) -> CommError {
        let (board, now) = (self.watch.board(), Instant::now());
        let mut absent = vec![self.members[peer]];
        if is_of_all(call.op) {
            let others = self.others().into_iter().map(|idx| self.members[idx]);
            let entered = |rank: &Rank| board.has_entered(*rank, &self.group, call.number);
            let late: Vec<_> = others.filter(|rank| !entered(rank)).collect();
            // Everybody has entered: the one that we wait for got stuck inside.
            if !late.is_empty() {
                absent = late;
            }
        }
        let named = culprits(board, absent, now).into_iter();
        let missing = named.map(|rank| Missing { rank, last: self.seen(rank, now) }).collect();
        CommError::Timeout { call: Box::new(self.named(*call)), missing, waited }
    }

    /// Somebody is gone: whoever the watchdog knows of, else the peer whose connection broke.
    fn broken(&self, call: &Call, peer: usize, waited: Duration, cause: Option<io::Error>) -> CommError {
        let known = self.watch.board().loss(Some(self.members[peer]));
        let loss = known.unwrap_or_else(|| {
            // Errors of our own making are about bytes that make no sense.
            let malformed = cause.filter(|error| error.get_ref().is_some());
            let why = malformed.map_or(Departure::Closed, |error| Departure::Failed(error.to_string()));
            (self.members[peer], why)
        });
        self.lost(call, loss, waited)
    }

    pub(super) fn lost(&self, call: &Call, (rank, why): (Rank, Departure), waited: Duration) -> CommError {
        let last = self.seen(rank, Instant::now());
        let call = Box::new(self.named(*call));
        if matches!(why, Departure::GivenUp { .. }) {
            // It is there but did not come: the same sentence as from the rank that waited longest.
            return CommError::Timeout { call, missing: vec![Missing { rank, last }], waited };
        }
        CommError::RankLost { rank, call, last: last.map(Box::new), why }
    }

    /// Where a rank was last seen: what it told, or the last call in which we met it, whichever is later.
    fn seen(&self, rank: Rank, now: Instant) -> Option<Seen> {
        let told = self.watch.board().seen(rank, now);
        let met = self.met.filter(|_| self.members.contains(&rank));
        let met =
            met.map(|(call, at)| Seen { call: self.named(call), ago: now.saturating_duration_since(at) });
        match (told, met) {
            (Some(told), Some(met)) => Some(if told.ago <= met.ago { told } else { met }),
            (told, met) => told.or(met),
        }
    }

    fn mismatch(&self, ours: &Call, peer: usize, theirs: Label) -> CommError {
        let (me, rank) = (self.members[self.me], self.members[peer]);
        let name = CallName::new("another name, or another piece");
        CommError::Mismatch {
            our_rank: me,
            ours: Box::new(self.named(*ours)),
            their_rank: rank,
            theirs: Box::new(self.named(theirs.call(Rank(self.me), name))),
        }
    }
}

/// Whom to name of those who did not come: the silent ones, else the ends of the chains of waits.
fn culprits(board: &Board, absent: Vec<Rank>, now: Instant) -> Vec<Rank> {
    let is_silent = |rank: &Rank| board.silence(*rank, now) >= SILENT_AFTER;
    let mut ranks: Vec<_> = absent.iter().copied().filter(is_silent).collect();
    if ranks.is_empty() {
        ranks = absent.into_iter().map(|rank| board.root_of_wait(rank, now)).collect();
    }
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

/// Whether a call waits for all members.
const fn is_of_all(op: Op) -> bool {
    matches!(op, Op::AllReduce | Op::AllGather | Op::Barrier)
}
