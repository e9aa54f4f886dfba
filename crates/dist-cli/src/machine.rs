//! What this machine is and has: its processor's name and the memory that is left.

use std::fs;

/// The processor's name, as the system tells it.
pub fn cpu_name() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Bytes that a process can still take; `None` where the system does not tell.
pub fn available_bytes() -> Option<u64> {
    let free = meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable")?;
    Some(cgroup_bytes().map_or(free, |of_group| of_group.min(free)))
}

/// All memory.
pub fn total_bytes() -> Option<u64> {
    meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal")
}

/// Swap space.
pub fn swap_bytes() -> Option<u64> {
    meminfo(&fs::read_to_string("/proc/meminfo").ok()?, "SwapTotal")
}

fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// What a container may still take beside the page cache, which it can drop.
fn cgroup_bytes() -> Option<u64> {
    let dir = "/sys/fs/cgroup";
    let max: u64 = fs::read_to_string(format!("{dir}/memory.max")).ok()?.trim().parse().ok()?;
    let stat = fs::read_to_string(format!("{dir}/memory.stat")).ok()?;
    let anon = stat.lines().find_map(|line| line.strip_prefix("anon ")?.trim().parse::<u64>().ok())?;
    Some(max.saturating_sub(anon))
}

/// Whether this process may run on fewer cores than the one that started it.
pub fn is_bound_by_parent() -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::getppid;
        use rustix::thread::sched_getaffinity;
        let cores = |pid| sched_getaffinity(pid).map(|cores| cores.count());
        if let (Ok(own), Ok(of_parent)) = (cores(None), cores(getppid())) {
            return own < of_parent;
        }
    }
    false
}

/// Bytes in decimal units, for people.
pub fn gigabytes(bytes: u64) -> String {
    let bytes = bytes as f64;
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.1} MB", b / 1e6),
        b => format!("{:.1} kB", b / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_own_words_are_understood() {
        let text = "MemTotal:       24619824 kB\nMemFree:         1000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(23_000_000 * 1024));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo("MemAvailable: lots", "MemAvailable"), None);
    }

    #[test]
    fn sizes_have_a_unit_that_fits() {
        let told = [5_200, 52_000_000, 5_200_000_000].map(gigabytes);
        assert_eq!(told, ["5.2 kB", "52.0 MB", "5.20 GB"]);
    }
}
