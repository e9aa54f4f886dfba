//! Runs of several ranks as real processes: starts them, hears what they say, waits until a rank is in the middle of a
//! phase, and sees who is left.

#![allow(dead_code, reason = "each test binary takes what it needs")]
#![allow(clippy::unwrap_used, reason = "a test may fail here")]

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Ranks of every run: `--tp 2 --pp 2`.
pub(crate) const N_RANKS: usize = 4;

/// How long anything may take that is not under test; a machine may be slow, and shared.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a rank has to compute to be in the middle of a phase, in the system's ticks: 50 ms as they usually are.
const TICKS: u64 = 5;

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// The environment variable by which every process of a run is found, whoever started it.
const MARK: &str = "FAULT_TEST_RUN";

/// What a run is doing when it is disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Weights of a preset are made, which takes a second or more.
    Load,
    /// Many prompts, one new token each.
    Prefill,
    /// Many new tokens.
    Decode,
}

impl Phase {
    pub(crate) const ALL: [Self; 3] = [Self::Load, Self::Prefill, Self::Decode];

    /// A run that is in this phase for long. Steps are short, so that no rank keeps another one waiting.
    fn args(self) -> &'static str {
        match self {
            Self::Load => {
                "--model gpt3-125m --prompt-ids 1,2,3 --max-seq-len 64 --ignore-eos --max-new-tokens 60"
            }
            Self::Prefill => "--prompts prompts.jsonl --cpu-path portable --max-batch-tokens 16",
            Self::Decode => "--ignore-eos --max-new-tokens 450 -n 4 --top-k=0 --cpu-path portable",
        }
    }

    fn prepare(self, dir: &Path) {
        if self == Self::Prefill {
            let ids: Vec<String> = (0..400).map(|i| (i % 250).to_string()).collect();
            let line = format!("{{\"prompt_ids\":[{}],\"max_new_tokens\":1}}\n", ids.join(","));
            std::fs::write(dir.join("prompts.jsonl"), line.repeat(200)).expect("prompts");
        }
    }
}

/// What a process has written so far, and whether it has closed the pipe.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<(Vec<u8>, bool)>>);

impl Heard {
    fn listen(mut pipe: impl Read + Send + 'static) -> Self {
        let heard = Self::default();
        let kept = heard.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut bytes) {
                kept.0.lock().unwrap().0.extend_from_slice(&bytes[..n]);
            }
            kept.0.lock().unwrap().1 = true;
        });
        heard
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap().0).into_owned()
    }

    fn is_empty(&self) -> bool {
        self.0.lock().unwrap().0.is_empty()
    }

    fn is_closed(&self) -> bool {
        self.0.lock().unwrap().1
    }
}

/// A process of a run that the test itself has started.
struct Started {
    child: Child,
    out: Heard,
    err: Heard,
}

/// A run. Dropping it ends whatever is left of it.
pub(crate) struct Run {
    dir: TempDir,
    mark: String,
    started: Vec<Started>,
}

/// Where each of several machines is, and what comes before its command line.
pub(crate) struct Machine {
    /// Where this machine finds rank 0; port 0 on the first one.
    pub(crate) master: String,
    /// A program that runs another one, with its arguments.
    pub(crate) wrap: Vec<String>,
}

impl Run {
    fn new(phase: Phase) -> Self {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let dir = tempfile::tempdir().expect("a folder");
        phase.prepare(dir.path());
        let mark = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        Self { dir, mark, started: Vec::new() }
    }

    /// One command that starts its four ranks itself.
    pub(crate) fn of_one_command(phase: Phase, timeout: Duration) -> Self {
        let mut run = Self::new(phase);
        run.start(&[], &format!("{} --collective-timeout {}", phase.args(), timeout.as_secs()));
        run
    }

    /// Four commands, each one rank, as on four machines: what each of them says and how it ends is seen. `machine` is
    /// told the rank and where rank 0 listens, once that is known.
    pub(crate) fn of_four_machines(
        phase: Phase,
        timeout: Duration,
        flags: &str,
        mut machine: impl FnMut(usize, Option<&str>) -> Machine,
    ) -> Self {
        let mut run = Self::new(phase);
        let mut listens: Option<String> = None;
        for rank in 0..N_RANKS {
            let Machine { master, wrap } = machine(rank, listens.as_deref());
            let nodes = format!("--nnodes {N_RANKS} --node-rank {rank} --master {master}");
            let args = phase.args();
            run.start(&wrap, &format!("{args} {nodes} --collective-timeout {} {flags}", timeout.as_secs()));
            if rank == 0 {
                let line = "rank 0 listens at ";
                let find = || Some(run.err(0).split_once(line)?.1.split_once(';')?.0.to_owned());
                run.until("rank 0 listens", || find().is_some());
                listens = find();
            }
        }
        run
    }

    fn start(&mut self, wrap: &[String], args: &str) {
        let program = env!("CARGO_BIN_EXE_dist-cli");
        let mut command = match wrap {
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DIST_") {
                command.env_remove(name);
            }
        }
        command
            .args(["infer", "-v", "--tp", "2", "--pp", "2", "--threads", "1"])
            .args(args.split_whitespace());
        command
            .env(MARK, &self.mark)
            .env("DIST_SECRET", "a secret of the tests, long enough")
            .stdin(Stdio::null());
        command.current_dir(self.dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("dist-cli starts");
        let out = Heard::listen(child.stdout.take().expect("piped"));
        let err = Heard::listen(child.stderr.take().expect("piped"));
        self.started.push(Started { child, out, err });
    }

    /// What `rank` wrote to standard error, or for a rank that another one started, what that one passed on.
    pub(crate) fn err(&self, rank: usize) -> String {
        self.started.get(rank).unwrap_or(&self.started[0]).err.text()
    }

    /// All that was said, for a message.
    pub(crate) fn told(&self) -> String {
        let of = |(i, started): (usize, &Started)| format!("--- process {i}:\n{}", started.err.text());
        self.started.iter().enumerate().map(of).collect()
    }

    #[track_caller]
    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "waited in vain until {what}\n{}", self.told());
            std::thread::sleep(LOOK);
        }
    }

    /// The process of a rank, from the line that it or its parent writes.
    pub(crate) fn pid(&self, rank: usize) -> u32 {
        let line = format!("rank {rank}: pid ");
        let find = || self.err(rank).lines().find_map(|text| text.strip_prefix(&line)?.parse().ok());
        self.until(&line, || find().is_some());
        find().expect("just seen")
    }

    fn has_weights(&self, rank: usize) -> bool {
        self.err(rank).contains(&format!("rank {rank}: weights in "))
    }

    /// Waits until `rank` computes in the middle of `phase`.
    pub(crate) fn reach(&self, phase: Phase, rank: usize) {
        let pid = self.pid(rank);
        match phase {
            Phase::Load => {
                let met = format!("rank {rank}: met {N_RANKS} ranks");
                self.until(&met, || self.err(rank).contains(&met));
            }
            Phase::Prefill => {
                self.until("all have their weights", || (0..N_RANKS).all(|rank| self.has_weights(rank)));
            }
            Phase::Decode => self.until("text comes", || !self.started[0].out.is_empty()),
        }
        let before = cpu_ticks(pid);
        self.until("it computes", || cpu_ticks(pid) >= before + TICKS);
    }

    /// Whether `rank` was disturbed in time; asked after the disturbance.
    pub(crate) fn was_in(&self, phase: Phase, rank: usize) -> bool {
        phase != Phase::Load || !self.has_weights(rank)
    }

    /// How the processes that the test has started ended, all but `except`; an error names those that go on.
    pub(crate) fn ends(&mut self, except: Option<usize>, limit: Duration) -> Result<Vec<ExitStatus>, String> {
        let until = Instant::now() + limit;
        let mut ends = Vec::new();
        for (rank, started) in self.started.iter_mut().enumerate() {
            if Some(rank) == except {
                continue;
            }
            loop {
                match started.child.try_wait().expect("a child") {
                    // Its last words may still be in the pipe.
                    Some(status) if started.err.is_closed() => break ends.push(status),
                    _ if Instant::now() > until => {
                        return Err(format!("rank {rank} still runs after {limit:?}"));
                    }
                    _ => std::thread::sleep(LOOK),
                }
            }
        }
        Ok(ends)
    }

    /// Waits until no process of the run is left but `except`; an error lists those that are.
    pub(crate) fn nobody_is_left(&self, except: Option<u32>, limit: Duration) -> Result<(), String> {
        let until = Instant::now() + limit;
        loop {
            let left: Vec<u32> = marked(&self.mark).into_iter().filter(|&pid| Some(pid) != except).collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(format!("processes {left:?} are left after {limit:?}"));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Ends `rank` if the test has started it, which a stopped rank does not do by itself.
    pub(crate) fn end(&mut self, rank: usize) {
        if let Some(started) = self.started.get_mut(rank) {
            // It may have ended.
            let _ = started.child.kill();
            started.child.wait().expect("a child");
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for rank in 0..self.started.len() {
            self.end(rank);
        }
        for pid in marked(&self.mark) {
            signal(pid, "KILL");
        }
    }
}

/// Sends a signal; whether there was somebody to get it.
pub(crate) fn signal(pid: u32, name: &str) -> bool {
    let kill =
        Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
    kill.expect("kill runs").success()
}

/// Processes with the mark in their environment; one that has ended has none.
fn marked(mark: &str) -> Vec<u32> {
    let wanted = format!("{MARK}={mark}");
    let entries = std::fs::read_dir("/proc").expect("processes");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|&byte| byte == 0).any(|variable| variable == wanted.as_bytes())
    })
    .collect()
}

/// Time that a process has computed, in the system's ticks.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold spaces; user and system time are the 12th and 13th field after it.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// Runs cases side by side, two at a time, and tells of all that failed.
pub(crate) fn run_cases<T: Sync + std::fmt::Debug>(
    cases: &[T],
    run: impl Fn(&T) -> Result<(), String> + Sync,
) {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = run(case) {
                        failed.lock().unwrap().push(format!("{case:?}: {error}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} cases failed\n\n{}", failed.len(), cases.len(), failed.join("\n\n"));
}
