//! Machines that are network namespaces on one switch, whose cables can be pulled. Needs root and iproute2.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A switch with so many machines.
pub(crate) struct Network {
    name: String,
    n_machines: usize,
}

impl Network {
    /// Builds it, or says why this machine cannot.
    pub(crate) fn new(n_machines: usize) -> Result<Self, String> {
        static NETWORKS: AtomicUsize = AtomicUsize::new(0);
        let name = format!("fault-{}-{}", std::process::id(), NETWORKS.fetch_add(1, Ordering::Relaxed));
        let network = Self { name, n_machines };
        let switch = network.switch();
        ip(&format!("netns add {switch}"))?;
        ip(&format!("-n {switch} link add switch type bridge"))?;
        ip(&format!("-n {switch} link set switch up"))?;
        for machine in 0..n_machines {
            let own = network.machine(machine);
            ip(&format!("netns add {own}"))?;
            ip(&format!("-n {own} link set lo up"))?;
            ip(&format!("-n {own} link add cable type veth peer name port{machine} netns {switch}"))?;
            ip(&format!("-n {own} addr add {}/24 dev cable", Self::address(machine)))?;
            ip(&format!("-n {own} link set cable up"))?;
            ip(&format!("-n {switch} link set port{machine} master switch up"))?;
        }
        Ok(network)
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.name)
    }

    fn machine(&self, machine: usize) -> String {
        format!("{}-{machine}", self.name)
    }

    /// The address of a machine.
    pub(crate) fn address(machine: usize) -> String {
        format!("10.213.7.{}", machine + 1)
    }

    /// What runs a program on a machine.
    pub(crate) fn wrap(&self, machine: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.machine(machine)].map(str::to_owned).to_vec()
    }

    /// No packet reaches or leaves the machine any more; nobody is told.
    pub(crate) fn pull_cable(&self, machine: usize) -> Result<(), String> {
        ip(&format!("-n {} link set port{machine} down", self.switch()))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for machine in 0..self.n_machines {
            // One that was not built cannot be taken down.
            let _ = ip(&format!("netns del {}", self.machine(machine)));
        }
        let _ = ip(&format!("netns del {}", self.switch()));
    }
}

fn ip(args: &str) -> Result<(), String> {
    let output = Command::new("ip").args(args.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// Says that a test was skipped where nobody overlooks it.
#[allow(clippy::print_stderr, reason = "a skip must be loud")]
pub(crate) fn skip(test: &str, why: &str) {
    use std::io::Write;
    eprintln!("SKIPPED: {test}: {why}");
    let Some(log) = std::env::var_os("DIST_SKIP_LOG") else { return };
    let log = std::fs::OpenOptions::new().append(true).create(true).open(log);
    writeln!(log.expect("the log of skipped tests"), "{test} {why}").expect("the log of skipped tests");
}
