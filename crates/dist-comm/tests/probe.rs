//! What `doctor` measures between ranks: each pair once, in order, with the clocks as they are.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

mod ring;

use std::time::{Duration, Instant, SystemTime};

use dist_comm::probe::{probe, probe_by};
use dist_comm::{CallName, SharedMemory};
use dist_core::Rank;
use ring::{PLENTY, all, on_worlds};

#[test]
fn every_pair_is_measured_and_rank_zero_is_told() {
    for (way, shares) in [(SharedMemory::Use, true), (SharedMemory::Avoid, false)] {
        let mut told = on_worlds(3, way, |mut world| {
            let reports = probe(&mut world, PLENTY).unwrap();
            // The ranks are where they were, ready for other calls.
            all(&mut world, PLENTY).barrier(CallName::new("after")).unwrap();
            reports
        });
        let reports = told.swap_remove(0).unwrap();
        assert_eq!(told, [None, None]);
        let pairs: Vec<_> = reports.iter().map(|pair| (pair.from.0, pair.to.0)).collect();
        assert_eq!(pairs, [(0, 1), (0, 2), (1, 2)]);
        for pair in reports {
            assert_eq!(pair.shares_memory, shares);
            assert!(!pair.round_trip.is_zero() && pair.round_trip < Duration::from_secs(1), "{pair:?}");
            // From a slow network to what no memory reaches.
            for rate in [pair.bytes_per_s_there, pair.bytes_per_s_back] {
                assert!((1e6..1e12).contains(&rate), "{pair:?}");
            }
            let twice_the_median = 2 * pair.round_trip.as_nanos() as u64;
            assert!(pair.clock_error_ns > 0 && pair.clock_error_ns <= twice_the_median, "{pair:?}");
        }
    }
}

#[test]
fn a_clock_that_is_ahead_or_behind_shows() {
    let ahead_s = [0, 5, -3_600];
    let shifted = |rank: usize| {
        move || {
            let shift = Duration::from_secs(i64::unsigned_abs(ahead_s[rank]));
            if ahead_s[rank] < 0 { SystemTime::now() - shift } else { SystemTime::now() + shift }
        }
    };
    let told = on_worlds(3, SharedMemory::Use, |mut world| {
        let now = shifted(world.rank().0);
        probe_by(&mut world, PLENTY, now).unwrap()
    });
    for pair in told[0].as_ref().unwrap() {
        let expected = (ahead_s[pair.to.0] - ahead_s[pair.from.0]) * 1_000_000_000;
        let wrong_by = (pair.clock_offset_ns - expected).unsigned_abs();
        // These clocks are one clock. A moment may pass between it and the first and the last step of a round.
        assert!(wrong_by <= pair.clock_error_ns + 1_000_000, "{pair:?}");
    }
}

#[test]
fn one_rank_has_no_pairs() {
    let told = on_worlds(1, SharedMemory::Use, |mut world| probe(&mut world, PLENTY).unwrap());
    assert_eq!(told, [Some(vec![])]);
}

#[test]
fn a_rank_that_is_lost_meanwhile_is_named_at_once() {
    let told = on_worlds(3, SharedMemory::Use, |mut world| {
        let mut comm = all(&mut world, PLENTY);
        comm.barrier(CallName::new("before")).unwrap();
        if world.rank() == Rank(2) {
            world.fail("no GPU");
            return None;
        }
        let start = Instant::now();
        let error = probe(&mut world, PLENTY).unwrap_err();
        Some((error.to_string(), start.elapsed()))
    });
    for (error, took) in told.into_iter().flatten() {
        // Both sentences begin with the same words; which one it is depends on how far the rank had come.
        assert!(
            error.starts_with("rank 2 is lost before ") && error.contains("it gave up: no GPU"),
            "{error}"
        );
        assert!(took < PLENTY / 4, "{took:?}");
    }
}
