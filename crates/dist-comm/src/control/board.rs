//! What a rank knows of the others: where each was last seen, when it was last heard, who is gone. Pure but for the
//! locks: the present moment comes in as an argument. `watch.rs` owns the thread that keeps it fresh.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dist_core::{DType, Rank};

use super::progress::Progress;
use crate::call::{Call, CallName};
use crate::error::{Departure, Seen};

/// A rank that has said nothing for so long is called silent. Its beats come ten times a second.
pub(crate) const SILENT_AFTER: Duration = Duration::from_secs(1);

/// How a rank is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Without a word: its process ended, or the link broke.
    Closed,
    /// With a word of its own.
    Departed(Departure),
    /// Because another rank was lost to it: it did not come, or it is gone.
    Lost { rank: Rank, is_gone: bool },
}

/// Our own place.
#[derive(Clone, Debug)]
struct Mine {
    group: String,
    call: Call,
    since: Instant,
    is_inside: bool,
    waits_for: Option<Rank>,
}

/// Another rank.
#[derive(Debug, Default)]
struct Peer {
    heard: Option<Instant>,
    /// How often it had got on when it was last heard, and when that number last grew.
    steps: u64,
    got_on: Option<Instant>,
    /// What it said last, and for each communicator what it said of that last.
    last: Option<Progress>,
    by_group: BTreeMap<String, u64>,
    gone: Option<Gone>,
}

/// A rank that another could not go on without.
#[derive(Clone, Copy, Debug)]
struct GivenUp {
    rank: Rank,
    by: Rank,
    /// Somebody has seen it go.
    is_gone: bool,
}

/// What one rank knows of all.
#[derive(Debug)]
pub(crate) struct Board {
    me: Rank,
    mine: Mutex<Option<Mine>>,
    /// How often we have got on.
    steps: AtomicU64,
    peers: Mutex<Vec<Peer>>,
    /// The rank that somebody gave up first.
    given_up: Mutex<Option<GivenUp>>,
    /// Somebody is gone: to be looked at while waiting.
    alarm: AtomicBool,
}

fn whole<T>(lock: Result<T, PoisonError<T>>) -> T {
    lock.unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    pub(crate) fn new(me: Rank, world_size: usize, now: Instant) -> Self {
        let peers = (0..world_size).map(|_| Peer { heard: Some(now), ..Peer::default() }).collect();
        Self {
            me,
            mine: Mutex::new(None),
            steps: AtomicU64::new(0),
            peers: Mutex::new(peers),
            given_up: Mutex::new(None),
            alarm: AtomicBool::new(false),
        }
    }

    fn peers(&self) -> MutexGuard<'_, Vec<Peer>> {
        whole(self.peers.lock())
    }

    /// We get on with something.
    pub(crate) fn get_on(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// How often we have, to be told.
    pub(crate) fn steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// We enter a call of a communicator.
    pub(crate) fn enter(&self, group: &str, call: &Call, now: Instant) {
        self.get_on();
        let mut mine = whole(self.mine.lock());
        match &mut *mine {
            // The usual case takes no memory.
            Some(mine) if mine.group == group => {
                (mine.call, mine.since, mine.is_inside, mine.waits_for) = (*call, now, true, None);
            }
            mine => {
                let group = group.to_owned();
                *mine = Some(Mine { group, call: *call, since: now, is_inside: true, waits_for: None });
            }
        }
    }

    /// We leave the call.
    pub(crate) fn leave(&self, now: Instant) {
        if let Some(mine) = &mut *whole(self.mine.lock()) {
            (mine.is_inside, mine.since, mine.waits_for) = (false, now, None);
        }
    }

    /// We wait for a rank, and for long.
    pub(crate) fn wait_for(&self, rank: Option<Rank>) {
        if let Some(mine) = &mut *whole(self.mine.lock()) {
            mine.waits_for = rank;
        }
    }

    /// Our place, to be told.
    pub(crate) fn progress(&self, now: Instant) -> Option<Progress> {
        let mine = whole(self.mine.lock()).clone()?;
        Some(Progress {
            group: mine.group,
            number: mine.call.number,
            op: mine.call.op.into(),
            bytes: mine.call.bytes as u64,
            name: mine.call.name.to_string(),
            since_ms: now.saturating_duration_since(mine.since).as_millis() as u64,
            is_inside: mine.is_inside,
            waits_for: mine.waits_for,
        })
    }

    /// A peer told its place, and how often it has got on.
    pub(crate) fn on_beat(&self, rank: Rank, steps: u64, progress: Option<Progress>, now: Instant) {
        let mut peers = self.peers();
        let Some(peer) = peers.get_mut(rank.0) else { return };
        peer.heard = Some(now);
        if steps != peer.steps {
            (peer.steps, peer.got_on) = (steps, Some(now));
        }
        if let Some(progress) = progress {
            match peer.by_group.get_mut(&progress.group) {
                Some(number) => *number = progress.number,
                None => {
                    peer.by_group.insert(progress.group.clone(), progress.number);
                }
            }
            peer.last = Some(progress);
        }
    }

    /// A peer is gone. The first reason stays, but a word of its own says more than a closed connection.
    pub(crate) fn on_gone(&self, rank: Rank, gone: Gone) {
        if let Gone::Lost { rank: lost, is_gone } = gone {
            let mut given_up = whole(self.given_up.lock());
            let first = given_up.get_or_insert(GivenUp { rank: lost, by: rank, is_gone });
            first.is_gone |= is_gone && first.rank == lost;
        }
        if let Some(peer) = self.peers().get_mut(rank.0) {
            peer.gone.get_or_insert(gone);
        }
        self.alarm.store(true, Ordering::Release);
    }

    /// Whether anybody is gone.
    pub(crate) fn is_alarmed(&self) -> bool {
        self.alarm.load(Ordering::Acquire)
    }

    /// The rank whose loss ends a wait for `needed`: one that went without a word or in error, wherever it is, or the
    /// needed one if it left. `None` if nobody's is known. The second value says how it went.
    pub(crate) fn loss(&self, needed: Option<Rank>) -> Option<(Rank, Departure)> {
        let peers = self.peers();
        let failed = peers.iter().enumerate().find_map(|(idx, peer)| {
            let departure = match peer.gone.as_ref()? {
                Gone::Closed => Departure::Closed,
                Gone::Departed(departure) if *departure != Departure::Left => departure.clone(),
                _ => return None,
            };
            Some((Rank(idx), departure))
        });
        // A rank that was given up by others is the cause of their leaving, so it comes first.
        if let Some(GivenUp { rank, by, is_gone }) = *whole(self.given_up.lock()) {
            let why = match peers.get(rank.0).and_then(|peer| peer.gone.as_ref()) {
                Some(Gone::Closed) => Departure::Closed,
                Some(Gone::Departed(departure)) => departure.clone(),
                // Its connection to us may close a moment later than that to another.
                _ if is_gone => Departure::Closed,
                _ => Departure::GivenUp { by },
            };
            return Some((rank, why));
        }
        failed.or_else(|| {
            let needed = needed?;
            match peers.get(needed.0)?.gone.as_ref()? {
                Gone::Departed(departure) => Some((needed, departure.clone())),
                Gone::Closed | Gone::Lost { .. } => Some((needed, Departure::Closed)),
            }
        })
    }

    /// Where a rank was last seen.
    pub(crate) fn seen(&self, rank: Rank, now: Instant) -> Option<Seen> {
        if rank == self.me {
            let mine = whole(self.mine.lock()).clone()?;
            return Some(Seen { call: mine.call, ago: now.saturating_duration_since(mine.since) });
        }
        let peers = self.peers();
        let peer = peers.get(rank.0)?;
        let (progress, heard) = (peer.last.as_ref()?, peer.heard?);
        let since = Duration::from_millis(progress.since_ms);
        let (bytes, number) = (progress.bytes as usize, progress.number);
        let op = progress.op.into();
        let call = Call { number, op, bytes, dtype: DType::U8, name: CallName::new("") };
        Some(Seen { call, ago: since + now.saturating_duration_since(heard) })
    }

    /// Whether a rank has entered call `number` of a communicator, as far as it has told.
    pub(crate) fn has_entered(&self, rank: Rank, group: &str, number: u64) -> bool {
        let peers = self.peers();
        peers.get(rank.0).and_then(|peer| peer.by_group.get(group)).is_some_and(|&seen| seen >= number)
    }

    /// How long it is since a rank last got on with something, as far as it has told.
    pub(crate) fn standstill(&self, rank: Rank, now: Instant) -> Option<Duration> {
        let got_on = self.peers().get(rank.0).and_then(|peer| peer.got_on)?;
        Some(now.saturating_duration_since(got_on))
    }

    /// The rank that has said nothing for longest, of those that have not gone.
    pub(crate) fn longest_silence(&self, now: Instant) -> Option<(Rank, Duration)> {
        let peers = self.peers();
        let there = peers.iter().enumerate().filter(|&(idx, peer)| idx != self.me.0 && peer.gone.is_none());
        let silence =
            |peer: &Peer| peer.heard.map_or(Duration::ZERO, |heard| now.saturating_duration_since(heard));
        there.map(|(idx, peer)| (Rank(idx), silence(peer))).max_by_key(|&(_, silence)| silence)
    }

    /// How long a rank has said nothing.
    pub(crate) fn silence(&self, rank: Rank, now: Instant) -> Duration {
        let heard = self.peers().get(rank.0).and_then(|peer| peer.heard);
        heard.map_or(Duration::ZERO, |heard| now.saturating_duration_since(heard))
    }

    /// The rank at the end of the chain: whom `rank` waits for, whom that one waits for, and so on.
    pub(crate) fn root_of_wait(&self, rank: Rank, now: Instant) -> Rank {
        let peers = self.peers();
        let next = |rank: Rank| {
            let peer = peers.get(rank.0)?;
            let is_silent = peer.heard.is_none_or(|at| now.saturating_duration_since(at) >= SILENT_AFTER);
            let last = peer.last.as_ref()?;
            last.waits_for.filter(|_| !is_silent && last.is_inside)
        };
        let mut at = rank;
        for _ in 0..peers.len() {
            match next(at) {
                // A chain that comes back to us is our own wait seen from behind.
                Some(next) if next != self.me && next != at => at = next,
                _ => break,
            }
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Op;

    fn call(number: u64) -> Call {
        let name = CallName::new("attention output").layer(11).step(73);
        Call { number, op: Op::AllReduce, bytes: 4, dtype: DType::F32, name }
    }

    fn told(number: u64, waits_for: Option<Rank>, now: Instant) -> Option<Progress> {
        let board = Board::new(Rank(9), 1, now);
        board.enter("tp", &call(number), now);
        board.wait_for(waits_for);
        board.progress(now)
    }

    #[test]
    fn a_silent_rank_was_last_seen_where_it_said() {
        let start = Instant::now();
        let board = Board::new(Rank(0), 3, start);
        assert!(board.seen(Rank(2), start).is_none());
        board.on_beat(Rank(2), 1, told(5119, None, start), start);
        let seen = board.seen(Rank(2), start + Duration::from_millis(4200)).unwrap();
        assert_eq!((seen.call.number, seen.ago), (5119, Duration::from_millis(4200)));
        assert!(board.has_entered(Rank(2), "tp", 5119) && !board.has_entered(Rank(2), "tp", 5120));
        assert!(!board.has_entered(Rank(2), "pp", 1));
    }

    #[test]
    fn a_rank_that_gets_on_is_no_standstill() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let board = Board::new(Rank(0), 2, start);
        assert_eq!(board.standstill(Rank(1), start), None);
        board.on_beat(Rank(1), 5, None, after(100));
        board.on_beat(Rank(1), 5, None, after(200));
        assert_eq!(board.standstill(Rank(1), after(300)), Some(Duration::from_millis(200)));
        board.on_beat(Rank(1), 6, None, after(400));
        assert_eq!(board.standstill(Rank(1), after(450)), Some(Duration::from_millis(50)));
    }

    #[test]
    fn the_chain_of_waits_is_followed_to_its_end() {
        let start = Instant::now();
        let board = Board::new(Rank(0), 4, start);
        board.on_beat(Rank(1), 1, told(1, Some(Rank(2)), start), start);
        board.on_beat(Rank(2), 1, told(1, Some(Rank(3)), start), start);
        assert_eq!(board.root_of_wait(Rank(1), start), Rank(3));
        // Two that wait for each other do not trap us.
        board.on_beat(Rank(3), 1, told(1, Some(Rank(1)), start), start);
        board.root_of_wait(Rank(1), start);
        // A silent rank's word is old: it is the end.
        assert_eq!(board.root_of_wait(Rank(1), start + SILENT_AFTER), Rank(1));
    }

    #[test]
    fn those_who_leave_because_of_another_are_not_the_cause() {
        let start = Instant::now();
        let board = Board::new(Rank(0), 4, start);
        assert_eq!(board.loss(Some(Rank(1))), None);
        board.on_gone(Rank(3), Gone::Departed(Departure::Left));
        assert_eq!(board.loss(Some(Rank(1))), None, "nobody needs rank 3");
        assert_eq!(board.loss(Some(Rank(3))), Some((Rank(3), Departure::Left)));
        board.on_gone(Rank(1), Gone::Lost { rank: Rank(2), is_gone: false });
        board.on_gone(Rank(1), Gone::Closed);
        assert_eq!(board.loss(Some(Rank(1))), Some((Rank(2), Departure::GivenUp { by: Rank(1) })));
        board.on_gone(Rank(2), Gone::Closed);
        assert_eq!(board.loss(None), Some((Rank(2), Departure::Closed)));
    }

    #[test]
    fn who_sees_a_rank_go_tells_those_who_do_not_yet() {
        let board = Board::new(Rank(0), 4, Instant::now());
        board.on_gone(Rank(1), Gone::Lost { rank: Rank(3), is_gone: false });
        assert_eq!(board.loss(None), Some((Rank(3), Departure::GivenUp { by: Rank(1) })));
        board.on_gone(Rank(2), Gone::Lost { rank: Rank(3), is_gone: true });
        assert_eq!(board.loss(None), Some((Rank(3), Departure::Closed)));
    }
}
