//! Lines as they come, a table for people and a file for the record.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::gpu::{Ceilings, DTYPE, Gpu, LIBRARY};
use crate::origin::origin;

/// What bounds a kernel.
#[derive(Clone, Copy)]
pub(crate) enum Work {
    /// Bytes that must be read.
    Read(usize),
    /// Multiplications and additions.
    Multiply(f64),
    /// Bytes that come from the host, and how many of them the bus carries a second.
    Load { n_bytes: usize, bus: f64 },
    /// None of these: it is as long as it takes.
    Latency,
}

impl Work {
    /// Work a second, and its share of the ceiling.
    fn rate(self, seconds: f64, ceilings: &Ceilings) -> Option<(f64, f64)> {
        let (work, ceiling) = match self {
            Self::Read(n_bytes) => (n_bytes as f64, ceilings.read),
            Self::Multiply(flop) => (flop, ceilings.multiply),
            Self::Load { n_bytes, bus } => (n_bytes as f64, bus),
            Self::Latency => return None,
        };
        Some((work / seconds, work / seconds / ceiling))
    }

    /// A unit for people, how much it is, and digits after the point.
    fn unit(self) -> (&'static str, f64, usize) {
        match self {
            Self::Read(_) => ("TB/s", 1e12, 3),
            Self::Multiply(_) => ("TFLOP/s", 1e12, 0),
            Self::Load { .. } => ("GB/s", 1e9, 1),
            Self::Latency => ("", 1.0, 0),
        }
    }
}

/// What a kernel shall reach.
#[derive(Clone, Copy)]
pub(crate) enum Bar {
    /// Work a second, at least.
    Rate(f64),
    /// Bytes read a second, at least, on the GPU that bars were set for; the same share of reading on one that reads more.
    Read(f64),
    /// Seconds, at most.
    Seconds(f64),
    /// Share of the library's speed, at least.
    Library(f64),
    /// Share of what the bus carries, at least.
    Bus(f64),
}

/// One measurement.
pub(crate) struct Line {
    /// Section, model, op and shape.
    pub(crate) name: String,
    /// The same for programs.
    pub(crate) shape: Value,
    pub(crate) seconds: f64,
    pub(crate) work: Work,
    /// The same work by other columns, in seconds.
    pub(crate) beside: Vec<(&'static str, f64)>,
    /// Which column the engine takes, where it has a choice.
    pub(crate) runs: Option<&'static str>,
    pub(crate) bars: Vec<Bar>,
}

/// What the GPU that bars were set for reads a second: an H100 with 80 GB.
const READ_OF_BARS: f64 = 3.13e12;

/// What is asked of a GPU that reads `ceilings.read` where `least` is asked of that one.
fn read_asked(least: f64, ceilings: &Ceilings) -> f64 {
    least * (ceilings.read / READ_OF_BARS).max(1.0)
}

impl Line {
    /// Whether a bar is met; `None`: what it compares with was not run.
    fn meets(&self, bar: Bar, ceilings: &Ceilings) -> Option<bool> {
        match bar {
            Bar::Rate(least) => self.work.rate(self.seconds, ceilings).map(|(rate, _)| rate >= least),
            Bar::Read(least) => {
                self.work.rate(self.seconds, ceilings).map(|(rate, _)| rate >= read_asked(least, ceilings))
            }
            Bar::Seconds(most) => Some(self.seconds <= most),
            Bar::Library(share) => {
                let (_, library) = self.beside.iter().find(|(name, _)| *name == LIBRARY)?;
                Some(library / self.seconds >= share)
            }
            Bar::Bus(least) => self.work.rate(self.seconds, ceilings).map(|(_, share)| share >= least),
        }
    }

    fn told(&self, bar: Bar, ceilings: &Ceilings) -> String {
        match bar {
            Bar::Read(least) => format!("at least {:.3} TB/s", read_asked(least, ceilings) / 1e12),
            Bar::Rate(least) => {
                let (unit, scale, _) = self.work.unit();
                format!("at least {:.3} {unit}", least / scale)
            }
            Bar::Seconds(most) => format!("at most {:.1} µs", most * 1e6),
            Bar::Library(share) => format!("at least {:.0} % of the library", share * 100.0),
            Bar::Bus(share) => format!("at least {:.0} % of pinned host to device", share * 100.0),
        }
    }

    fn row(&self, ceilings: &Ceilings) -> String {
        let mut row = format!("{:<46} {:>9.2}", self.name, self.seconds * 1e6);
        match self.work.rate(self.seconds, ceilings) {
            Some((rate, share)) => {
                let (unit, scale, digits) = self.work.unit();
                let rate = rate / scale;
                let _ = write!(row, " {rate:>7.digits$} {unit:<7} {:>4.0} %", share * 100.0);
            }
            None => row.push_str(&" ".repeat(23)),
        }
        for (name, seconds) in &self.beside {
            let _ = write!(row, "  {name} {:.2} µs ({:.0} %)", seconds * 1e6, seconds / self.seconds * 100.0);
        }
        if let Some(runs) = self.runs {
            let _ = write!(row, "  runs {runs}");
        }
        for &bar in &self.bars {
            let met = match self.meets(bar, ceilings) {
                Some(true) => "met",
                Some(false) => "NOT MET",
                None => "not met: not run",
            };
            let _ = write!(row, "  [{}: {met}]", self.told(bar, ceilings));
        }
        row
    }

    fn json(&self, ceilings: &Ceilings) -> Value {
        let rate = self.work.rate(self.seconds, ceilings);
        let (key, work) = match self.work {
            Work::Read(n_bytes) => ("read_bytes", Some(n_bytes as f64)),
            Work::Multiply(flop) => ("flop", Some(flop)),
            Work::Load { n_bytes, .. } => ("loaded_bytes", Some(n_bytes as f64)),
            Work::Latency => ("work", None),
        };
        let beside: serde_json::Map<_, _> = self
            .beside
            .iter()
            .map(|&(name, seconds)| (name.to_owned(), json!({ "median_us": seconds * 1e6 })))
            .collect();
        let bars: Vec<Value> = self
            .bars
            .iter()
            .map(|&bar| json!({ "bar": self.told(bar, ceilings), "met": self.meets(bar, ceilings) }))
            .collect();
        json!({
            "name": self.name,
            "dtype": DTYPE.to_string(),
            "shape": self.shape,
            "median_us": self.seconds * 1e6,
            key: work,
            "per_s": rate.map(|(rate, _)| rate),
            "share_of_ceiling": rate.map(|(_, share)| share),
            "beside": beside,
            "runs": self.runs,
            "bars": bars,
        })
    }
}

/// All that was measured so far.
pub(crate) struct Report {
    ceilings: Ceilings,
    origin: Value,
    notes: Vec<String>,
    lines: Vec<Line>,
}

#[expect(clippy::print_stdout, reason = "the table is what a bench is for")]
fn print(text: &str) {
    println!("{text}");
}

impl Report {
    pub(crate) fn new(gpu: &Gpu) -> Self {
        let ceilings = gpu.ceilings;
        let Ceilings { read, copy, multiply } = ceilings;
        print(&format!(
            "{}: reads {:.3} TB/s, copies {:.3} TB/s, multiplies {:.0} TFLOP/s; 16-bit brain floats; medians\n\n\
             {:<46} {:>9} {:>15} {:>6}",
            gpu.backend.describe().name,
            read / 1e12,
            copy / 1e12,
            multiply / 1e12,
            "kernel",
            "µs",
            "a second",
            "share",
        ));
        Self { ceilings, origin: Value::Null, notes: Vec::new(), lines: Vec::new() }
    }

    /// Words between lines.
    pub(crate) fn say(&mut self, words: String) {
        print(&words);
        self.notes.push(words);
    }

    pub(crate) fn push(&mut self, line: Line) {
        print(&line.row(&self.ceilings));
        self.lines.push(line);
    }

    /// Says which bars are met, and where all of it comes from.
    pub(crate) fn end(&mut self, gpu: &mut Gpu) -> dist_kernels::Result<()> {
        self.origin = origin(gpu)?;
        let bars = || self.lines.iter().flat_map(|line| line.bars.iter().map(move |&bar| (line, bar)));
        let n = |met| bars().filter(|(line, bar)| line.meets(*bar, &self.ceilings) == met).count();
        let (met, missed, not_run) = (n(Some(true)), n(Some(false)), n(None));
        print(&format!(
            "\n{} lines; bars: {met} met, {missed} not met, {not_run} not met: not run\n{}",
            self.lines.len(),
            self.origin,
        ));
        Ok(())
    }

    /// The whole record.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        let mut record = self.origin.clone();
        let Ceilings { read, copy, multiply } = self.ceilings;
        let ceilings = json!({ "read_bytes_per_s": read, "copy_bytes_per_s": copy, "flops_per_s": multiply });
        record["ceilings"] = ceilings;
        record["notes"] = json!(self.notes);
        record["results"] = self.lines.iter().map(|line| line.json(&self.ceilings)).collect();
        serde_json::to_string(&record)
    }
}
