//! `export` as users run it: what it writes runs and proves itself, and what makes no sense is refused.

#[path = "support/cli.rs"]
mod cli;

use std::path::Path;

use cli::{Ran, ids, program_in, run};
use dist_models::manifest::Manifest;
use serde_json::Value;

/// Runs in `dir`.
fn run_in(dir: &Path, args: &[&str]) -> Ran {
    program_in(dir, args).output().expect("dist-cli runs").into()
}

fn json(ran: Ran) -> Value {
    serde_json::from_str(&ran.well()).expect("one object")
}

fn manifest(dir: &Path) -> Manifest {
    let bytes = std::fs::read(dir.join("manifest.json")).expect("a manifest");
    Manifest::parse("manifest.json", &bytes).expect("a sound one")
}

const ASK: [&str; 7] = ["infer", "--json", "--temperature", "0", "--max-new-tokens", "16", "--prompt=ROMEO."];

fn ask(dir: &Path, args: &[&str]) -> Value {
    json(run_in(dir, &[&ASK, args].concat()))
}

#[test]
fn an_exported_model_is_the_same_model() {
    let dir = tempfile::tempdir().expect("a folder");
    let told = json(run_in(dir.path(), &["export", "--model", "demo", "--out", "a/b", "--json"]));
    assert_eq!((told["schema_version"].as_u64(), told["n_tensors"].as_u64()), (Some(1), Some(76)));
    let out = dir.path().join("a/b");
    assert_eq!(told["dir"], out.display().to_string());
    let names: Vec<String> = std::fs::read_dir(&out)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    for name in ["manifest.json", "weights.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        assert!(names.iter().any(|found| found == name), "{name} is not in {names:?}");
    }
    assert_eq!(manifest(&out).identity().to_string(), told["identity"]);
    let expected = ids(&ask(dir.path(), &[]), "ids");
    assert_eq!(ids(&ask(dir.path(), &["--model", "a/b", "--verify"]), "ids"), expected);
    assert_eq!(ids(&ask(dir.path(), &["--model", "a/b", "--verify", "--no-mmap"]), "ids"), expected);
    // A context that is shorter than the probe prompt.
    let short =
        ask(dir.path(), &["--model", "a/b", "--verify", "--max-seq-len", "24", "--max-batch-tokens", "5"]);
    assert_eq!(ids(&short, "ids"), expected);
}

#[test]
fn a_cut_model_is_the_same_model() {
    let dir = tempfile::tempdir().expect("a folder");
    run_in(dir.path(), &["export", "--model", "demo", "--out", "cut", "--tp", "2", "--pp", "2"]).well();
    let (model, expected) = ("cut/inference_model_pp2mp2", ids(&ask(dir.path(), &[]), "ids"));
    for args in [&["--tp", "2", "--pp", "2"][..], &[], &["--tp", "4"], &["--pp", "3"]] {
        let found = ask(dir.path(), &[&["--model", model, "--verify"], args].concat());
        assert_eq!(ids(&found, "ids"), expected, "{args:?}");
    }
}

#[test]
fn a_model_that_says_something_else_is_not_used() {
    let dir = tempfile::tempdir().expect("a folder");
    run_in(dir.path(), &["export", "--model", "demo", "--out", "demo"]).well();
    let out = dir.path().join("demo");
    let mut changed = manifest(&out);
    changed.golden.logprobs[7] -= 0.01;
    std::fs::write(out.join("manifest.json"), changed.to_json()).expect("written");
    let args = ["infer", "--model", "demo/", "--prompt", "ROMEO."];
    assert!(!run_in(dir.path(), &args).well().is_empty(), "without --verify nobody asks");
    let ran = run_in(dir.path(), &[&args[..], &["--verify"]].concat());
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{}", ran.err);
    assert!(
        ran.err.starts_with("error: the model does not say what it said at export\ncause: "),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("log-probability 8 of the probe prompt is -"), "{}", ran.err);
}

#[test]
fn a_plan_is_followed() {
    let dir = tempfile::tempdir().expect("a folder");
    let planned =
        run_in(dir.path(), &["plan", "--model", "demo", "--tp", "2", "--stages", "1,2,3", "--json"]);
    std::fs::write(dir.path().join("plan.json"), planned.well()).expect("written");
    let told = json(run_in(
        dir.path(),
        &["export", "--model", "demo", "--plan", "plan.json", "--out", "o", "--json"],
    ));
    assert_eq!(told["split"], serde_json::json!({"tp": 2, "stages": [1, 2, 3]}));
    assert_eq!(told["ranks"].as_array().map(Vec::len), Some(6));
    let ran = run_in(dir.path(), &["shard", "--model", "gpt3-125m", "--dry-run", "--plan", "plan.json"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("is for demo, the model is gpt3-125m of another shape"), "{}", ran.err);
}

#[test]
fn types_and_context_change_as_asked() {
    let dir = tempfile::tempdir().expect("a folder");
    let args = ["export", "--model", "demo", "--dtype", "f32", "--max-seq-len", "100", "--out", "f32"];
    run_in(dir.path(), &args).well();
    let exported = manifest(&dir.path().join("f32"));
    assert!(exported.tensors.iter().all(|row| row.dtype == dist_core::DType::F32));
    assert_eq!(exported.model.n_ctx, 100);
    // bf16 in f32 is the same number, so that the model says the same.
    let found = ids(&ask(dir.path(), &["--model", "f32", "--verify"]), "ids");
    assert_eq!(found, ids(&ask(dir.path(), &[]), "ids"));
}

#[track_caller]
fn check(ran: &Ran, code: i32, error: &str, help: &str) {
    assert_eq!(ran.code, Some(code), "{}", ran.err);
    assert!(ran.err.starts_with("error: ") && ran.err.contains(error), "{error:?} is not in {}", ran.err);
    assert!(ran.err.lines().any(|line| line.starts_with("help: ") && line.contains(help)), "{}", ran.err);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let cases: [(&[&str], i32, &str, &str); 8] = [
        (&["--model", "gpt3-125m", "--out", "o"], 2, "is a shape without weights", "--random-weights"),
        (
            &["--model", "demo", "--random-weights", "--out", "o"],
            2,
            "--random-weights is for presets",
            "leave",
        ),
        (&["--model", "demo", "--seed", "1", "--out", "o"], 2, "--seed is for presets", "leave --seed out"),
        (&["--model", "demo"], 2, "export needs a directory to write", "--out DIR"),
        (&["--model", "demo", "--tp", "5", "--out", "o"], 1, "cannot be cut for tp 5", "--tp"),
        (&["--model", "demo", "--stages", "1,2", "--out", "o"], 1, "the model has 6 for pp 2", "--stages"),
        (&["--model", "demo", "--max-seq-len", "513", "--out", "o"], 1, "knows 512 positions", "at most"),
        (&["--model", "demo", "--dtype", "int8", "--out", "o"], 2, "must be f32, f16 or bf16", "--help"),
    ];
    for (args, code, error, help) in cases {
        check(&run(&[&["export"], args].concat()), code, error, help);
    }
    check(&run(&["infer", "--verify", "--prompt", "a"]), 2, "demo has no golden log-probabilities", "export");
}

#[test]
fn only_what_this_program_wrote_is_replaced() {
    let dir = tempfile::tempdir().expect("a folder");
    let export = ["export", "--model", "demo", "--out", "o"];
    let over = |args: &[&str]| run_in(dir.path(), &[&export[..], args].concat());
    std::fs::create_dir(dir.path().join("o")).expect("a folder");
    over(&[]).well();
    check(&over(&[]), 1, "o: exists already", "--overwrite");
    over(&["--overwrite", "--dtype", "f32"]).well();
    let row = &manifest(&dir.path().join("o")).tensors[0];
    assert_eq!(row.dtype, dist_core::DType::F32);
    std::fs::create_dir(dir.path().join("mine")).expect("a folder");
    std::fs::write(dir.path().join("mine/letter.txt"), "dear").expect("written");
    let ran = run_in(dir.path(), &["export", "--model", "demo", "--out", "mine", "--overwrite"]);
    check(&ran, 1, "mine: is no checkpoint of this program", "remove it yourself");
    assert_eq!(std::fs::read(dir.path().join("mine/letter.txt")).expect("still there"), b"dear");
}
