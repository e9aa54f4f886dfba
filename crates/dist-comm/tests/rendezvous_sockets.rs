//! Ranks that find each other over real sockets, with strangers at every door.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

mod ring;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use dist_comm::auth::Secret;
use dist_comm::codec::{frame, header};
use dist_comm::rendezvous::RendezvousError;
use dist_comm::{CallName, ControlError, SharedMemory, Wait, World};
use dist_core::{DType, Rank};
use ring::{PLENTY, all, host, loopback, on_worlds, request};

/// Everything that strangers do, all at once; the connections stay open.
fn disturb(addr: SocketAddr, n: usize) -> Vec<TcpStream> {
    let words: [&[u8]; 6] = [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        &header(u32::MAX as usize),
        &frame(&[0; 64], 64).unwrap()[..20],
        b"dG",
        &[0; 4096],
    ];
    let speak = |word: &[u8]| {
        // A door with a full queue lets nobody in, not even strangers.
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_millis(50)).ok()?;
        stream.write_all(word).ok()?;
        Some(stream)
    };
    (0..n).flat_map(|_| words).filter_map(speak).collect()
}

#[test]
fn strangers_stop_nobody() {
    let listener = loopback();
    let addr = listener.local_addr().unwrap();
    let held = disturb(addr, 20);
    assert!(held.len() >= 100);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                if rank == 1 {
                    // One who has another secret says that it is rank 1, before the true one comes.
                    let secret = Secret::new(&[1; 32]).unwrap();
                    let liar = dist_comm::JoinRequest { secret, ..request(1, 3, SharedMemory::Use) };
                    let error = World::join(&[addr], &liar).unwrap_err();
                    assert!(error.to_string().contains("different secrets"), "{error}");
                }
                let listener = &listener;
                scope.spawn(move || {
                    let request = request(rank, 3, SharedMemory::Use);
                    let world = match rank {
                        0 => World::host(listener, &request),
                        _ => World::join(&[addr], &request),
                    };
                    let mut world = world.unwrap();
                    // The doors between ranks are knocked at as well.
                    let held: Vec<_> =
                        world.members().iter().flat_map(|member| disturb(member.addr, 4)).collect();
                    let mut comm = all(&mut world, PLENTY);
                    let mut bytes = 1.0_f32.to_le_bytes();
                    comm.all_reduce_sum(host(&mut bytes, DType::F32), CallName::new("test")).unwrap();
                    drop(held);
                    f32::from_le_bytes(bytes)
                })
            })
            .collect();
        for rank in ranks {
            assert!((rank.join().unwrap() - 3.0).abs() < f32::EPSILON);
        }
    });
    assert!(start.elapsed() < Duration::from_secs(10), "strangers cost {:?}", start.elapsed());
}

#[test]
fn ranks_may_come_before_rank_zero_listens() {
    let port = loopback().local_addr().unwrap().port();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    std::thread::scope(|scope| {
        let early =
            scope.spawn(move || World::join(&[addr], &request(1, 2, SharedMemory::Use)).unwrap().rank());
        std::thread::sleep(Duration::from_millis(200));
        let listener = std::net::TcpListener::bind(addr).unwrap();
        let world = World::host(&listener, &request(0, 2, SharedMemory::Use)).unwrap();
        assert_eq!((early.join().unwrap(), world.members().len()), (Rank(1), 2));
    });
}

#[test]
fn a_missing_rank_is_named_on_every_rank_that_is_there() {
    let listener = loopback();
    let addr = listener.local_addr().unwrap();
    let limit = Duration::from_millis(700);
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            World::join(
                &[addr],
                &dist_comm::JoinRequest { deadline: limit, ..request(2, 3, SharedMemory::Use) },
            )
        });
        let request = dist_comm::JoinRequest { deadline: limit, ..request(0, 3, SharedMemory::Use) };
        let error = World::host(&listener, &request).unwrap_err();
        assert!(error.to_string().ends_with("missing ranks: 1"), "{error}");
        let error = there.join().unwrap().unwrap_err();
        assert!(
            matches!(&error, RendezvousError::Aborted { why } if why.ends_with("missing ranks: 1")),
            "{error}"
        );
    });
}

#[test]
fn a_wrong_secret_is_said_at_once_on_both_sides() {
    let listener = loopback();
    let addr = listener.local_addr().unwrap();
    let limit = Duration::from_secs(2);
    std::thread::scope(|scope| {
        let wrong = scope.spawn(move || {
            let secret = Secret::new(&[1; 32]).unwrap();
            let start = Instant::now();
            let request = dist_comm::JoinRequest { secret, ..request(1, 2, SharedMemory::Use) };
            (World::join(&[addr], &request).unwrap_err(), start.elapsed())
        });
        let request = dist_comm::JoinRequest { deadline: limit, ..request(0, 2, SharedMemory::Use) };
        assert!(World::host(&listener, &request).unwrap_err().to_string().contains("missing ranks: 1"));
        let (error, took) = wrong.join().unwrap();
        assert!(error.to_string().contains("different secrets"), "{error}");
        assert!(took < limit, "{took:?}");
    });
}

#[test]
fn a_listener_that_is_something_else_is_named() {
    let listener = loopback();
    let addr = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
            let _ = stream.read(&mut [0; 16]);
        });
        let error = World::join(&[addr], &request(1, 2, SharedMemory::Use)).unwrap_err();
        assert!(error.to_string().contains("not a frame of this program"), "{error}");
    });
}

#[test]
fn nobody_listening_is_an_error_at_the_deadline() {
    let port = loopback().local_addr().unwrap().port();
    let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let request =
        dist_comm::JoinRequest { deadline: Duration::from_millis(300), ..request(1, 2, SharedMemory::Use) };
    let start = Instant::now();
    let error = World::join(&[addr], &request).unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn commands_go_out_and_answers_come_back() {
    let told = on_worlds(3, SharedMemory::Use, |mut world| {
        let me = world.rank();
        let control = world.control();
        if me == Rank(0) {
            control.broadcast(b"step", PLENTY).unwrap();
            control.send(Rank(2), &vec![7; 1 << 20], PLENTY).unwrap();
            return (1..3).map(|rank| control.recv(Rank(rank), Wait::Within(PLENTY)).unwrap()[0]).collect();
        }
        assert_eq!(control.recv(Rank(0), Wait::UntilSilentFor(PLENTY)).unwrap(), b"step");
        if me == Rank(2) {
            assert_eq!(control.recv(Rank(0), Wait::Within(PLENTY)).unwrap(), vec![7; 1 << 20]);
        }
        assert!(matches!(control.send(Rank(1), b"", PLENTY), Err(ControlError::NoChannel(Rank(1)))));
        control.send(Rank(0), &[me.0 as u8], PLENTY).unwrap();
        vec![]
    });
    assert_eq!(told[0], [1, 2]);
}

#[test]
fn an_idle_rank_waits_for_as_long_as_the_other_is_there() {
    let told = on_worlds(2, SharedMemory::Use, |mut world| {
        if world.rank() == Rank(0) {
            // Longer than the silence that the other would not bear.
            std::thread::sleep(Duration::from_millis(900));
            return world.control().broadcast(b"late", PLENTY).map(|()| Vec::new());
        }
        let due = world.control().recv(Rank(0), Wait::Within(Duration::from_millis(100)));
        assert!(matches!(due, Err(ControlError::Timeout { rank: Rank(0), .. })), "{due:?}");
        world.control().recv(Rank(0), Wait::UntilSilentFor(Duration::from_millis(500)))
    });
    assert!(told[0].is_ok(), "{told:?}");
    assert_eq!(told[1], Ok(b"late".to_vec()));
}
