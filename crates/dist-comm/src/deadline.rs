//! How long to wait and how: a moment after which waiting ends, and pauses that begin short and grow, because ranks
//! share cores.

use std::time::{Duration, Instant};

/// A moment after which waiting ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    started: Instant,
    limit: Duration,
}

impl Deadline {
    /// From now on.
    pub(crate) fn after(limit: Duration) -> Self {
        Self { started: Instant::now(), limit }
    }

    /// How long has been waited.
    pub(crate) fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    /// How long may still be waited; zero when it is over.
    pub(crate) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.waited())
    }

    /// Whether it is over.
    pub(crate) fn is_over(&self) -> bool {
        self.left().is_zero()
    }
}

/// Rounds of spinning before the core is offered to others, a few µs. Where nobody else wants the core, offering it
/// costs less than a µs, so that there is nothing to gain from more; where the peer wants it, everything.
const SPIN_ROUNDS: u32 = 8;

/// Rounds of offering the core before sleep; about a millisecond where nobody takes it.
const YIELD_ROUNDS: u32 = 2_000;

/// The shortest and the longest sleep.
const SLEEPS: [Duration; 2] = [Duration::from_micros(50), Duration::from_micros(500)];

/// How a thread waits for memory that another process writes.
#[derive(Debug)]
pub(crate) struct Patience {
    round: u32,
    spin_rounds: u32,
}

impl Patience {
    /// Waiting of one of `n_waiting` ranks; where they are more than the cores, spinning would only take time from the
    /// one that is waited for.
    pub(crate) fn among(n_waiting: usize, n_cores: usize) -> Self {
        Self { round: 0, spin_rounds: if n_waiting > n_cores { 0 } else { SPIN_ROUNDS } }
    }

    /// Pauses; longer each time.
    pub(crate) fn pause(&mut self) {
        self.round = self.round.saturating_add(1);
        if self.round <= self.spin_rounds {
            for _ in 0..32 {
                std::hint::spin_loop();
            }
        } else if self.round <= self.spin_rounds + YIELD_ROUNDS {
            std::thread::yield_now();
        } else {
            let growth = (self.round - self.spin_rounds - YIELD_ROUNDS) / 16;
            std::thread::sleep((SLEEPS[0] * (1 + growth)).min(SLEEPS[1]));
        }
    }

    /// Whether clocks and flags are to be looked at in this round: not in each of the first ones.
    pub(crate) const fn is_time_to_look(&self) -> bool {
        self.round > self.spin_rounds + YIELD_ROUNDS || self.round % 32 == 31
    }
}

/// Cores that this process may use.
pub(crate) fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
