//! `dist-cli` as a process among others: pipes that close, signals, help and completions.
#![cfg(unix)]

#[path = "support/cli.rs"]
mod cli;

use std::io::Read;
use std::process::{Child, Command, Stdio};

use cli::{Ran, program_in, run};

/// Seconds of work even on a fast machine: many samples, on the slow path.
const LONG: [&str; 10] = [
    "--ignore-eos",
    "--max-new-tokens",
    "450",
    "-n",
    "16",
    "--cpu-path",
    "portable",
    "--threads",
    "1",
    "--top-k=0",
];

struct Started {
    child: Child,
    _dir: tempfile::TempDir,
}

fn start(args: &[&str]) -> Started {
    let dir = tempfile::tempdir().expect("started");
    let mut command = program_in(dir.path(), args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
    Started { child, _dir: dir }
}

fn interrupt(child: &Child) {
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(sent.success());
}

#[test]
fn text_streams_and_ctrl_c_keeps_it() {
    let mut started = start(&[&["infer"], &LONG[..]].concat());
    let mut first = [0; 1];
    started.child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert!(started.child.try_wait().unwrap().is_none(), "text came before the end");
    interrupt(&started.child);
    let ran = Ran::from(started.child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    assert!(ran.out.ends_with('\n'));
    assert!(ran.err.contains("new tokens") && !ran.err.contains("7200 new tokens"), "{}", ran.err);
}

#[test]
fn ctrl_c_keeps_answers_in_json() {
    let line =
        |i: usize| format!("{{\"prompt_ids\":[5],\"id\":{i},\"max_new_tokens\":{}}}\n", 4 + 100 * i.min(4));
    let lines = (0..40).map(line).collect::<Vec<_>>().concat();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("p.jsonl"), lines).unwrap();
    let args = ["infer", "--prompts", "p.jsonl", "--ignore-eos", "--cpu-path", "portable", "--threads", "1"];
    let mut child =
        program_in(dir.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    interrupt(&child);
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    let text = format!("{}{}", char::from(first[0]), ran.out);
    let answers: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("whole lines")).collect();
    assert_eq!(answers.len(), 40);
    assert_eq!(answers[0]["finish_reason"], "length");
    assert_eq!(answers[39]["finish_reason"], "cancelled");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    for args in [&[&["infer"], &LONG[..]].concat()[..], &["completions", "bash"], &["infer", "--help"]] {
        let mut started = start(args);
        let mut stdout = started.child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 5]).unwrap();
        drop(stdout);
        let ran = Ran::from(started.child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    for args in [&["infer"][..], &["infer", "--json", "--max-new-tokens", "1"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let ran = Ran::from(program_in(dir.path(), args).stdout(full).output().unwrap());
        assert_eq!(ran.code, Some(1));
        assert!(ran.err.starts_with("error: cannot write to standard output\ncause: "), "{}", ran.err);
    }
}

#[test]
fn help_has_examples_and_exit_codes() {
    for args in [&["--help"][..], &["infer", "--help"], &["benchmark", "--help"], &["plan", "--help"]] {
        let help = run(args).well();
        assert!(help.contains("Examples:\n  dist-cli ") && help.contains("Exit codes:"), "{help}");
    }
    assert!(run(&["completions", "--help"]).well().contains("Examples:\n  dist-cli "));
    assert!(run(&["--version"]).well().starts_with("dist-cli "));
    assert_eq!(run(&[]).code, Some(2));
}

#[test]
fn completions_are_scripts() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]).well();
        assert!(script.contains("max-new-tokens"), "{shell}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        std::fs::write(&path, script).unwrap();
        // A shell that this machine lacks cannot judge; bash is everywhere that these tests run.
        match Command::new(shell).arg("-n").arg(&path).output() {
            Ok(parsed) => assert!(parsed.status.success(), "{}", String::from_utf8_lossy(&parsed.stderr)),
            Err(error) => assert!(shell != "bash", "{error}"),
        }
    }
}

#[test]
fn errors_are_coloured_on_request_only() {
    let plain = run(&["infer", "--model", "./nowhere"]).err;
    assert!(!plain.contains('\x1b'));
    let coloured = run(&["infer", "--model", "./nowhere", "--color", "always"]).err;
    assert!(coloured.starts_with("\x1b[1;31merror:\x1b[0m "), "{coloured:?}");
}
