//! How a producer writes large payloads: through the caches or past them. Between cores that share a cache, through it
//! is twice as fast; between others each line has to be taken back from the reader, and it is four times as slow. Which
//! cores we are on may change at any time, so a producer goes by how long its own copies take.

/// One in so many copies goes the other way, to see whether that has become better.
const TRY_EVERY: u32 = 64;

/// Copies past the caches leave the reader to fetch from memory, so they have to be so much faster.
const PAST_WORTH: f32 = 2.0;

/// A way to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Ordinary stores.
    Through,
    /// Stores that do not fetch the lines that they overwrite.
    Past,
}

impl Way {
    const fn other(self) -> Self {
        match self {
            Self::Through => Self::Past,
            Self::Past => Self::Through,
        }
    }
}

/// What copies of late have cost, in ns a KiB, by way.
#[derive(Debug, Default)]
pub(super) struct Pace {
    costs: [Option<f32>; 2],
    n_copies: u32,
}

impl Pace {
    /// The way of the next copy.
    pub(super) fn choose(&mut self) -> Way {
        self.n_copies = self.n_copies.wrapping_add(1);
        match self.costs {
            [None, _] => Way::Through,
            [_, None] => Way::Past,
            [Some(through), Some(past)] => {
                let better = if through > PAST_WORTH * past { Way::Past } else { Way::Through };
                if self.n_copies.is_multiple_of(TRY_EVERY) { better.other() } else { better }
            }
        }
    }

    /// A copy of `len` bytes took so long.
    pub(super) fn took(&mut self, way: Way, len: usize, ns: f32) {
        let cost = ns * 1024.0 / len.max(1) as f32;
        let known = &mut self.costs[way as usize];
        // A copy during which another thread had the core says little.
        *known = Some(known.map_or(cost, |known| known + (cost.min(4.0 * known) - known) / 4.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `n` copies go past the caches, where the ways cost so much.
    fn past_of(pace: &mut Pace, n: usize, through_ns: f32, past_ns: f32) -> usize {
        let copy = |pace: &mut Pace| {
            let way = pace.choose();
            pace.took(way, 64 << 10, if way == Way::Through { through_ns } else { past_ns });
            way
        };
        (0..n).filter(|_| copy(pace) == Way::Past).count()
    }

    #[test]
    fn the_better_way_is_taken_but_for_a_try_now_and_then() {
        // In µs what was measured for 64 KiB: cores with a common cache, then without.
        let mut pace = Pace::default();
        assert!(past_of(&mut pace, 640, 3_000.0, 5_000.0) <= 11);
        let mut pace = Pace::default();
        assert!(past_of(&mut pace, 640, 26_000.0, 6_000.0) >= 628);
    }

    #[test]
    fn another_core_is_noticed_both_ways() {
        let mut pace = Pace::default();
        past_of(&mut pace, 640, 3_000.0, 5_000.0);
        past_of(&mut pace, 16, 26_000.0, 6_000.0);
        assert!(past_of(&mut pace, 640, 26_000.0, 6_000.0) >= 620);
        past_of(&mut pace, 8 * 64, 3_000.0, 5_000.0);
        assert!(past_of(&mut pace, 640, 3_000.0, 5_000.0) <= 20);
    }

    #[test]
    fn a_lost_core_does_not_change_the_way() {
        let mut pace = Pace::default();
        past_of(&mut pace, 10, 3_000.0, 5_000.0);
        pace.took(Way::Through, 64 << 10, 10_000_000.0);
        assert!(past_of(&mut pace, 640, 3_000.0, 5_000.0) <= 20);
    }
}
