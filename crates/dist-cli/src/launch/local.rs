//! Ranks as processes of this program on this machine: started with private orders, heard, watched, and ended with
//! whoever started them.
//!
//! A rank gets its orders, the secret among them, through a pipe on its standard input, since it reads no prompts. It
//! asks the system to be killed as soon as the thread that started it ends (`PR_SET_PDEATHSIG`), so ranks are started
//! on the main thread. Ctrl-C of a terminal reaches all processes of a run; ranks leave it to the one that the user sees.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dist_core::Rank;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;
use crate::render::Console;

/// Marks a process that was started as a rank; its value is the process that did.
const STARTED_BY: &str = "DIST_STARTED_BY";

/// Longest orders.
const ORDERS_MAX: u64 = 64 << 10;

/// Lines of a rank's last words that are kept.
const WORDS_MAX: usize = 100;

/// How long a rank that should end by itself may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a rank is told by the process that starts it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orders {
    /// Which rank it is.
    pub rank: usize,
    /// Ranks in all.
    pub world_size: usize,
    /// Which one it is on this machine.
    pub local_rank: usize,
    /// Ranks on this machine.
    pub local_size: usize,
    /// Where rank 0 listens.
    pub master: Vec<SocketAddr>,
    /// What all ranks share.
    pub secret: Vec<u8>,
}

/// In a process that was started as a rank: ties its life to the one that started it. To be called before anything else.
pub fn follow_parent() -> anyhow::Result<bool> {
    let Some(parent) = std::env::var_os(STARTED_BY) else { return Ok(false) };
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, getppid, set_parent_process_death_signal};
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before that took hold.
        let now = getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
        if parent.to_str() != Some(now.to_string().as_str()) {
            let problem = Problem::failed("the process that started this rank is gone");
            let help = format!("{STARTED_BY} is for the ranks that dist-cli starts: unset it for others");
            return Err(problem.help(help).into());
        }
    }
    #[cfg(not(target_os = "linux"))]
    drop(parent);
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::new(AtomicBool::new(false)))?;
    Ok(true)
}

/// Says why this rank ends where the user sees it, if the process that started it is stopped and passes nothing on.
pub fn tell_for_stopped_parent(told: &str) {
    if is_parent_stopped() {
        // Nobody is left who could hear that this failed.
        let _ = writeln!(io::stdout(), "{told}");
    }
}

#[cfg(target_os = "linux")]
fn is_parent_stopped() -> bool {
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    // The state is the word after the name, which stands in brackets and may hold anything.
    let stat = std::fs::read_to_string(format!("/proc/{parent}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| matches!(rest.trim_start().chars().next(), Some('T' | 't')))
}

#[cfg(not(target_os = "linux"))]
fn is_parent_stopped() -> bool {
    false
}

/// The orders of this process, if it was started as a rank.
pub fn orders() -> anyhow::Result<Option<Orders>> {
    if std::env::var_os(STARTED_BY).is_none() {
        return Ok(None);
    }
    let mut text = String::new();
    io::stdin().take(ORDERS_MAX).read_to_string(&mut text)?;
    Ok(Some(serde_json::from_str(&text)?))
}

/// Ranks that this process has started. Dropping it ends them, with force where they do not end by themselves.
#[derive(Debug, Default)]
pub struct LocalRanks {
    ranks: Vec<LocalRank>,
    /// Whether they should end by themselves now.
    is_hopeless: bool,
}

#[derive(Debug)]
struct LocalRank {
    rank: Rank,
    child: Child,
    ended: Option<ExitStatus>,
    words: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

/// A rank that ended when it should not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which one.
    pub rank: Rank,
    /// How: its exit code or its signal.
    pub how: String,
    /// What it said at the end, without `error:`.
    pub words: Option<String>,
    /// What it said to do.
    pub help: Option<String>,
}

impl LocalRanks {
    /// Starts one more rank with the words of our own command line.
    pub fn start(&mut self, orders: &Orders, console: &Console) -> anyhow::Result<()> {
        let rank = Rank(orders.rank);
        let cannot = |error| Problem::failed(format!("cannot start {rank}")).because(error);
        let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
        command.args(std::env::args_os().skip(1)).env(STARTED_BY, std::process::id().to_string());
        // Ranks write no results: their standard output is our standard error, for when we are stopped.
        command.stdin(Stdio::piped()).stdout(io::stderr()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(cannot)?;
        console.of_rank(rank, &format!("pid {}", child.id()));
        let words = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|stderr| {
            let words = Arc::clone(&words);
            std::thread::spawn(move || listen(rank, stderr, &words))
        });
        let stdin = child.stdin.take();
        self.ranks.push(LocalRank { rank, child, ended: None, words, reader });
        let told = serde_json::to_vec(orders)?;
        if let Some(mut stdin) = stdin {
            // One that has ended already takes no orders; how it ended is seen where all are watched.
            let _ = stdin.write_all(&told);
        }
        Ok(())
    }

    /// The first rank that has ended.
    pub fn ended(&mut self) -> Option<Ended> {
        self.ranks.iter_mut().find_map(LocalRank::end_seen)
    }

    /// How `rank` ended, if it was one of ours, waiting a moment for it.
    pub fn end_of(&mut self, rank: Rank) -> Option<Ended> {
        let local = self.ranks.iter_mut().find(|local| local.rank == rank)?;
        local.wait_until(Instant::now() + Duration::from_millis(200));
        local.end_seen()
    }

    /// The run has failed: nobody need wait for them.
    pub fn give_up(&mut self) {
        self.is_hopeless = true;
    }
}

impl Drop for LocalRanks {
    fn drop(&mut self) {
        let patience = if self.is_hopeless { PATIENCE / 4 } else { PATIENCE };
        let until = Instant::now() + patience;
        for local in &mut self.ranks {
            local.wait_until(until);
        }
        for local in self.ranks.iter_mut().filter(|local| local.ended.is_none()) {
            // It may end in this very moment.
            let _ = local.child.kill();
            let _ = local.child.wait();
        }
        for local in &mut self.ranks {
            local.hear_out();
        }
    }
}

impl LocalRank {
    fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap_or(None);
        }
        self.ended.is_some()
    }

    fn wait_until(&mut self, until: Instant) {
        let mut pause = Duration::from_millis(1);
        while !self.has_ended() && Instant::now() < until {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// All that it wrote has been read.
    fn hear_out(&mut self) {
        if let Some(reader) = self.reader.take() {
            // A reader that panicked has nothing more to say.
            let _ = reader.join();
        }
    }

    fn end_seen(&mut self) -> Option<Ended> {
        if !self.has_ended() {
            return None;
        }
        self.hear_out();
        let words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let after = |prefix: &str| words.iter().find_map(|line| Some(line.strip_prefix(prefix)?.to_owned()));
        let told: Vec<_> = words
            .iter()
            .filter(|line| !line.starts_with("help: "))
            .map(|line| line.trim_start_matches("error: ").trim_start_matches("cause: "))
            .collect();
        Some(Ended {
            rank: self.rank,
            how: self.ended.map_or_else(String::new, describe),
            words: (!told.is_empty()).then(|| told.join(": ")),
            help: after("help: "),
        })
    }
}

/// How a process ended, in words.
fn describe(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
        return format!("was ended by {name} (signal {signal})");
    }
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => "ended".to_owned(),
    }
}

/// Passes a rank's lines on, but keeps its last words: the one clear error is for who started it to write.
fn listen(rank: Rank, stderr: impl Read, words: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    let mut is_dying = false;
    let own = format!("{rank}: ");
    while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        is_dying = is_dying || text.starts_with("error: ");
        if is_dying {
            let mut words = words.lock().unwrap_or_else(PoisonError::into_inner);
            if words.len() < WORDS_MAX {
                words.push(text);
            }
        } else if text.starts_with(&own) {
            Console::pass_on(&text);
        } else {
            Console::pass_on(&format!("{own}{text}"));
        }
    }
}
