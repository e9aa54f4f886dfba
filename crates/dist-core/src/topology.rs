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
    /// What a step costs beside its bytes and operations; `None` is what devices of its kind were measured to take.
    #[serde(default)]
    pub overhead: Option<Overhead>,
}

impl Device {
    /// What a step costs beside its bytes and operations.
    #[must_use]
    pub fn overhead(&self) -> Overhead {
        self.overhead.unwrap_or(match self.kind {
            DeviceKind::Cpu => Overhead::NONE,
            DeviceKind::Cuda => Overhead::H100,
        })
    }
}

/// What a device takes beside reading and multiplying at its rates: each step is a sequence of kernels, and between two
/// of them it does neither.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// From the end of a kernel's work to the beginning of the next one's.
    pub launch_s: f64,
    /// What each row of a step adds to that: kernels of few rows have less and less of their bytes to hide behind.
    pub row_s: f64,
    /// Rows after which they add no more: from there on kernels are at one of the device's rates.
    pub rows_max: usize,
    /// Share of the rate of matrix products that layers sustain.
    pub product_share: f64,
}

impl Overhead {
    /// A step is its bytes and operations.
    pub const NONE: Self = Self { launch_s: 0.0, row_s: 0.0, rows_max: 0, product_share: 1.0 };

    /// Fitted to an H100: decode steps of 1 to 64 sequences of gpt3-1.3b, 6.7b and 13b, and their prompts of 128 and 1024
    /// tokens (`benches/results/h100-*.json`, which `tests/measured.rs` holds it against). A prompt's step is no graph; its
    /// kernels, launched one by one, fit the same line at its end, 8 us apiece.
    pub const H100: Self = Self { launch_s: 1.6e-6, row_s: 0.05e-6, rows_max: 128, product_share: 0.89 };

    /// Seconds of a step of `launches` kernels over `rows` rows.
    #[must_use]
    pub fn seconds(self, launches: usize, rows: usize) -> f64 {
        launches as f64 * (self.launch_s + self.row_s * rows.min(self.rows_max) as f64)
    }
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
                (format!("product_share of {name}"), device.overhead().product_share),
            ]
        });
        let rates =
            links.clone().map(|link| ("bytes_per_s of a link".to_owned(), link.bytes_per_s)).chain(devices);
        let wrong = |what: String, rate: f64| TopologyError { what, found: rate.to_string() };
        if let Some((what, rate)) = rates.into_iter().find(|(_, rate)| !(rate.is_finite() && *rate > 0.0)) {
            return Err(wrong(what, rate));
        }
        let latencies = links.map(|link| ("latency_s of a link".to_owned(), link.latency_s));
        let overheads = self.devices.iter().flat_map(|device| {
            let (name, Overhead { launch_s, row_s, .. }) = (&device.name, device.overhead());
            [(format!("launch_s of {name}"), launch_s), (format!("row_s of {name}"), row_s)]
        });
        match latencies.chain(overheads).find(|(_, seconds)| !(seconds.is_finite() && *seconds >= 0.0)) {
            Some((what, seconds)) => Err(wrong(what, seconds)),
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
            overhead: None,
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
    fn a_device_of_an_older_file_has_the_overhead_of_its_kind() {
        let json = |kind: &str| {
            format!(
                r#"{{"kind":"{kind}","name":"x","host":0,"memory_bytes":1,"read_bytes_per_s":1.0,"flops_per_s":1.0}}"#
            )
        };
        let overhead = |kind| serde_json::from_str::<Device>(&json(kind)).unwrap().overhead();
        assert_eq!((overhead("cpu"), overhead("cuda")), (Overhead::NONE, Overhead::H100));
        assert!(Overhead::NONE.seconds(1000, 1000) == 0.0);
    }

    #[test]
    fn an_overhead_without_meaning_is_refused() {
        let link = Link { latency_s: 0.0, bytes_per_s: 1.0 };
        for (overhead, told) in [
            (Overhead { launch_s: -1.0, ..Overhead::NONE }, "launch_s of cores: -1"),
            (Overhead { row_s: f64::NAN, ..Overhead::NONE }, "row_s of cores: NaN"),
            (Overhead { product_share: 0.0, ..Overhead::NONE }, "product_share of cores: 0"),
        ] {
            let device = Device { overhead: Some(overhead), ..device(0) };
            let error = Topology::uniform(&device, 1, link).check().expect_err("no meaning");
            assert!(error.to_string().contains(told), "{error}");
        }
    }

    #[test]
    fn a_rate_of_zero_is_refused() {
        let link = Link { latency_s: 0.0, bytes_per_s: 0.0 };
        let error = Topology::uniform(&device(0), 1, link).check().expect_err("no rate");
        assert_eq!(error.to_string(), "the topology's bytes_per_s of a link: 0, must be a positive number");
    }
}
