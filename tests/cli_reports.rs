//! `dist-cli benchmark` and `plan`: what they report, not how fast anything is.

#[path = "support/cli.rs"]
mod cli;

use cli::run;
use serde_json::Value;

const QUICK: [&str; 9] =
    ["benchmark", "--batch", "1,2", "--prompt-len", "8", "--new-tokens", "4", "--repeats", "2"];

#[test]
fn a_benchmark_names_everything_that_it_depends_on() {
    let out = run(&[&QUICK[..], &["--json"]].concat()).well();
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["schema_version"], 1);
    for field in ["command", "commit", "date"] {
        assert!(report[field].as_str().is_some_and(|text| !text.is_empty()), "{field}");
    }
    assert!(report["command"].as_str().unwrap().ends_with("--repeats 2 --json"));
    for field in ["name", "threads", "cpu_path", "kind"] {
        assert!(!report["device"][field].is_null(), "{field}");
    }
    assert_eq!((&report["model"]["weight_dtype"], &report["model"]["n_layers"]), (&"bf16".into(), &6.into()));
    assert!(report["ceilings"]["read_bytes_per_s"].as_f64().unwrap() > 0.0);
    let results = report["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    for (result, batch) in results.iter().zip([1, 2]) {
        assert_eq!(result["batch"], batch);
        assert_eq!(result["ttft_ms"]["n"], 2 * batch);
        assert_eq!(result["tpot_ms"]["n"], 2 * 3);
        for field in ["decode_bytes_per_s", "decode_share_of_read", "tpot_predicted_over_measured"] {
            assert!(result[field].as_f64().is_some_and(|number| number > 0.0), "{field}");
        }
        let of = |field: &str| result["tpot_ms"][field].as_f64().unwrap();
        assert!(of("p50") <= of("p90") && of("p90") <= of("p99"));
    }
}

#[test]
fn the_table_says_where_its_numbers_come_from() {
    let ran = run(&QUICK);
    assert!(ran.err.contains("measuring batch 2, prompt 8, new tokens 4"));
    for part in ["TPOT ms p50 p90 p99", "model=demo dtype=bf16", "commit=", "command=", "% read"] {
        assert!(ran.out.contains(part), "{part}: {}", ran.out);
    }
}

#[test]
fn cells_beyond_the_context_are_refused() {
    let ran = run(&["benchmark", "--prompt-len", "500", "--new-tokens", "64"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("564 together, the model knows 512"), "{}", ran.err);
}

#[test]
fn a_plan_says_what_wins_and_why_the_rest_lost() {
    let args = ["plan", "--model", "gpt3-13b", "--devices", "2", "--device-memory", "24"];
    let text = run(&args).well();
    assert!(text.starts_with("gpt3-13b: tp 2 × pp 1 × dp 1"), "{text}");
    assert!(text.contains("not tp 1 × pp 1 × dp 1: rank 0 needs "), "{text}");
    let report: Value = serde_json::from_str(&run(&[&args[..], &["--json"]].concat()).well()).unwrap();
    assert_eq!(report["best"]["plan"]["mesh"]["tp"], 2);
    assert_eq!(report["best"]["memory"].as_array().map(Vec::len), Some(2));
    let none = run(&["plan", "--model", "gpt3-175b", "--device-memory", "24"]);
    assert_eq!(none.code, Some(1));
    assert!(none.err.contains("error: gpt3-175b runs on none of these splits\nhelp: "), "{}", none.err);
}
