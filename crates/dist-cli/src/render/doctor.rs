//! What `doctor` saw, for people and for machines.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use dist_comm::probe::PairReport;
use serde::Serialize;

use crate::doctor::{Device, Finding, Machine, RankFacts, Report, Severity, Version};
use crate::machine::gigabytes;

const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct ReportObject<'a> {
    schema_version: u32,
    is_fit: bool,
    findings: &'a [Finding],
    ranks: &'a [RankFacts],
    pairs: Vec<PairObject>,
}

#[derive(Serialize)]
struct PairObject {
    from: usize,
    to: usize,
    shares_memory: bool,
    round_trip_us: f64,
    bytes_per_s_there: f64,
    bytes_per_s_back: f64,
    clock_offset_us: f64,
    clock_error_us: f64,
}

impl From<&PairReport> for PairObject {
    fn from(pair: &PairReport) -> Self {
        Self {
            from: pair.from.0,
            to: pair.to.0,
            shares_memory: pair.shares_memory,
            round_trip_us: pair.round_trip.as_secs_f64() * 1e6,
            bytes_per_s_there: pair.bytes_per_s_there,
            bytes_per_s_back: pair.bytes_per_s_back,
            clock_offset_us: pair.clock_offset_ns as f64 / 1e3,
            clock_error_us: pair.clock_error_ns as f64 / 1e3,
        }
    }
}

/// The report as one object.
pub fn doctor_json(report: &Report) -> serde_json::Result<String> {
    let object = ReportObject {
        schema_version: SCHEMA_VERSION,
        is_fit: report.is_fit(),
        findings: &report.findings,
        ranks: &report.ranks,
        pairs: report.pairs.iter().map(PairObject::from).collect(),
    };
    Ok(serde_json::to_string(&object)? + "\n")
}

/// The report for people: each machine once, then what lies between ranks, then what is wrong.
pub fn doctor_text(report: &Report) -> String {
    let mut out = String::new();
    let mut told = BTreeSet::new();
    for first in &report.ranks {
        let host = &first.machine.host;
        if !told.insert(host) {
            continue;
        }
        let here = report.ranks.iter().filter(|rank| rank.machine.host == *host);
        let ranks: Vec<_> = here.map(|rank| rank.rank.to_string()).collect();
        let ranks =
            if report.ranks.len() > 1 { format!(": ranks {}", ranks.join(", ")) } else { String::new() };
        let _ = writeln!(out, "{host}{ranks}");
        machine(&mut out, &first.machine);
        out.push('\n');
    }
    if !report.pairs.is_empty() {
        pairs(&mut out, &report.pairs);
    }
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        let _ = writeln!(out, "{severity}: {}", finding.what);
        if let Some(help) = &finding.help {
            let _ = writeln!(out, "  help: {help}");
        }
    }
    if report.is_fit() {
        out.push_str("runs can be expected to work here\n");
    }
    out
}

fn line(out: &mut String, name: &str, told: &str) {
    let _ = writeln!(out, "  {name:<14} {told}");
}

fn limit(value: Option<u64>) -> String {
    value.map_or_else(|| "unlimited".to_owned(), |value| value.to_string())
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "unknown".to_owned(), gigabytes)
}

fn machine(out: &mut String, machine: &Machine) {
    let Machine { version: Version { program, commit, protocol }, cpu, memory, limits, .. } = machine;
    line(out, "program", &format!("dist-cli {program}, commit {commit}, protocol {protocol}"));
    line(out, "system", &machine.system);
    let quota = cpu.cores_quota.map_or_else(String::new, |quota| format!(", quota {quota:.1}"));
    let features = cpu.features.join(" ");
    let path = cpu.path.as_deref().unwrap_or("none");
    line(
        out,
        "processor",
        &format!("{}, {} of {} cores{quota}; {features}", cpu.name, cpu.cores_allowed, cpu.cores),
    );
    line(out, "kernels", path);
    if let Some(rates) = machine.rates {
        let (read, flops) = (rates.read_bytes_per_s / 1e9, rates.flops_per_s / 1e9);
        line(out, "rates", &format!("reads {read:.1} GB/s, multiplies {flops:.0} GFLOP/s"));
    }
    let (total, available, swap) = (size(memory.total), size(memory.available), size(memory.swap));
    let pages = machine.huge_pages.as_deref().unwrap_or("unknown");
    line(out, "memory", &format!("{available} of {total} free, swap {swap}, large pages: {pages}"));
    let (files, locked) =
        (limit(limits.open_files), limits.locked_bytes.map_or("unlimited".into(), gigabytes));
    line(
        out,
        "limits",
        &format!("{files} open files, {locked} locked, {} processes", limit(limits.processes)),
    );
    gpu(out, machine);
    network(out, machine);
    if let Some((dir, is_there)) = &machine.model_cache {
        let there = if *is_there { "" } else { " (not there)" };
        line(out, "model cache", &format!("{}{there}", dir.display()));
    }
}

fn gpu(out: &mut String, machine: &Machine) {
    let gpu = &machine.gpu;
    let driver = gpu.driver.as_ref().map_or_else(|| "no NVIDIA driver".to_owned(), |v| format!("driver {v}"));
    let devices = if gpu.devices.is_empty() { "no GPU".to_owned() } else { gpu.devices.len().to_string() };
    line(out, "GPUs", &format!("{devices}; {driver}"));
    for Device { info, free_bytes, missing_kernels, .. } in &gpu.devices {
        let ((major, minor), total) = (info.capability, gigabytes(info.total_bytes as u64));
        let free = free_bytes.map_or_else(|| "unknown".to_owned(), |bytes| gigabytes(bytes as u64));
        let kernels = if missing_kernels.is_some() { "no kernels" } else { "kernels can be had" };
        let told = format!(
            "{}, compute capability {major}.{minor}, {} multiprocessors, {free} of {total} free; {kernels}",
            info.name, info.n_sms
        );
        line(out, &format!("  {}", info.ordinal), &told);
    }
    for library in &gpu.libraries {
        let told = match (&library.path, &library.version, &library.problem) {
            (Some(path), Some(version), _) => format!("{version} at {}", path.display()),
            (.., Some(problem)) => problem.what.clone(),
            _ => "unknown".to_owned(),
        };
        line(out, &format!("  {}", library.name), &told);
    }
    if let Some(dir) = &gpu.kernel_cache {
        line(out, "  kernel cache", &dir.display().to_string());
    }
}

fn network(out: &mut String, machine: &Machine) {
    let network = &machine.network;
    for interface in &network.interfaces {
        let addresses: Vec<_> = interface.addresses.iter().map(ToString::to_string).collect();
        let rate = interface.megabits_per_s.map_or_else(String::new, |rate| format!(", {rate} Mbit/s"));
        let used =
            if network.used().is_some_and(|used| used == interface) { ", leads to rank 0" } else { "" };
        line(out, "network", &format!("{}: {}{rate}{used}", interface.name, addresses.join(" ")));
    }
    if let (Some(master), Some(Err(why))) = (&network.master, &network.towards_master) {
        line(out, "rank 0", &format!("{master} cannot be reached: {why}"));
    }
}

fn pairs(out: &mut String, pairs: &[PairReport]) {
    let _ = writeln!(
        out,
        "{:>9}  {:<13} {:>13} {:>11} {:>11}  clock offset µs",
        "ranks", "way", "round trip µs", "GB/s there", "GB/s back"
    );
    for pair in pairs {
        let way = if pair.shares_memory { "shared memory" } else { "TCP" };
        let _ = writeln!(
            out,
            "{:>9}  {way:<13} {:>13.1} {:>11.2} {:>11.2}  {:.1} ± {:.1}",
            format!("{}–{}", pair.from.0, pair.to.0),
            pair.round_trip.as_secs_f64() * 1e6,
            pair.bytes_per_s_there / 1e9,
            pair.bytes_per_s_back / 1e9,
            pair.clock_offset_ns as f64 / 1e3,
            pair.clock_error_ns as f64 / 1e3,
        );
    }
    out.push('\n');
}
