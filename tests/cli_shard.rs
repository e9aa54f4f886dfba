//! `shard` as users run it: listing, cutting, joining, comparing; and runs that end early leave what was there.

#[path = "support/cli.rs"]
mod cli;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cli::{Ran, program_in};
use serde_json::Value;

fn run_in(dir: &Path, args: &[&str]) -> Ran {
    program_in(dir, args).output().expect("dist-cli runs").into()
}

/// A folder with the demo model exported to `demo`.
fn with_demo() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    run_in(dir.path(), &["export", "--model", "demo", "--out", "demo"]).well();
    dir
}

/// All files of a directory by their relative names.
fn read_all(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut found, mut dirs) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(&next).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let name = path.strip_prefix(dir).expect("below").display().to_string();
                found.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    found
}

#[test]
fn cut_and_joined_is_the_same_to_the_byte() {
    let dir = with_demo();
    run_in(dir.path(), &["shard", "--model", "demo/", "--tp", "4", "--stages", "4,2", "--out", "cut"]).well();
    let cut = "cut/inference_model_pp2mp4";
    run_in(dir.path(), &["shard", "--model", cut, "--tp", "2", "--pp", "3", "--out", "cut"]).well();
    let again = "cut/inference_model_pp3mp2";
    run_in(dir.path(), &["shard", "--model", again, "--tp", "1", "--pp", "1", "--out", "joined"]).well();
    assert!(read_all(&dir.path().join("joined")) == read_all(&dir.path().join("demo")));
}

#[test]
fn a_dry_run_says_what_would_be_written_and_writes_nothing() {
    let dir = with_demo();
    let before = read_all(dir.path());
    let args = ["shard", "--model", "demo/", "--tp", "2", "--pp", "2"];
    let list = |more: &[&str]| run_in(dir.path(), &[&args[..], &["--dry-run"], more].concat()).well();
    let listed: Value = serde_json::from_str(&list(&["--json"])).expect("one object");
    let text = list(&[]);
    assert!(read_all(dir.path()) == before);
    run_in(dir.path(), &[&args[..], &["--out", "cut"]].concat()).well();
    for rank in listed["ranks"].as_array().expect("ranks") {
        let name = format!("rank_{}", rank["rank"]);
        let file = dir.path().join("cut/inference_model_pp2mp2").join(&name).join("weights.safetensors");
        let bytes = std::fs::metadata(file).expect("a file").len();
        assert_eq!(rank["bytes"].as_u64(), Some(bytes));
        assert!(text.contains(&format!("({name}): {bytes} bytes, ")), "{text}");
    }
    assert!(text.contains("  layers.5.mlp.fc2.weight    bf16        262144  [256, 512]\n"), "{text}");
    // A model that no disk here holds.
    let huge = run_in(dir.path(), &["shard", "--model", "gpt3-175b", "--tp", "8", "--pp", "8", "--dry-run"]);
    assert_eq!(huge.well().lines().filter(|line| line.starts_with("rank ")).count(), 64);
}

#[test]
fn verify_names_what_changed() {
    let dir = with_demo();
    run_in(dir.path(), &["shard", "--model", "demo/", "--tp", "2", "--out", "."]).well();
    let verify = ["shard", "--model", "inference_model_pp1mp2", "--verify"];
    assert!(run_in(dir.path(), &verify).well().contains("152 tensors in 2 files are as written"));
    let file = dir.path().join("inference_model_pp1mp2/rank_1/weights.safetensors");
    let mut bytes = std::fs::read(&file).expect("a file");
    let at = bytes.len() - 1;
    bytes[at] ^= 0x80;
    std::fs::write(&file, bytes).expect("written");
    let ran = run_in(dir.path(), &verify);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
    assert!(
        ran.err.contains("rank_1/weights.safetensors, final_norm.bias: expected SHA-256 "),
        "{}",
        ran.err
    );
    // The same is found by the rank that takes it in, and by whoever cuts it anew.
    let infer = ["infer", "--model", "inference_model_pp1mp2", "--tp", "2", "--prompt", "a"];
    let ran = run_in(dir.path(), &infer);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{}", ran.err);
    let named = |err: &str| err.contains("final_norm.bias") && err.contains("SHA-256");
    assert!(named(&ran.err), "{}", ran.err);
    let ran = run_in(dir.path(), &["shard", "--model", "demo/", "--verify"]);
    assert!(ran.well().contains("76 tensors in 1 file are as written"));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let dir = with_demo();
    let cases: [(&[&str], i32, &str); 6] = [
        (&["--model", "demo/", "--tp", "2"], 2, "shard needs a directory to write"),
        (&["--model", "gpt3-125m", "--tp", "2", "--out", "o"], 2, "is a shape without weights"),
        (&["--model", "demo", "--verify"], 2, "only a directory has hashes"),
        (&["--model", "demo/", "--verify", "--out", "o"], 2, "cannot be used with"),
        (&["--model", "demo/", "--pp", "7", "--out", "o"], 1, "cannot be split as tp 1 × pp 7"),
        (&["--model", "nowhere/", "--tp", "2", "--out", "o"], 1, "nowhere/: no such directory"),
    ];
    for (args, code, error) in cases {
        let ran = run_in(dir.path(), &[&["shard"], args].concat());
        assert_eq!(ran.code, Some(code), "{}", ran.err);
        assert!(ran.err.contains(error) && ran.err.contains("help: "), "{error:?} is not in {}", ran.err);
        assert!(!dir.path().join("o").exists());
    }
}

/// What is beside the target while it is written.
const PARTIAL: &str = "cut/.inference_model_pp1mp2.partial";
const TARGET: &str = "cut/inference_model_pp1mp2";
const CUT: [&str; 8] = ["shard", "--model", "demo/", "--tp", "2", "--out", "cut", "--overwrite"];

/// A limit on the size of files stands for a full disk: the write fails in the same way.
#[test]
fn a_write_that_fails_leaves_the_target_as_it_was() {
    let dir = with_demo();
    let limited = |blocks: u32, args: &[&str]| -> Ran {
        let program = program_in(dir.path(), args);
        let mut shell = Command::new("sh");
        let script = format!("ulimit -f {blocks}; trap '' XFSZ; exec \"$0\" \"$@\"");
        shell.arg("-c").arg(script).arg(program.get_program()).args(program.get_args());
        shell.current_dir(dir.path()).stdin(Stdio::null());
        shell.output().expect("sh runs").into()
    };
    let ran = limited(64, &CUT);
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    assert!(
        ran.err.contains("weights.safetensors: cannot be written; the target is as it was"),
        "{}",
        ran.err
    );
    assert!(!dir.path().join("cut").exists(), "what was made for it is gone");
    run_in(dir.path(), &CUT).well();
    let before = read_all(&dir.path().join("cut"));
    for blocks in [0, 1, 64, 4096] {
        let ran = limited(blocks, &CUT);
        assert_eq!(ran.code, Some(1), "{}", ran.err);
        assert!(read_all(&dir.path().join("cut")) == before, "with {blocks} blocks");
    }
}

/// A run that is killed at any moment leaves what was there, or has finished; the next one goes on as if it had not been.
#[test]
fn a_killed_run_leaves_the_target_as_it_was() {
    let dir = with_demo();
    run_in(dir.path(), &["shard", "--model", "demo", "--tp", "2", "--out", "cut"]).well();
    // Another model in the same place, so that old and new are told apart.
    run_in(dir.path(), &["export", "--model", "demo", "--dtype", "f32", "--out", "demo", "--overwrite"])
        .well();
    let old = read_all(&dir.path().join(TARGET));
    run_in(dir.path(), &["shard", "--model", "demo/", "--tp", "2", "--out", "new"]).well();
    let new = read_all(&dir.path().join("new/inference_model_pp1mp2"));
    assert!(old != new);
    let mut n_stopped = 0;
    for (round, signal) in ["KILL", "INT", "TERM"].into_iter().cycle().take(12).enumerate() {
        let mut child =
            program_in(dir.path(), &CUT).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("runs");
        let deadline = Instant::now() + Duration::from_secs(60);
        // As soon as something is written; then a little later each round.
        while !dir.path().join(PARTIAL).exists() && child.try_wait().expect("a child").is_none() {
            assert!(Instant::now() < deadline, "nothing is ever written");
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_millis(round as u64 * 2));
        let _ =
            Command::new("kill").args(["-s", signal, &child.id().to_string()]).stderr(Stdio::null()).status();
        let ended = child.wait().expect("ended");
        let found = read_all(&dir.path().join(TARGET));
        assert!(found == old || found == new, "{signal} in round {round} left something else");
        assert!(!ended.success() || found == new, "{signal} in round {round}: it said that it had finished");
        n_stopped += usize::from(!ended.success());
        // On a busy machine a signal may come too late; one that was in time is what this is about.
        if found == new && n_stopped > 0 {
            break;
        }
    }
    assert!(n_stopped > 0, "no run was stopped");
    run_in(dir.path(), &CUT).well();
    assert!(read_all(&dir.path().join(TARGET)) == new);
    assert!(!dir.path().join(PARTIAL).exists());
}
