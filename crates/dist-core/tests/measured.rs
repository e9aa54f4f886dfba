//! Predictions against what a GPU was measured to take: the records of `benchmark`, with the ceilings that they hold.
//! Whatever they are made of anew is read; one of another GPU says nothing here.

#![allow(clippy::print_stdout, reason = "shown with --nocapture: how far predictions are off")]

use std::path::PathBuf;

use dist_core::plan::Limits;
use dist_core::planner::{PlanOptions, Workload, plan};
use dist_core::{DType, Device, DeviceKind, Link, Topology, presets};
use serde_json::Value;

/// The repository: `DIST_REPO`, or the first folder upwards that holds `benches/results`.
fn results() -> PathBuf {
    if let Some(root) = std::env::var_os("DIST_REPO") {
        return PathBuf::from(root).join("benches/results");
    }
    let here = std::env::current_dir().expect("a working directory");
    let root = here.ancestors().find(|dir| dir.join("benches/results").is_dir());
    root.expect("run inside the repository, or set DIST_REPO to it").join("benches/results")
}

/// GPUs whose records are here. The price of a launch was fitted to the H100's.
const GPUS: [&str; 2] = ["H100", "H200"];

/// The records with that in their name that are of one of these GPUs.
fn records(part: &str) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(results()).expect("results") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if name.contains(part) && path.extension().is_some_and(|extension| extension == "json") {
            let record = std::fs::read_to_string(&path).expect("a record");
            let record: Value = serde_json::from_str(&record).expect("JSON");
            if record["device"]["name"]
                .as_str()
                .is_some_and(|gpu| GPUS.iter().any(|known| gpu.contains(known)))
            {
                found.push((name, record));
            }
        }
    }
    found
}

/// Predicted milliseconds of TTFT and TPOT; `None` for a model that is no preset.
fn predicted(record: &Value, result: &Value) -> Option<(f64, f64)> {
    let number = |value: &Value| value.as_f64().expect("a number");
    let count = |value: &Value| usize::try_from(value.as_u64().expect("a count")).expect("small");
    let name = record["model"]["name"].as_str().expect("a preset's name");
    let model = presets::preset(name, None)?;
    let device = Device {
        kind: DeviceKind::Cuda,
        name: "H100".to_owned(),
        host: 0,
        memory_bytes: 80_000_000_000,
        // Read around the cell, where the record has that.
        read_bytes_per_s: result["read_bytes_per_s"]
            .as_f64()
            .unwrap_or_else(|| number(&record["ceilings"]["read_bytes_per_s"])),
        flops_per_s: number(&record["ceilings"]["flops_per_s"]),
        overhead: None,
    };
    let limits = &record["plan"]["limits"];
    let options = PlanOptions {
        act_dtype: DType::BF16,
        wire_dtype: DType::BF16,
        kv_dtype: DType::BF16,
        block_size: 16,
        limits: Limits {
            max_seq_len: count(&limits["max_seq_len"]),
            max_seqs: count(&limits["max_seqs"]),
            max_batch_tokens: count(&limits["max_batch_tokens"]),
            max_sample_rows: count(&limits["max_sample_rows"]),
        },
        memory_percent: 100,
        mesh: None,
        stages: None,
        copies: false,
    };
    let (n_seqs, prompt_len) = (count(&result["batch"]), count(&result["prompt_len"]));
    let workload = Workload { n_seqs, prompt_len, new_tokens: count(&result["new_tokens"]) };
    let topology = Topology::uniform(&device, 1, Link { latency_s: 0.0, bytes_per_s: 1e12 });
    let report = plan(&model, &topology, workload, &options).expect("a sound request");
    let predictions = report.best.expect("it ran").predictions;
    Some((predictions.ttft_s * 1e3, predictions.tpot_s * 1e3))
}

/// Every cell of every record: what is predicted is within `tolerance` of what was measured.
#[track_caller]
fn check(part: &str, what: &str, tolerance: f64, of: impl Fn(&Value, &Value) -> Option<f64>) {
    let (mut off, mut n_cells) = (Vec::new(), 0);
    for (name, record) in records(part) {
        for result in record["results"].as_array().expect("cells") {
            let (Some(predicted), Some(measured)) = (of(&record, result), result[what]["p50"].as_f64())
            else {
                continue;
            };
            let (batch, ratio) = (&result["batch"], predicted / measured);
            n_cells += 1;
            println!(
                "{name}, batch {batch}: {what} {predicted:.3} predicted, {measured:.3} measured: {ratio:.3}"
            );
            if (ratio - 1.0).abs() > tolerance {
                off.push(format!(
                    "{name}, batch {batch}: {predicted:.3} ms against {measured:.3}: {ratio:.3}"
                ));
            }
        }
    }
    assert!(n_cells > 0, "no record with {part} in its name has a {what}");
    assert!(off.is_empty(), "{what} is off, fit Overhead::H100 anew:\n{}", off.join("\n"));
}

#[test]
fn decode_steps_take_what_is_predicted() {
    check("-decode-", "tpot_ms", 0.12, |record, result| Some(predicted(record, result)?.1));
}

/// A single prompt: whoever comes with others waits for them, which no plan says of one prompt.
#[test]
fn first_tokens_take_about_what_is_predicted() {
    for part in ["-decode-", "-first-"] {
        check(part, "ttft_ms", 0.2, |record, result| {
            if result["batch"] == 1 { Some(predicted(record, result)?.0) } else { None }
        });
    }
}
