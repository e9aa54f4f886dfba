//! Runs the real `dist-cli` in an empty folder, free of the caller's settings, and reads what it wrote.

#![allow(dead_code, reason = "each test binary takes what it needs")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The program in `dir`; no `DIST_*` variable of the caller reaches it.
pub(crate) fn program_in(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dist-cli"));
    command.args(args).current_dir(dir).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DIST_") {
            command.env_remove(name);
        }
    }
    command
}

/// What a run left behind.
pub(crate) struct Ran {
    /// Exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Ran {
    /// Standard output of a run that went well.
    #[track_caller]
    pub(crate) fn well(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }
}

/// Runs in a fresh folder.
pub(crate) fn run(args: &[&str]) -> Ran {
    let dir = tempfile::tempdir().expect("a folder");
    program_in(dir.path(), args).output().expect("dist-cli runs").into()
}

/// Runs with `input` on standard input.
pub(crate) fn run_with_input(args: &[&str], input: &[u8]) -> Ran {
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = program_in(dir.path(), args);
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("dist-cli runs");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_owned();
    // A program that refuses before it has read everything closes the pipe.
    let writing = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().expect("dist-cli ends");
    writing.join().expect("written");
    output.into()
}

/// Runs `infer --json` and reads its object.
pub(crate) fn infer_json(args: &[&str]) -> Value {
    let out = run(&[&["infer", "--json"], args].concat()).well();
    assert_eq!(out.lines().count(), 1, "one object");
    serde_json::from_str(&out).expect("JSON")
}

/// A field of numbers.
pub(crate) fn ids(object: &Value, field: &str) -> Vec<u32> {
    let ids = object[field].as_array().unwrap_or_else(|| panic!("{field} of {object}"));
    ids.iter().map(|id| u32::try_from(id.as_u64().expect("an id")).expect("an id")).collect()
}
