//! What lies between ranks, for `doctor`: round trip, bandwidth both ways and clock offset of each pair. All ranks take
//! part; pairs go one after another, so that none disturbs another.

use std::time::{Duration, Instant, SystemTime};

use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};
use serde::{Deserialize, Serialize};

use crate::codec::{FrameError, from_bytes, to_bytes};
use crate::rendezvous::RendezvousError;
use crate::{CallName, Comm, CommError, ControlError, GroupOptions, Wait, World};

/// Questions and answers by which a pair's round trip is known.
const ROUNDS: u64 = 101;

/// Bytes of the first and of the largest burst. Bursts grow until one takes long enough to be measured.
const BURSTS: [usize; 2] = [1 << 20, 64 << 20];

/// What is long enough, at least.
const BURST_TIME: Duration = Duration::from_millis(50);

/// What lies between two ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairReport {
    /// The lower rank, which asked.
    pub from: Rank,
    /// The higher one, which answered.
    pub to: Rank,
    /// Whether their bytes go over shared memory, rather than TCP.
    pub shares_memory: bool,
    /// Median time of a question of 8 bytes with its answer.
    pub round_trip: Duration,
    /// Bytes a second from `from` to `to`.
    pub bytes_per_s_there: f64,
    /// Bytes a second from `to` to `from`.
    pub bytes_per_s_back: f64,
    /// The clock of `to` minus that of `from`.
    pub clock_offset_ns: i64,
    /// How far the offset may be wrong: half of the shortest round trip.
    pub clock_error_ns: u64,
}

/// Why there is no report.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// The ranks could not be connected.
    #[error(transparent)]
    Connect(#[from] RendezvousError),
    /// A rank was lost.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A rank was lost as it told rank 0 what it had found.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// What it told makes no sense.
    #[error("a rank's report of its pairs: {0}")]
    Report(#[from] FrameError),
}

/// Measures every pair; all ranks of the world call this at the same place. Rank 0 gets the reports in order of
/// `(from, to)`, the others get none. No single wait is longer than `limit`.
pub fn probe(world: &mut World, limit: Duration) -> Result<Option<Vec<PairReport>>, ProbeError> {
    probe_by(world, limit, SystemTime::now)
}

/// Like [`probe`], by another clock of this rank than the system's.
pub fn probe_by(
    world: &mut World,
    limit: Duration,
    now: impl Fn() -> SystemTime,
) -> Result<Option<Vec<PairReport>>, ProbeError> {
    let me = world.rank();
    let ranks: Vec<_> = (0..world.members().len()).map(Rank).collect();
    let Some(tcp) = world.connect("probe", &ranks, GroupOptions::collectives(limit))? else {
        return Ok(None);
    };
    let shares_memory: Vec<_> = ranks.iter().map(|&rank| tcp.shares_memory_with(rank)).collect();
    let mut comm = Comm::from(tcp);
    let mut reports = Vec::new();
    for from in 0..ranks.len() {
        for to in from + 1..ranks.len() {
            let (from, to) = (Rank(from), Rank(to));
            if me == from {
                let link = Link { comm: &mut comm, peer: to };
                reports.push(ask(link, from, shares_memory[to.0], &now)?);
            } else if me == to {
                answer(Link { comm: &mut comm, peer: from }, &now)?;
            }
            comm.barrier(CallName::new("the next pair"))?;
        }
    }
    if me != Rank(0) {
        world.control().send(Rank(0), &to_bytes(&reports)?, limit)?;
        return Ok(None);
    }
    for &rank in &ranks[1..] {
        let found = world.control().recv(rank, Wait::Within(limit))?;
        reports.extend(from_bytes::<Vec<PairReport>>(&found)?);
    }
    Ok(Some(reports))
}

/// One side of a pair.
struct Link<'a> {
    comm: &'a mut Comm,
    peer: Rank,
}

impl Link<'_> {
    fn send(&mut self, bytes: &mut [u8], what: &'static str) -> Result<(), CommError> {
        self.comm.send(RawBuf::Host { bytes, dtype: DType::U8 }, self.peer, CallName::new(what))
    }

    fn recv(&mut self, bytes: &mut [u8], what: &'static str) -> Result<(), CommError> {
        self.comm.recv(RawBuf::Host { bytes, dtype: DType::U8 }, self.peer, CallName::new(what))
    }

    fn send_word(&mut self, word: u64, what: &'static str) -> Result<(), CommError> {
        self.send(&mut word.to_le_bytes(), what)
    }

    fn recv_word(&mut self, what: &'static str) -> Result<u64, CommError> {
        let mut word = [0; 8];
        self.recv(&mut word, what)?;
        Ok(u64::from_le_bytes(word))
    }
}

/// The lower rank's side.
fn ask(
    mut link: Link<'_>,
    from: Rank,
    shares_memory: bool,
    now: &impl Fn() -> SystemTime,
) -> Result<PairReport, CommError> {
    let mut samples = Vec::new();
    for round in 0..ROUNDS {
        let (start, asked) = (Instant::now(), nanos(now()));
        link.send_word(round, "round trip")?;
        let mut times = [0; 16];
        link.recv(&mut times, "round trip")?;
        let (took, heard) = (start.elapsed(), nanos(now()));
        let [received, replied] = [0, 8].map(|at| {
            let mut word = [0; 8];
            word.copy_from_slice(&times[at..at + 8]);
            i64::from_le_bytes(word)
        });
        samples.push((took, offset([asked, received, replied, heard])));
    }
    // The shortest sample was disturbed least, so its clocks say most; the median is what a user of the link sees.
    samples.sort_unstable();
    let ((shortest, clock_offset_ns), (round_trip, _)) = (samples[0], samples[samples.len() / 2]);
    let bytes_per_s_there = burst(&mut link, round_trip)?;
    link.send_word(0, "burst")?;
    sink(&mut link)?;
    let bytes_per_s_back = f64::from_bits(link.recv_word("bandwidth")?);
    Ok(PairReport {
        from,
        to: link.peer,
        shares_memory,
        round_trip,
        bytes_per_s_there,
        bytes_per_s_back,
        clock_offset_ns,
        clock_error_ns: shortest.as_nanos() as u64 / 2,
    })
}

/// The higher rank's side.
fn answer(mut link: Link<'_>, now: &impl Fn() -> SystemTime) -> Result<(), CommError> {
    let start = Instant::now();
    for _ in 0..ROUNDS {
        link.recv_word("round trip")?;
        let received = nanos(now()).to_le_bytes();
        let replied = nanos(now()).to_le_bytes();
        link.send(&mut [received, replied].concat(), "round trip")?;
    }
    // Of the same size as the median; it only says when a burst is long enough.
    let round_trip = start.elapsed() / ROUNDS as u32;
    sink(&mut link)?;
    let rate = burst(&mut link, round_trip)?;
    link.send_word(0, "burst")?;
    link.send_word(rate.to_bits(), "bandwidth")
}

/// Sends bursts until one is long enough; bytes a second of that one.
fn burst(link: &mut Link<'_>, round_trip: Duration) -> Result<f64, CommError> {
    let mut len = BURSTS[0];
    let enough = BURST_TIME.max(4 * round_trip);
    loop {
        link.send_word(len as u64, "burst")?;
        let mut bytes = vec![1; len];
        let start = Instant::now();
        link.send(&mut bytes, "burst")?;
        link.recv_word("burst taken")?;
        let took = start.elapsed();
        if took >= enough || len >= BURSTS[1] {
            // The word that all was taken came a round trip after the last byte went out.
            return Ok(len as f64 / took.saturating_sub(round_trip).max(took / 4).as_secs_f64());
        }
        len *= 4;
    }
}

/// Takes bursts until the peer has enough.
fn sink(link: &mut Link<'_>) -> Result<(), CommError> {
    loop {
        let len = link.recv_word("burst")? as usize;
        if len == 0 {
            return Ok(());
        }
        // A peer that asks for more than any burst has come apart from us; its next call will say so.
        let mut bytes = vec![0; len.min(BURSTS[1])];
        link.recv(&mut bytes, "burst")?;
        link.send_word(len as u64, "burst taken")?;
    }
}

/// How far the clock of the one who answered is ahead, by the four times of a question: asked and heard by our clock,
/// received and replied by theirs. Exact where both ways take equally long, and never wrong by more than half of the
/// round trip.
fn offset([asked, received, replied, heard]: [i64; 4]) -> i64 {
    // Half of each difference first: clocks may be decades apart.
    (received - asked) / 2 + (replied - heard) / 2
}

fn nanos(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanos| -nanos),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_is_exact_where_both_ways_take_equally_long() {
        // Asked at 1000; 300 there, 50 to answer, 300 back; their clock is 7 ahead, then 7 behind.
        assert_eq!(offset([1000, 1307, 1357, 1650]), 7);
        assert_eq!(offset([1000, 1293, 1343, 1650]), -7);
    }

    #[test]
    fn an_uneven_way_is_wrong_by_no_more_than_half_of_the_round_trip() {
        // All 600 of the way lie before the answer.
        assert_eq!(offset([1000, 1600, 1600, 1600]), 300);
    }

    #[test]
    fn times_before_1970_are_negative() {
        let before = SystemTime::UNIX_EPOCH - Duration::from_nanos(5);
        assert_eq!(nanos(before), -5);
    }
}
