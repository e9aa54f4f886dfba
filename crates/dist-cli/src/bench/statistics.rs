//! Quantiles of measured times, by nearest rank: each is a time that was measured.

use std::time::Duration;

use serde::Serialize;

/// Milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quantiles {
    /// How many were measured.
    pub n: usize,
    /// The least.
    pub min: f64,
    /// Half are at most this.
    pub p50: f64,
    /// Nine of ten are at most this.
    pub p90: f64,
    /// 99 of 100 are at most this.
    pub p99: f64,
}

impl Quantiles {
    /// Of these; `None` of nothing.
    pub fn of(times: &[Duration]) -> Option<Self> {
        let mut sorted: Vec<f64> =
            times.iter().map(|time| (time.as_secs_f64() * 1e6).round() / 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1];
        let min = *sorted.first()?;
        Some(Self { n: sorted.len(), min, p50: rank(50), p90: rank(90), p99: rank(99) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_measured_times() {
        let times: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        let found = Quantiles::of(&times).unwrap();
        assert_eq!((found.min, found.p50, found.p90, found.p99), (1.0, 100.0, 180.0, 198.0));
        let one = Quantiles::of(&times[..1]).unwrap();
        assert_eq!((one.p50, one.p99), (200.0, 200.0));
        assert_eq!(Quantiles::of(&[]), None);
    }
}
