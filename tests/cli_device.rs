//! Which device a run takes, and what is said where the one that was asked for cannot be had.

#[path = "support/cli.rs"]
mod cli;
#[path = "support/stubs.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod stubs;

use cli::{Ran, program_in};
use serde_json::Value;

const TINY: [&str; 6] = ["--prompt-ids", "5,17", "--max-new-tokens", "2", "--threads", "1"];

/// Runs `infer` where NVIDIA's driver is a stub that sees no GPU; `None` where the loader knows a real one.
fn without_gpu(flags: &[&str]) -> Option<Ran> {
    let empty = tempfile::tempdir().expect("a folder");
    let doctor: Ran = program_in(empty.path(), &["doctor", "--json"]).output().expect("dist-cli runs").into();
    let report: Value = serde_json::from_str(&doctor.well()).expect("one JSON object");
    if report["ranks"][0]["machine"]["gpu"]["libraries"][0]["version"].is_string() {
        return None;
    }
    stubs::driver(empty.path(), &[]);
    let mut command = program_in(empty.path(), &[&["infer"], flags, &TINY].concat());
    command.env("DIST_CUDA_LIB", empty.path()).env("STUB_VERSION", "13000");
    Some(command.output().expect("dist-cli runs").into())
}

#[test]
fn a_gpu_where_there_is_none_is_refused_with_a_way_on() {
    for device in ["cuda", "cuda:0", "cuda:3"] {
        let Some(ran) = without_gpu(&["--device", device]) else { return };
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{}", ran.err);
        let refusal = format!("error: --device {device}: NVIDIA's driver is here, but it sees no GPU");
        assert!(ran.err.contains(&refusal), "{}", ran.err);
        assert!(ran.err.contains("help: use --device cpu; dist-cli doctor"), "{}", ran.err);
        assert!(!ran.err.contains("--device cuda:0\n") && ran.err.lines().count() == 2, "{}", ran.err);
    }
}

#[test]
fn ranks_on_a_gpu_are_refused() {
    let Some(ran) = without_gpu(&["--device", "cuda", "--tp", "2"]) else { return };
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{}", ran.err);
    assert!(ran.err.contains("--device cuda"), "{}", ran.err);
}

#[test]
fn the_cpu_runs_without_graphs_as_well() {
    for flag in ["--no-graphs", "--enforce-eager"] {
        let ran = cli::run(&[&["infer", "--json", "--device", "cpu", flag], &TINY[..]].concat());
        let object: Value = serde_json::from_str(&ran.well()).expect("one JSON object");
        assert_eq!(cli::ids(&object, "ids").len(), 2);
    }
}

#[test]
fn a_plan_for_gpus_counts_their_launches() {
    let plan = |device: &str| -> Value {
        let flags =
            ["--device-kind", device, "--device-memory", "80", "--bandwidth", "3115", "--tflops", "816"];
        let args = [&["plan", "--model", "gpt3-1.3b", "--json"], &flags[..]].concat();
        serde_json::from_str(&cli::run(&args).well()).expect("one JSON object")
    };
    let tpot_ms =
        |plan: &Value| plan["best"]["plan"]["predictions"]["tpot_s"].as_f64().expect("seconds") * 1e3;
    let (cpu, gpu) = (plan("cpu"), plan("cuda"));
    // 175 launches of 1.65 us; keys and values have half the bytes.
    assert!((1.13..1.16).contains(&tpot_ms(&gpu)), "{}", tpot_ms(&gpu));
    assert!((0.84..0.88).contains(&tpot_ms(&cpu)), "{}", tpot_ms(&cpu));
    assert_eq!(gpu["best"]["plan"]["act_dtype"], "bf16");
    assert_eq!(cpu["best"]["plan"]["act_dtype"], "f32");
}
