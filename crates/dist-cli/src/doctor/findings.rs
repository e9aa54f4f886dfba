//! What is wrong or worth knowing, and what to do about it. Facts in, findings out.

use std::collections::BTreeMap;
use std::time::Duration;

use dist_comm::probe::PairReport;
use serde::{Deserialize, Serialize};

use super::{Machine, RankFacts};
use crate::machine::gigabytes;

/// Below this even small models do not run.
const AVAILABLE_MIN: u64 = 512 << 20;
/// Connections of many ranks, files of a checkpoint's shards.
const OPEN_FILES_MIN: u64 = 256;
/// A CPU that reads slower than this is starved by others or by its settings.
const READ_MIN: f64 = 4e9;
/// Between machines, decoding with tensor parallelism waits for this many times a layer twice.
const ROUND_TRIP_MAX: Duration = Duration::from_micros(500);
/// Within a machine more than this means that ranks wait for a core.
const LOCAL_ROUND_TRIP_MAX: Duration = Duration::from_micros(100);
/// Slower links than this are slower than what one core adds up.
const LINK_MIN: f64 = 100e6;
/// Clocks that are further apart make logs of two machines unreadable.
const SKEW_MAX: Duration = Duration::from_millis(100);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know.
    Note,
    /// It will work, but badly.
    Warning,
    /// It will not work.
    Error,
}

/// Something to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What.
    pub what: String,
    /// What to do.
    pub help: Option<String>,
}

impl Finding {
    fn new(severity: Severity, what: impl Into<String>, help: impl Into<String>) -> Self {
        let help = help.into();
        Self { severity, what: what.into(), help: (!help.is_empty()).then_some(help) }
    }
}

/// All findings, worst first.
pub fn findings(ranks: &[RankFacts], pairs: &[PairReport]) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut hosts: BTreeMap<&str, Vec<&RankFacts>> = BTreeMap::new();
    for rank in ranks {
        hosts.entry(&rank.machine.host).or_default().push(rank);
    }
    let many = hosts.len() > 1;
    for (host, ranks) in &hosts {
        let machine = &ranks[0].machine;
        let at = if many { format!("{host}: ") } else { String::new() };
        for mut finding in of_machine(machine).into_iter().chain(of_share(ranks, machine)) {
            finding.what.insert_str(0, &at);
            found.push(finding);
        }
    }
    found.extend(of_versions(ranks));
    found.extend(pairs.iter().flat_map(|pair| of_pair(pair, ranks)));
    found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    found
}

fn of_machine(machine: &Machine) -> Vec<Finding> {
    let (cpu, memory) = (&machine.cpu, machine.memory);
    let mut found = Vec::new();
    let mut say = |severity, what: String, help: &str| found.push(Finding::new(severity, what, help));
    if cpu.path.is_none() {
        say(Severity::Error, "no CPU kernels can be started".to_owned(), "run with -v for the reason");
    } else if cpu.path.as_deref() == Some("portable") {
        let what = "the processor has no AVX2 with FMA and F16C: kernels run many times slower".to_owned();
        say(Severity::Warning, what, "use a machine with AVX2, or a small model");
    }
    if let Some(quota) = cpu.cores_quota.filter(|&quota| quota < cpu.cores_allowed as f64) {
        let what =
            format!("the container may use {quota:.1} of {} cores: threads will stall", cpu.cores_allowed);
        say(Severity::Warning, what, &format!("give --threads {}", (quota.floor() as usize).max(1)));
    }
    match memory.available {
        Some(bytes) if bytes < AVAILABLE_MIN => {
            let what = format!("only {} of memory are free", gigabytes(bytes));
            say(Severity::Error, what, "end other programs, or raise the container's limit");
        }
        None => say(Severity::Note, "the system does not tell how much memory is free".to_owned(), ""),
        Some(_) => {}
    }
    if machine.limits.open_files.is_some_and(|limit| limit < OPEN_FILES_MIN) {
        let what = "few files may be open at once".to_owned();
        say(Severity::Warning, what, "raise the limit: ulimit -n 4096");
    }
    if machine.huge_pages.as_deref() == Some("never") {
        let what = "large memory pages are switched off: reading weights is slower".to_owned();
        say(Severity::Note, what, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled");
    }
    if machine.rates.is_some_and(|rates| rates.read_bytes_per_s < READ_MIN) {
        let what = "memory is read slowly: another program may be busy".to_owned();
        say(Severity::Warning, what, "look with top, then run doctor again");
    }
    if let Some(Err(why)) = &machine.network.towards_master {
        let master = machine.network.master.as_deref().unwrap_or("rank 0");
        let what = format!("{master}, where rank 0 listens, cannot be reached: {why}");
        say(Severity::Error, what, "give an address that all machines reach: --master HOST:PORT");
    }
    found.extend(of_gpu(machine));
    found
}

/// Machines without an NVIDIA driver have nothing to be told about GPUs.
fn of_gpu(machine: &Machine) -> Vec<Finding> {
    let gpu = &machine.gpu;
    let mut found = Vec::new();
    let is_there = gpu.driver.is_some() || gpu.libraries.iter().any(|library| library.path.is_some());
    if let Some(problem) = gpu.problem.as_ref().filter(|_| is_there) {
        found.push(Finding::new(Severity::Note, &problem.what, problem.help.clone().unwrap_or_default()));
    }
    for device in &gpu.devices {
        let name = format!("GPU {} ({})", device.info.ordinal, device.info.name);
        if let Some(problem) = &device.problem {
            let what = format!("{name} cannot be used: {}", problem.what);
            found.push(Finding::new(Severity::Warning, what, problem.help.clone().unwrap_or_default()));
        } else if let Some(why) = &device.missing_kernels {
            let help = "pip install nvidia-cuda-nvrtc==13.0.88, or fill the cache: dist-cli kernels build";
            found.push(Finding::new(Severity::Warning, format!("{name} has no kernels: {why}"), help));
        }
    }
    found
}

/// Ranks that share a machine.
fn of_share(ranks: &[&RankFacts], machine: &Machine) -> Option<Finding> {
    let (n, cores) = (ranks.len(), machine.cpu.cores_allowed);
    (n > cores).then(|| {
        let what = format!("{n} ranks share {cores} cores: each waits for the others");
        Finding::new(Severity::Warning, what, "start at most one rank a core on a machine")
    })
}

fn of_versions(ranks: &[RankFacts]) -> Vec<Finding> {
    let Some(first) = ranks.first() else { return Vec::new() };
    let others = ranks.iter().filter(|rank| rank.machine.version != first.machine.version);
    let tell = |rank: &RankFacts| {
        let (ours, theirs) = (&first.machine.version, &rank.machine.version);
        let what = format!(
            "rank {} on {} runs {} ({}), rank 0 runs {} ({})",
            rank.rank, rank.machine.host, theirs.program, theirs.commit, ours.program, ours.commit
        );
        Finding::new(Severity::Error, what, "install the same program on all machines")
    };
    others.map(tell).collect()
}

fn of_pair(pair: &PairReport, ranks: &[RankFacts]) -> Vec<Finding> {
    let mut found = Vec::new();
    let host = |rank: dist_core::Rank| ranks.get(rank.0).map(|facts| facts.machine.host.as_str());
    let is_local = host(pair.from) == host(pair.to);
    let (from, to) = (pair.from, pair.to);
    let limit = if is_local { LOCAL_ROUND_TRIP_MAX } else { ROUND_TRIP_MAX };
    if pair.round_trip > limit {
        let micros = pair.round_trip.as_secs_f64() * 1e6;
        let what = format!("{from} and {to} need {micros:.0} µs for question and answer");
        let help = if is_local {
            "leave each rank a core of its own"
        } else {
            "keep ranks of one layer on one machine: --pp between machines, --tp inside"
        };
        found.push(Finding::new(Severity::Warning, what, help));
    }
    let slowest = pair.bytes_per_s_there.min(pair.bytes_per_s_back);
    if slowest < LINK_MIN {
        let what = format!("only {:.0} MB/s between {from} and {to}", slowest / 1e6);
        let help = "check which interface leads there, and choose it with --master ADDRESS:PORT";
        found.push(Finding::new(Severity::Warning, what, help));
    }
    let skew = Duration::from_nanos(pair.clock_offset_ns.unsigned_abs().saturating_sub(pair.clock_error_ns));
    if skew > SKEW_MAX {
        let what = format!("the clocks of {from} and {to} are {:.1} s apart", skew.as_secs_f64());
        found.push(Finding::new(Severity::Warning, what, "set them by NTP: timedatectl set-ntp true"));
    }
    found
}

#[cfg(test)]
mod tests {
    use dist_core::Rank;

    use super::*;

    fn rank(rank: usize, host: &str) -> RankFacts {
        let mut machine = Machine::of_this(None, None);
        host.clone_into(&mut machine.host);
        machine.cpu.cores_allowed = 2;
        machine.cpu.cores_quota = None;
        machine.memory.available = Some(8 << 30);
        RankFacts { rank, pid: 1, local_size: 1, machine }
    }

    fn pair() -> PairReport {
        PairReport {
            from: Rank(0),
            to: Rank(1),
            shares_memory: false,
            round_trip: Duration::from_micros(50),
            bytes_per_s_there: 1e9,
            bytes_per_s_back: 1e9,
            clock_offset_ns: 1000,
            clock_error_ns: 500,
        }
    }

    fn errors(ranks: &[RankFacts]) -> Vec<String> {
        let found = findings(ranks, &[]).into_iter();
        found.filter(|finding| finding.severity == Severity::Error).map(|finding| finding.what).collect()
    }

    #[test]
    fn little_memory_and_no_way_to_rank_0_are_errors() {
        let mut one = rank(0, "a");
        assert_eq!(errors(&[one.clone()]), [""; 0]);
        one.machine.memory.available = Some(100 << 20);
        one.machine.network.towards_master = Some(Err("nobody knows it".to_owned()));
        one.machine.network.master = Some("far:1".to_owned());
        assert_eq!(errors(&[one]).len(), 2);
    }

    #[test]
    fn other_versions_are_errors_that_name_the_machine() {
        let (ours, mut theirs) = (rank(0, "a"), rank(1, "b"));
        theirs.machine.version.commit = "0000".to_owned();
        let found = errors(&[ours, theirs]);
        assert!(found.len() == 1 && found[0].contains("rank 1 on b"), "{found:?}");
    }

    #[test]
    fn links_are_judged_by_where_they_lead() {
        let what = |pair: &PairReport, hosts: [&str; 2]| {
            let ranks = [rank(0, hosts[0]), rank(1, hosts[1])];
            let found = of_pair(pair, &ranks);
            found.into_iter().map(|finding| finding.what).collect::<Vec<_>>().join("; ")
        };
        assert_eq!(what(&pair(), ["a", "b"]), "");
        let slow = PairReport { round_trip: Duration::from_micros(200), ..pair() };
        assert_eq!(what(&slow, ["a", "b"]), "");
        assert!(what(&slow, ["a", "a"]).contains("200 µs"));
        let thin = PairReport { bytes_per_s_back: 5e6, ..pair() };
        assert!(what(&thin, ["a", "b"]).contains("5 MB/s"));
        let skewed = PairReport { clock_offset_ns: -3_000_000_000, ..pair() };
        assert!(what(&skewed, ["a", "b"]).contains("3.0 s apart"));
        // What the measurement cannot tell apart is no skew.
        let blurred = PairReport { clock_error_ns: 3_000_000_000, ..skewed };
        assert_eq!(what(&blurred, ["a", "b"]), "");
    }

    #[test]
    fn too_many_ranks_a_machine_are_told() {
        let ranks: Vec<_> = (0..3).map(|idx| rank(idx, "a")).collect();
        let found = findings(&ranks, &[]);
        assert!(found.iter().any(|finding| finding.what.contains("3 ranks share 2 cores")), "{found:?}");
    }
}
