//! Network interfaces, and the one that leads to rank 0.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, ToSocketAddrs, UdpSocket};

use serde::{Deserialize, Serialize};

/// An interface with its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it leads nowhere but here.
    pub is_loopback: bool,
    /// Its rate, where the driver tells.
    pub megabits_per_s: Option<u64>,
}

/// The network of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Interfaces that have an address.
    pub interfaces: Vec<Interface>,
    /// Where rank 0 listens, as it was given.
    pub master: Option<String>,
    /// Our own address towards it, or why there is none.
    pub towards_master: Option<Result<IpAddr, String>>,
}

impl Network {
    /// Of this machine.
    pub fn of_this(master: Option<&str>) -> Self {
        let mut by_name: BTreeMap<String, Interface> = BTreeMap::new();
        for found in if_addrs::get_if_addrs().unwrap_or_default() {
            let (address, is_loopback) = (found.ip(), found.is_loopback());
            let interface = by_name.entry(found.name.clone()).or_insert_with(|| Interface {
                megabits_per_s: speed(&found.name),
                name: found.name,
                addresses: Vec::new(),
                is_loopback,
            });
            interface.addresses.push(address);
        }
        Self {
            interfaces: by_name.into_values().collect(),
            master: master.map(str::to_owned),
            towards_master: master.map(|master| own_address(master).map_err(|error| error.to_string())),
        }
    }

    /// The interface that leads to rank 0.
    pub fn used(&self) -> Option<&Interface> {
        let own = self.towards_master.as_ref()?.as_ref().ok()?;
        self.interfaces.iter().find(|interface| interface.addresses.contains(own))
    }
}

/// What the driver says, in megabits a second; virtual interfaces say nothing or −1.
fn speed(name: &str) -> Option<u64> {
    fs::read_to_string(format!("/sys/class/net/{name}/speed")).ok()?.trim().parse().ok()
}

/// The address by which this machine reaches another; no packet is sent.
fn own_address(master: &str) -> std::io::Result<IpAddr> {
    let none = || std::io::Error::other("it has no address");
    let to = master.to_socket_addrs()?.next().ok_or_else(none)?;
    let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((to.ip(), to.port().max(1)))?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_this_machine_is_its_loopback() {
        let network = Network::of_this(Some("127.0.0.1:29500"));
        assert_eq!(network.towards_master, Some(Ok([127, 0, 0, 1].into())));
        assert!(network.used().is_some_and(|interface| interface.is_loopback), "{network:?}");
        assert!(matches!(Network::of_this(Some("nobody.invalid:1")).towards_master, Some(Err(_))));
    }
}
