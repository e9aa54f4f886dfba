//! What there is to run on, as plain values: devices, what they can do, and the links between them. Who measured them is
//! the business of others.

use serde::{Deserialize, Serialize};

/// Kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// Cores of a machine.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// What one rank may have to itself. Who cuts a machine into several ranks cuts its memory and its rates as well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Kind.
    pub kind: DeviceKind,
    /// Name for people.
    pub name: String,
    /// Which machine it is in, any number.
    pub host: usize,
    /// Memory that a rank may take.
    pub memory_bytes: u64,
    /// Rate at which weights are read.
    pub read_bytes_per_s: f64,
    /// Rate of matrix products in the type of the activations.
    pub flops_per_s: f64,
}

/// A way between two devices, the same in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// From the start of an empty exchange to its end.
    pub latency_s: f64,
    /// Rate in one direction.
    pub bytes_per_s: f64,
}

impl Link {
    /// Seconds for a message.
    #[must_use]
    pub fn seconds(self, bytes: f64) -> f64 {
        self.latency_s + bytes / self.bytes_per_s
    }

    /// The slower one in each respect.
    #[must_use]
    pub fn worst(self, other: Self) -> Self {
        Self {
            latency_s: self.latency_s.max(other.latency_s),
            bytes_per_s: self.bytes_per_s.min(other.bytes_per_s),
        }
    }
}

/// A link that was measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairLink {
    /// One device, by its place in [`Topology::devices`].
    pub a: usize,
    /// The other one.
    pub b: usize,
    /// The way between them.
    pub link: Link,
}

/// Devices and links. Rank `i` of a plan runs on device `i`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    /// In the order in which ranks are dealt to them; devices of one host stand together.
    pub devices: Vec<Device>,
    /// Between devices of one host.
    pub same_host: Link,
    /// Between devices of two hosts.
    pub other_host: Link,
    /// Pairs that are known better than by their hosts.
    #[serde(default)]
    pub pairs: Vec<PairLink>,
}

impl Topology {
    /// `n` devices alike in one host.
    #[must_use]
    pub fn uniform(device: &Device, n: usize, link: Link) -> Self {
        let devices = vec![device.clone(); n];
        Self { devices, same_host: link, other_host: link, pairs: Vec::new() }
    }

    /// The way between two devices.
    #[must_use]
    pub fn link(&self, a: usize, b: usize) -> Link {
        let joins = |pair: &&PairLink| (pair.a, pair.b) == (a, b) || (pair.a, pair.b) == (b, a);
        if let Some(pair) = self.pairs.iter().find(joins) {
            return pair.link;
        }
        if self.devices[a].host == self.devices[b].host { self.same_host } else { self.other_host }
    }

    /// The slowest way between any two of `ranks`; `None` for fewer than two.
    #[must_use]
    pub fn worst_link(&self, ranks: &[usize]) -> Option<Link> {
        let pairs = ranks.iter().enumerate().flat_map(|(i, &a)| ranks[..i].iter().map(move |&b| (a, b)));
        pairs.map(|(a, b)| self.link(a, b)).reduce(Link::worst)
    }

    /// Whether there is a device, and every rate is a positive number; else what is wrong.
    pub fn check(&self) -> Result<(), TopologyError> {
        if self.devices.is_empty() {
            return Err(TopologyError { what: "devices".into(), found: "none".into() });
        }
        let links =
            [self.same_host, self.other_host].into_iter().chain(self.pairs.iter().map(|pair| pair.link));
        let devices = self.devices.iter().flat_map(|device| {
            let name = &device.name;
            [
                (format!("read_bytes_per_s of {name}"), device.read_bytes_per_s),
                (format!("flops_per_s of {name}"), device.flops_per_s),
            ]
        });
        let rates =
            links.clone().map(|link| ("bytes_per_s of a link".to_owned(), link.bytes_per_s)).chain(devices);
        let wrong = |what: String, rate: f64| TopologyError { what, found: rate.to_string() };
        if let Some((what, rate)) = rates.into_iter().find(|(_, rate)| !(rate.is_finite() && *rate > 0.0)) {
            return Err(wrong(what, rate));
        }
        let mut latencies = links.map(|link| link.latency_s);
        match latencies.find(|latency| !(latency.is_finite() && *latency >= 0.0)) {
            Some(latency) => Err(wrong("latency_s of a link".to_owned(), latency)),
            None => Ok(()),
        }
    }
}

/// A topology that cannot be calculated with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the topology's {what}: {found}, must be a positive number")]
pub struct TopologyError {
    /// Which value.
    pub what: String,
    /// What it is.
    pub found: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: usize) -> Device {
        Device {
            kind: DeviceKind::Cpu,
            name: "cores".into(),
            host,
            memory_bytes: 1,
            read_bytes_per_s: 1.0,
            flops_per_s: 1.0,
        }
    }

    #[test]
    fn a_measured_pair_beats_the_class_of_its_hosts() {
        let link = |latency_s| Link { latency_s, bytes_per_s: 1.0 };
        let topology = Topology {
            devices: [0, 0, 1].map(device).to_vec(),
            same_host: link(1.0),
            other_host: link(2.0),
            pairs: vec![PairLink { a: 2, b: 0, link: link(3.0) }],
        };
        let latencies = [(0, 1), (1, 2), (0, 2)].map(|(a, b)| topology.link(a, b).latency_s);
        assert_eq!(latencies.map(f64::to_bits), [1.0_f64, 2.0, 3.0].map(f64::to_bits));
        assert_eq!(topology.worst_link(&[0, 1, 2]), Some(link(3.0)));
        assert_eq!(topology.worst_link(&[1]), None);
    }

    #[test]
    fn a_rate_of_zero_is_refused() {
        let link = Link { latency_s: 0.0, bytes_per_s: 0.0 };
        let error = Topology::uniform(&device(0), 1, link).check().expect_err("no rate");
        assert_eq!(error.to_string(), "the topology's bytes_per_s of a link: 0, must be a positive number");
    }
}
