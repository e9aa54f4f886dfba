//! Where rank 0 listens, and how the others find it.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};

use super::environment::Master;
use crate::problem::Problem;

/// Reads `HOST:PORT`.
pub fn parse(flag: &str) -> anyhow::Result<Master> {
    let parsed = flag.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    match parsed {
        Some((host, port)) if !host.is_empty() => {
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            Ok(Master { host, port })
        }
        _ => {
            let help = "write it as in --master node1:29500";
            Err(Problem::usage(format!("--master {flag} is not HOST:PORT")).help(help).into())
        }
    }
}

/// All addresses of rank 0.
pub fn resolve(master: &Master) -> anyhow::Result<Vec<SocketAddr>> {
    let Master { host, port } = master;
    let found = (host.as_str(), *port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    let cannot = |error: io::Error| {
        Problem::failed(format!("nobody knows the address of {host}, where rank 0 listens"))
            .because(error)
            .help("give an address that all machines reach: --master HOST:PORT")
    };
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(cannot(io::Error::other("it has none")).into()),
        Err(error) => Err(cannot(error).into()),
    }
}

/// Listens as rank 0. A machine may know its own name as a loopback address, which no other machine reaches; the
/// address by which it reaches `other_node` is meant then.
pub fn listen(master: &Master, other_node: Option<&str>) -> anyhow::Result<TcpListener> {
    let mut addrs = resolve(master)?;
    let is_loopback = addrs.iter().all(|addr| addr.ip().is_loopback());
    if let Some(own) = other_node.filter(|_| is_loopback).and_then(own_address) {
        addrs = vec![SocketAddr::new(own, master.port)];
    }
    TcpListener::bind(addrs.as_slice()).map_err(|error| {
        let what = format!("cannot listen at {}:{} as rank 0", master.host, master.port);
        let help = match error.kind() {
            io::ErrorKind::AddrInUse => "another program has that port: choose one with --master HOST:PORT",
            _ => "rank 0 listens on its own machine: give one of its addresses with --master HOST:PORT",
        };
        Problem::failed(what).because(error).help(help).into()
    })
}

/// The address that this machine uses towards `node`; no packet is sent.
fn own_address(node: &str) -> Option<IpAddr> {
    let to = (node, 9).to_socket_addrs().ok()?.next()?;
    let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports_are_told_apart() {
        let of = |flag: &str| parse(flag).map(|master| (master.host, master.port)).ok();
        assert_eq!(of("node1:29500"), Some(("node1".to_owned(), 29500)));
        assert_eq!(of("[::1]:5"), Some(("::1".to_owned(), 5)));
        for wrong in ["node1", "node1:", ":5", "node1:99999", ""] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn rank_0_listens_where_it_was_told() {
        let listener = listen(&Master { host: "127.0.0.1".to_owned(), port: 0 }, None).unwrap();
        let addr = listener.local_addr().unwrap();
        assert!(addr.ip().is_loopback());
        let taken = listen(&Master { host: "127.0.0.1".to_owned(), port: addr.port() }, None).unwrap_err();
        assert!(crate::problem::help_of(&taken).unwrap().contains("another program"), "{taken:#}");
    }
}
