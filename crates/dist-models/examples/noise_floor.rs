//! Measures how far log-probabilities of one rank move when only the order of its sums changes: each fixture of
//! `tests/fixtures` runs with its inner dimensions permuted (see `tests/support/reorder.rs`). Tests of many ranks take
//! their bounds from the file that this writes.
//!
//! `cargo run -p dist-models --example noise_floor` writes `benches/results/noise-floor.json`.

#![allow(clippy::print_stdout, reason = "an example shows what it did")]

#[path = "../../../tests/support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no program needs all of it")]
mod fixtures;
#[path = "../../../tests/support/noise.rs"]
mod noise;
#[path = "../../../tests/support/reorder.rs"]
mod reorder;
#[path = "../../../tests/support/trails.rs"]
mod trails;

use std::process::Command;

use noise::{FILE, N_ORDERS, NoiseFloor, measure};

fn main() {
    let measured = |name: &&str| {
        let floor = measure(name, N_ORDERS);
        println!("{name}: {floor:.2e}");
        ((*name).to_owned(), floor)
    };
    let result = NoiseFloor {
        what: "largest absolute difference of log-probabilities between the stored and a permuted order of all inner \
               dimensions, one rank, golden prompts and their twelve greedy tokens, twenty likeliest each"
            .to_owned(),
        device: device(),
        dtype: "f32".to_owned(),
        commit: commit(),
        command: "cargo run -p dist-models --example noise_floor".to_owned(),
        orders: N_ORDERS,
        floors: fixtures::NAMES.iter().map(measured).collect(),
    };
    let path = fixtures::repo().join(FILE);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder for results");
    let text = serde_json::to_string_pretty(&result).expect("JSON") + "\n";
    std::fs::write(&path, text).expect("the result is written");
    println!("wrote {FILE}");
}

fn device() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = model.map_or("unknown processor", |(_, name)| name);
    format!("{name}, 1 thread")
}

fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    output.map_or_else(|_| "unknown".to_owned(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned())
}
