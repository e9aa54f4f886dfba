//! The table of faults, with real processes and real signals: each rank in turn is killed or stopped while it loads,
//! prefills or decodes, and all others end with the right name on standard error, at once or within the deadline, and
//! nobody is left behind.
#![cfg(target_os = "linux")]
#![allow(clippy::print_stdout, reason = "shown with --nocapture: how long it took")]

#[path = "support/ranks.rs"]
mod ranks;
#[path = "support/sentence.rs"]
mod sentence;

use std::time::{Duration, Instant};

use ranks::{Machine, N_RANKS, Phase, Run, run_cases, signal};
use sentence::Sentence;

/// Long, where a loss must be seen at once: whoever waits for it is late.
const LONG_TIMEOUT: Duration = Duration::from_secs(60);
/// A killed process is seen as soon as its connections close; a rank that loads looks when it is done.
const AT_ONCE: Duration = Duration::from_secs(30);

/// What a stopped rank's peers wait for.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Beyond the deadline: the second that is allowed, and what a busy machine may take.
const SLACK: Duration = Duration::from_secs(1 + 14);

/// What is done to a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// `kill -9`.
    Kill,
    /// `SIGSTOP`: it is there, its connections are open, and it says nothing.
    Stop,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    phase: Phase,
    fault: Fault,
    rank: usize,
}

impl Case {
    fn all() -> Vec<Self> {
        let faults = [Fault::Kill, Fault::Stop];
        let of_phase = |phase| {
            let of_fault = move |fault| (0..N_RANKS).map(move |rank| Self { phase, fault, rank });
            faults.into_iter().flat_map(of_fault)
        };
        Phase::ALL.into_iter().flat_map(of_phase).collect()
    }

    fn timeout(self) -> Duration {
        if self.fault == Fault::Kill { LONG_TIMEOUT } else { TIMEOUT }
    }

    fn limit(self) -> Duration {
        if self.fault == Fault::Kill { AT_ONCE } else { TIMEOUT + SLACK }
    }

    /// Starts runs until the fault falls into the phase, which a busy machine may make it miss.
    fn strike(self, start: impl Fn() -> Run) -> Result<Run, String> {
        let name = if self.fault == Fault::Kill { "KILL" } else { "STOP" };
        for _ in 0..3 {
            let run = start();
            run.reach(self.phase, self.rank);
            if signal(run.pid(self.rank), name) && run.was_in(self.phase, self.rank) {
                return Ok(run);
            }
        }
        Err(format!("{:?} was over three times before it could be disturbed", self.phase))
    }

    /// What a survivor wrote: one error, which names the lost rank and, where it waited, how long.
    fn check_sentence(self, err: &str) -> Result<Sentence, String> {
        let sentence = Sentence::of(err)?;
        if sentence.rank != self.rank {
            return Err(format!("blames rank {}: {}", sentence.rank, sentence.text));
        }
        let is_closed = sentence.text.contains("its connections closed");
        if is_closed != (self.fault == Fault::Kill) {
            return Err(format!("takes one fault for the other: {}", sentence.text));
        }
        // A rank may have been waited for a little before it was stopped.
        let waits = TIMEOUT.mul_f32(0.5)..=self.limit();
        match sentence.waited {
            Some(waited) if self.fault == Fault::Stop && !waits.contains(&waited) => {
                Err(format!("waited {waited:?}: {}", sentence.text))
            }
            _ => Ok(sentence),
        }
    }
}

/// Every rank by itself, as on four machines.
#[test]
fn every_survivor_names_the_lost_rank() {
    let survive = |case: &Case| {
        let mut run = case.strike(|| {
            Run::of_four_machines(case.phase, case.timeout(), "", |_, master| Machine {
                master: master.unwrap_or("127.0.0.1:0").to_owned(),
                wrap: Vec::new(),
            })
        })?;
        let struck = Instant::now();
        let ends = run.ends(Some(case.rank), case.limit()).map_err(|error| error + "\n" + &run.told())?;
        let took = struck.elapsed();
        let with_words = |error: String| format!("{error}\n{}", run.told());
        if let Some(end) = ends.iter().find(|end| end.code() != Some(1)) {
            return Err(with_words(format!("a survivor ended with {end}")));
        }
        let mut waits = Vec::new();
        for rank in (0..N_RANKS).filter(|&rank| rank != case.rank) {
            let sentence = case.check_sentence(&run.err(rank));
            waits.extend(sentence.map_err(|error| with_words(format!("rank {rank}: {error}")))?.waited);
        }
        if case.fault == Fault::Stop && waits.is_empty() {
            return Err(with_words("nobody says how long the stopped rank was waited for".to_owned()));
        }
        println!("{case:?}: all others ended after {:.2} s", took.as_secs_f64());
        run.end(case.rank);
        run.nobody_is_left(None, Duration::from_secs(10)).map_err(|error| error + "\n" + &run.told())
    };
    run_cases(&Case::all(), survive);
}

/// One command with its four ranks: the user sees one error, and no process stays.
#[test]
fn one_command_takes_all_its_ranks_down() {
    let take_down = |case: &Case| {
        let mut run = case.strike(|| Run::of_one_command(case.phase, case.timeout()))?;
        let (struck, pid) = (Instant::now(), run.pid(case.rank));
        let with_words = |error: String, run: &Run| format!("{error}\n{}", run.told());
        if case.rank == 0 {
            // Who was started by it goes with it, or gives it up.
            let left = run.nobody_is_left(Some(pid), case.limit());
            left.map_err(|error| with_words(error, &run))?;
            let said = run.err(0);
            let is_told = said.lines().any(|line| line.starts_with("error: ") && line.contains("rank 0 "));
            if case.fault == Fault::Stop && !is_told {
                return Err(with_words("no rank says that rank 0 is stopped".to_owned(), &run));
            }
            run.end(0);
        } else {
            let ends = run.ends(None, case.limit()).map_err(|error| with_words(error, &run))?;
            if ends[0].code() != Some(1) {
                return Err(with_words(format!("the command ended with {}", ends[0]), &run));
            }
            case.check_sentence(&run.err(0)).map_err(|error| with_words(error, &run))?;
            let how = "was ended by SIGKILL (signal 9)";
            if case.fault == Fault::Kill && !run.err(0).contains(how) {
                return Err(with_words(format!("does not say that the process {how}"), &run));
            }
        }
        println!("{case:?}: all gone after {:.2} s", struck.elapsed().as_secs_f64());
        // A stopped rank is gone as well, once the command has ended.
        run.nobody_is_left(None, Duration::from_secs(10)).map_err(|error| with_words(error, &run))
    };
    run_cases(&Case::all(), take_down);
}
