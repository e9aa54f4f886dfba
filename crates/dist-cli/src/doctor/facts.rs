//! The machine itself: system, processor, memory, limits. Nothing that is missing is an error here.

use std::fs;
use std::path::PathBuf;

use dist_comm::codec::PROTOCOL_VERSION;
use dist_kernels::cpu::{CpuBackend, CpuOptions, CpuPath};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use super::{Gpu, Network};
use crate::machine;

/// What speaks on a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of the program.
    pub program: String,
    /// The commit that it was built from.
    pub commit: String,
    /// Of what ranks say to each other.
    pub protocol: u16,
}

/// The processor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// Its name.
    pub name: String,
    /// Cores of the machine.
    pub cores: usize,
    /// Cores that this process may use.
    pub cores_allowed: usize,
    /// Cores that the container's quota is worth, if there is one.
    pub cores_quota: Option<f64>,
    /// Instructions that kernels make use of.
    pub features: Vec<String>,
    /// The kernels that will run: `avx2` or `portable`.
    pub path: Option<String>,
}

/// Memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// All.
    pub total: Option<u64>,
    /// What can still be taken.
    pub available: Option<u64>,
    /// Swap space.
    pub swap: Option<u64>,
}

/// What the system allows a process; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Files and connections at once.
    pub open_files: Option<u64>,
    /// Bytes that may be kept from being swapped out.
    pub locked_bytes: Option<u64>,
    /// Processes and threads of the user.
    pub processes: Option<u64>,
}

/// What the machine can do, with all cores.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Reading memory.
    pub read_bytes_per_s: f64,
    /// Multiplying and adding.
    pub flops_per_s: f64,
}

/// One machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Its name.
    pub host: String,
    /// System, kernel, instruction set.
    pub system: String,
    /// What speaks there.
    pub version: Version,
    /// The processor.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Whether large pages are used: `always`, `madvise`, `never`.
    pub huge_pages: Option<String>,
    /// What the system allows.
    pub limits: Limits,
    /// What it can do, where that was measured.
    pub rates: Option<Rates>,
    /// GPUs and their libraries.
    pub gpu: Gpu,
    /// The network.
    pub network: Network,
    /// Where published models are looked up, and whether that folder is there.
    pub model_cache: Option<(PathBuf, bool)>,
}

impl Machine {
    /// This one. `master` is where rank 0 listens, if that is known.
    pub fn of_this(master: Option<&str>, rates: Option<Rates>) -> Self {
        let read = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_default();
        let name = read("/etc/os-release").and_then(|text| os_name(&text));
        let name = name.unwrap_or_else(|| std::env::consts::OS.to_owned());
        Self {
            host: read("/proc/sys/kernel/hostname").unwrap_or_else(|| "this machine".to_owned()),
            system: format!("{name}, kernel {kernel}, {}", std::env::consts::ARCH),
            version: Version {
                program: env!("CARGO_PKG_VERSION").to_owned(),
                commit: env!("DIST_COMMIT").to_owned(),
                protocol: PROTOCOL_VERSION,
            },
            cpu: cpu(read("/proc/cpuinfo").as_deref(), read("/sys/fs/cgroup/cpu.max").as_deref()),
            memory: Memory {
                total: machine::total_bytes(),
                available: machine::available_bytes(),
                swap: machine::swap_bytes(),
            },
            huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| chosen(&text)),
            limits: limits(),
            rates,
            gpu: Gpu::of_this(),
            network: Network::of_this(master),
            model_cache: crate::model::cache_dir().map(|dir| (dir.clone(), dir.is_dir())),
        }
    }
}

fn limits() -> Limits {
    let of = |resource| getrlimit(resource).current;
    Limits {
        open_files: of(Resource::Nofile),
        locked_bytes: of(Resource::Memlock),
        processes: of(Resource::Nproc),
    }
}

fn cpu(info: Option<&str>, quota: Option<&str>) -> Cpu {
    let allowed = std::thread::available_parallelism().map_or(1, Into::into);
    let options = CpuOptions { threads: 1, path: CpuPath::Auto, spin: std::time::Duration::ZERO };
    Cpu {
        name: machine::cpu_name(),
        cores: info.map_or(0, cores).max(allowed),
        cores_allowed: allowed,
        cores_quota: quota.and_then(quota_of),
        features: info.map_or_else(Vec::new, features),
        path: CpuBackend::new(options).ok().map(|backend| backend.describe().path.to_owned()),
    }
}

/// Cores that `/proc/cpuinfo` lists.
fn cores(info: &str) -> usize {
    info.lines().filter(|line| line.starts_with("processor")).count()
}

/// Those of the first core's instruction sets that kernels use or could use.
fn features(info: &str) -> Vec<String> {
    const KNOWN: [&str; 8] = ["avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sha_ni"];
    let line = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let words: Vec<&str> = line.map_or_else(Vec::new, |line| line.split_whitespace().collect());
    KNOWN.iter().filter(|known| words.contains(known)).map(|known| (*known).to_owned()).collect()
}

/// `cpu.max` of a control group: microseconds of each period, or `max`.
fn quota_of(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (period > 0.0).then_some(quota / period)
}

/// The word in brackets, as in `always [madvise] never`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

fn os_name(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(line.trim_matches('"').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu fma avx2 f16c sha_ni\n\nprocessor\t: 1\n\
                        flags\t\t: fpu\n";

    #[test]
    fn the_systems_words_are_understood() {
        assert_eq!(cores(INFO), 2);
        assert_eq!(features(INFO), ["avx2", "fma", "f16c", "sha_ni"]);
        assert_eq!(features(""), [""; 0]);
        assert_eq!(quota_of("150000 100000"), Some(1.5));
        assert_eq!((quota_of("max 100000"), quota_of("1 0"), quota_of("")), (None, None, None));
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("always"), None);
        assert_eq!(os_name("ID=x\nPRETTY_NAME=\"Debian 12\"\n").as_deref(), Some("Debian 12"));
    }

    #[test]
    fn this_machine_has_what_every_machine_has() {
        let machine = Machine::of_this(None, None);
        assert!(machine.cpu.cores_allowed >= 1 && machine.cpu.cores >= machine.cpu.cores_allowed);
        assert!(machine.cpu.path.is_some());
        assert!(!machine.version.commit.is_empty());
    }
}
