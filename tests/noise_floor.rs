//! The noise floor that other tests take their bounds from is what this code gives.

#![allow(clippy::print_stdout, reason = "shown with --nocapture: how far from the bound")]

#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;
#[path = "support/noise.rs"]
mod noise;
#[path = "support/reorder.rs"]
mod reorder;
#[path = "support/trails.rs"]
mod trails;

use noise::{FILE, measure, written};

/// Few orders, so that it is quick: their largest difference is below that of all, and of its size.
#[test]
fn the_written_floor_is_what_is_measured() {
    let written = written();
    assert_eq!(written.floors.len(), fixtures::NAMES.len());
    for name in fixtures::NAMES {
        let (floor, now) = (written.floors[name], measure(name, 6));
        println!("{name}: {now:.2e} now, {floor:.2e} written");
        let again = format!("run `{}` and commit {FILE}", written.command);
        // Other kernels round otherwise; a floor that has moved further than that is out of date.
        assert!(now <= 2.0 * floor && now >= floor / 8.0, "{name}: {now:e}, written is {floor:e}: {again}");
        assert!(floor < 5e-5, "{name}: noise of {floor:e} is no noise of f32 sums");
    }
}

/// A permutation that left one tensor behind would be another model.
#[test]
fn a_permuted_model_is_the_same_model() {
    for name in fixtures::NAMES {
        let (_, cases) = fixtures::fixture(name);
        let trails = noise::solo(&reorder::reordered(name, 7), &cases);
        for (case, trail) in cases.iter().zip(&trails) {
            let found = trail.prompt.iter().copied().map(f32::from_bits);
            let diff = found.zip(&case.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(diff <= 2e-4, "{name}: log-probabilities differ by {diff} from the reference");
        }
    }
}
