//! Standard error: errors, warnings, start-up phases, the last line.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::time::Duration;

use crate::cli::{ColorFlag, MannerArgs};
use crate::generation::{Run, Timings};
use crate::problem::help_of;
use crate::prompts::Job;
use crate::session::DeviceReport;

/// How to speak.
#[derive(Debug)]
pub struct Console {
    color: bool,
    quiet: bool,
    verbose: u8,
    is_terminal: bool,
}

impl Console {
    /// As the flags say.
    pub fn new(manner: &MannerArgs) -> Self {
        let color = match manner.color {
            ColorFlag::Auto => Self::plain().color,
            ColorFlag::Always => true,
            ColorFlag::Never => false,
        };
        Self { color, quiet: manner.quiet, verbose: manner.verbose, ..Self::plain() }
    }

    /// Before any flag is known.
    pub fn plain() -> Self {
        let is_terminal = io::stderr().is_terminal();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { color: is_terminal && !no_color, quiet: false, verbose: 0, is_terminal }
    }

    /// Whether bars may be drawn.
    pub fn has_bars(&self) -> bool {
        self.is_terminal && !self.quiet
    }

    /// Whether a person sees both outputs as one text.
    pub fn is_conversation(&self) -> bool {
        self.has_bars() && io::stdout().is_terminal()
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A reader that went away is nobody's fault.
    fn line(text: &str) {
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// An error: what, why, what to do.
    pub fn error(&self, error: &anyhow::Error) {
        Self::line(&self.told(error));
    }

    /// The same in words.
    pub fn told(&self, error: &anyhow::Error) -> String {
        let mut told = format!("{} {error}", self.paint("1;31", "error:"));
        let mut last = error.to_string();
        for cause in error.chain().skip(1) {
            let cause = cause.to_string();
            // Errors that pass their cause on as it is would say everything twice.
            if cause != last {
                let _ = write!(told, "\n{} {cause}", self.paint("1", "cause:"));
            }
            last = cause;
        }
        if let Some(help) = help_of(error) {
            let _ = write!(told, "\n{} {help}", self.paint("1;36", "help:"));
        }
        told
    }

    /// What clap has against the command line, in the shape of all other errors. `command` is what was typed,
    /// `variable` what a wrong value comes from if it was not.
    pub fn usage(&self, told: &clap::Error, command: &str, variable: Option<&str>) {
        let rendered = told.render().to_string();
        let mut has_tip = false;
        for line in rendered.lines().filter(|line| !line.trim().is_empty()) {
            let told = if let Some(error) = line.strip_prefix("error: ") {
                let from = variable.map(|name| format!("\n{} {name} says so", self.paint("1;31", "cause:")));
                format!("{} {error}{}", self.paint("1;31", "error:"), from.unwrap_or_default())
            } else if let Some(tip) = line.strip_prefix("  tip: ") {
                has_tip = true;
                format!("{} {tip}", self.paint("1;36", "help:"))
            } else if line.starts_with("For more information") {
                if has_tip {
                    continue;
                }
                format!("{} see {command} --help", self.paint("1;36", "help:"))
            } else {
                line.to_owned()
            };
            Self::line(&told);
        }
    }

    /// Something to know, though nothing is wrong yet.
    pub fn warning(&self, text: &str) {
        if !self.quiet {
            Self::line(&format!("{} {text}", self.paint("1;33", "warning:")));
        }
    }

    /// What happens now.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            Self::line(text);
        }
    }

    /// A start-up phase that is over.
    pub fn phase(&self, name: &str, took: Duration) {
        if self.verbose > 0 {
            Self::line(&self.paint("2", &format!("{name}: {:.3} s", took.as_secs_f64())));
        }
    }

    /// What a rank has done or is.
    pub fn of_rank(&self, rank: dist_core::Rank, text: &str) {
        if self.verbose > 0 {
            Self::line(&self.paint("2", &format!("{rank}: {text}")));
        }
    }

    /// A line of another process.
    pub fn pass_on(line: &str) {
        Self::line(line);
    }

    /// Text that a person reads before what comes on standard output.
    pub fn lead_in(&self, text: &str) {
        let _ = write!(io::stderr(), "{}", self.paint("2", text));
        let _ = io::stderr().flush();
    }

    /// The one line after a run.
    pub fn summary(&self, model: &str, device: &DeviceReport, jobs: &[Job], run: &Run) {
        if self.quiet {
            return;
        }
        let n_prompt: usize = jobs.iter().map(|job| job.ids.len()).sum();
        let n_new: usize = run.answers.iter().map(crate::generation::Answer::n_new).sum();
        let timings = Timings::of(run.answers.iter().flat_map(|answer| &answer.samples));
        let ms = |duration: Option<Duration>| {
            duration
                .map_or_else(|| "-".to_owned(), |duration| format!("{:.2} ms", duration.as_secs_f64() * 1e3))
        };
        let seed = match jobs {
            [job] if job.sampling.temperature > 0.0 => format!(" | seed {}", job.sampling.seed),
            _ => String::new(),
        };
        let line = format!(
            "{model} | {}, {}, {} | {n_prompt} prompt + {n_new} new tokens{seed} | TTFT {} | TPOT {} | {} tok/s",
            device.name,
            if device.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", device.threads) },
            device.path,
            ms(timings.ttft),
            ms(timings.tpot),
            timings.tokens_per_s.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}")),
        );
        Self::line(&self.paint("2", &line));
    }

    /// Log-probabilities of a text run, a token a line.
    pub fn logprobs(run: &Run, token: &dyn Fn(u32) -> String) {
        for answer in &run.answers {
            for (idx, sample) in answer.samples.iter().enumerate() {
                Self::line(&format!("sample {}: log-probability, token, likeliest", idx + 1));
                for drawn in &sample.tokens {
                    let top = drawn.top.iter().map(|&(id, logprob)| format!("{} {logprob:.4}", token(id)));
                    let top = top.collect::<Vec<_>>().join("  ");
                    Self::line(&format!("{:>9.4}  {:<16}  {top}", drawn.logprob, token(drawn.id)));
                }
            }
        }
    }
}
