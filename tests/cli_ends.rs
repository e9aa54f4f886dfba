//! How runs over several ranks end: whatever happens to one process, none stays behind and the error names the culprit.
#![cfg(target_os = "linux")]

#[path = "support/cli.rs"]
mod cli;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cli::{Ran, program_in};

/// Many samples on four ranks, on the slow path.
const LONG: [&str; 14] = [
    "infer",
    "-v",
    "--ignore-eos",
    "-n",
    "4",
    "--max-batch-tokens",
    "16",
    "--cpu-path",
    "portable",
    "--top-k=0",
    "--tp",
    "2",
    "--pp",
    "2",
];

/// So many tokens of each sample take a while on any machine.
const MANY: &str = "450";

/// Nothing here takes as long on a machine that works.
const PATIENCE: Duration = Duration::from_secs(30);

struct Run {
    child: Child,
    /// Ranks after 0, in order.
    followers: Vec<u32>,
    stderr: BufReader<std::process::ChildStderr>,
    _dir: tempfile::TempDir,
}

/// Starts four ranks and waits until text comes.
fn decoding(new_tokens: &str, timeout: &str) -> Run {
    let dir = tempfile::tempdir().expect("it goes well");
    let args = [&LONG[..], &["--max-new-tokens", new_tokens, "--collective-timeout", timeout]].concat();
    let mut child = program_in(dir.path(), &args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it goes well");
    let mut stderr = BufReader::new(child.stderr.take().expect("it goes well"));
    let mut followers = Vec::new();
    for line in stderr.by_ref().lines() {
        let line = line.expect("it goes well");
        if let Some((_, pid)) = line.split_once(": pid ").filter(|_| !line.starts_with("rank 0")) {
            followers.push(pid.parse().expect("it goes well"));
        }
        if line.starts_with("load weights") {
            break;
        }
    }
    assert_eq!(followers.len(), 3);
    child.stdout.as_mut().expect("it goes well").read_exact(&mut [0; 1]).expect("it goes well");
    Run { child, followers, stderr, _dir: dir }
}

fn kill(signal: &str, pid: u32) {
    let sent = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill runs");
    assert!(sent.success());
}

/// Whether a process computes or may do so again; who has ended may still wait for somebody to ask how.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

impl Run {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended; nobody is left of it.
    #[track_caller]
    fn ended(mut self) -> Ran {
        let start = Instant::now();
        let mut err = String::new();
        self.stderr.read_to_string(&mut err).expect("it goes well");
        let ran = Ran::from(self.child.wait_with_output().expect("it goes well"));
        while self.followers.iter().any(|&pid| is_alive(pid)) {
            assert!(start.elapsed() < PATIENCE, "ranks are left: {:?}", self.followers);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(start.elapsed() < PATIENCE);
        Ran { err, ..ran }
    }
}

#[test]
fn a_whole_run_leaves_nobody() {
    let ran = decoding("4", "20").ended();
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(!ran.err.contains("error"), "{}", ran.err);
}

#[test]
fn ctrl_c_ends_all_and_keeps_the_text() {
    let run = decoding(MANY, "20");
    // A terminal sends it to every process.
    for &pid in run.followers.iter().chain([&run.pid()]) {
        kill("-INT", pid);
    }
    let ran = run.ended();
    assert_eq!(ran.code, Some(130), "{}", ran.err);
    assert!(ran.err.contains("new tokens") && !ran.err.contains("error"), "{}", ran.err);
}

#[test]
fn sigterm_and_sigkill_of_the_parent_end_all() {
    for signal in ["-TERM", "-KILL"] {
        let run = decoding(MANY, "20");
        kill(signal, run.pid());
        assert_eq!(run.ended().code, None, "{signal}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_all() {
    let mut run = decoding(MANY, "20");
    drop(run.child.stdout.take());
    assert_eq!(run.ended().code, Some(0));
}

#[test]
fn a_killed_rank_is_named() {
    for rank in 1..4 {
        let run = decoding(MANY, "20");
        let killed = Instant::now();
        kill("-KILL", run.followers[rank - 1]);
        let ran = run.ended();
        assert!(killed.elapsed() < PATIENCE / 2, "{:?}", killed.elapsed());
        assert_eq!(ran.code, Some(1));
        let errors: Vec<_> = ran.err.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", ran.err);
        assert!(errors[0].starts_with(&format!("error: rank {rank} is lost")), "{}", ran.err);
        assert!(
            ran.err.contains(&format!("cause: the process of rank {rank} was ended by SIGKILL")),
            "{}",
            ran.err
        );
    }
}

#[test]
fn a_stopped_rank_is_named_at_the_deadline() {
    let run = decoding(MANY, "3");
    let stopped = run.followers[1];
    kill("-STOP", stopped);
    let since = Instant::now();
    let ran = run.ended();
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    let error = ran.err.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    assert!(error.starts_with("error: rank 2 "), "{}", ran.err);
    assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
}

#[test]
fn a_rank_that_fails_before_all_have_met_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("mkfifo").arg(dir.path().join("dist.toml")).status().expect("mkfifo runs");
    assert!(made.success());
    let args = ["infer", "--config", "dist.toml", "-v"];
    let mut child =
        program_in(dir.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Each process that opens the pipe reads its own settings.
    std::fs::write(dir.path().join("dist.toml"), "tp = 2\n").unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("rank 1: pid ") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it starts a rank");
    }
    let start = Instant::now();
    std::fs::write(dir.path().join("dist.toml"), "tp = 'two'\n").unwrap();
    let mut err = String::new();
    stderr.read_to_string(&mut err).unwrap();
    assert_eq!(Ran::from(child.wait_with_output().unwrap()).code, Some(1));
    let told = "error: rank 1 ended with exit code 2 before all ranks had met\n\
                cause: dist.toml has a value that does not fit: invalid value 'two'";
    assert!(err.contains(told), "{err}");
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
}

#[test]
fn a_rank_whose_parent_is_gone_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let ran = Ran::from(program_in(dir.path(), &["infer"]).env("DIST_STARTED_BY", "1").output().unwrap());
    assert_eq!(ran.code, Some(1));
    let told = "error: the process that started this rank is gone\n\
                help: DIST_STARTED_BY is for the ranks that dist-cli starts: unset it for others\n";
    assert_eq!(ran.err, told);
}
