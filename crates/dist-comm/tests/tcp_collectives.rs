//! Every collective between processes' ranks, over shared memory and over TCP: the bytes and the bits of `Local`.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

mod ring;

use std::time::{Duration, Instant};

use dist_comm::{CallName, Comm, CommError, GroupOptions, Local, SharedMemory, Tcp};
use dist_core::{DType, Rank};
use ring::{PLENTY, all, host, on_ranks, on_worlds, partial_sums};

const NAME: CallName = CallName::new("test");

const WAYS: [SharedMemory; 2] = [SharedMemory::Use, SharedMemory::Avoid];

/// Around every border that an algorithm has, odd ones among them.
fn lengths(n: usize) -> Vec<usize> {
    let packet = Tcp::PACKET_BYTES / 4;
    // From one shot to parts.
    let border = (32 << 10) / 4 / (n - 1).max(1);
    vec![
        0,
        1,
        3,
        257,
        border - 1,
        border,
        border + 1,
        packet - 1,
        packet + 1,
        n * packet - 3,
        n * packet + 5,
        3 * n * packet + 11,
    ]
}

/// What threads of one process make of the same calls.
fn on_local<T: Send>(n: usize, rank_main: impl Fn(&mut Comm) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let start = |local| scope.spawn(|| rank_main(&mut Comm::Local(local)));
        let ranks: Vec<_> = Local::world(n, PLENTY).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    })
}

fn reduce_all(comm: &mut Comm, n: usize) -> Result<Vec<Vec<u8>>, CommError> {
    let reduce = |len| {
        let mut bytes = partial_sums(comm.rank().0, len);
        comm.all_reduce_sum(host(&mut bytes, DType::F32), NAME.layer(len))?;
        Ok(bytes)
    };
    lengths(n).into_iter().map(reduce).collect()
}

#[test]
fn sums_have_the_bits_of_local_ranks_whatever_the_way() {
    for n in 1..=8 {
        let expected = on_local(n, |comm| reduce_all(comm, n));
        assert!(expected.iter().all(|sums| *sums == expected[0]));
        for way in WAYS {
            assert_eq!(on_ranks(n, way, |comm| reduce_all(comm, n)), expected, "{n} ranks, {way:?}");
        }
    }
}

/// Many more pieces than a ring has slots, of lengths that no piece divides; and the same again.
#[test]
fn large_sums_have_the_bits_of_local_ranks_in_every_run() {
    for n in [2, 3] {
        let sums = |comm: &mut Comm| -> Result<_, CommError> {
            let mut bytes = partial_sums(comm.rank().0, (1 << 20) + 7);
            comm.all_reduce_sum(host(&mut bytes, DType::F32), NAME)?;
            Ok(bytes)
        };
        let expected = on_local(n, sums);
        for way in [SharedMemory::Use, SharedMemory::Use, SharedMemory::Avoid] {
            // Not `assert_eq!`, which would print all of them.
            assert!(on_ranks(n, way, sums) == expected, "{n} ranks, {way:?}");
        }
    }
}

#[test]
fn whole_numbers_pass_as_they_are_and_are_not_added() {
    let word = |rank: usize, i: usize| u32::MAX - (rank * 1000 + i) as u32;
    for way in WAYS {
        let all = on_ranks(3, way, |comm| -> Result<_, CommError> {
            let me = comm.rank().0;
            let mut src: Vec<u8> = (0..101).flat_map(|i| word(me, i).to_le_bytes()).collect();
            let mut dst = vec![0; 3 * src.len()];
            comm.all_gather(host(&mut src, DType::U32), host(&mut dst, DType::U32), NAME)?;
            let error = comm.all_reduce_sum(host(&mut src, DType::U32), NAME).unwrap_err();
            Ok((dst, error.to_string()))
        });
        let expected: Vec<u8> =
            (0..3).flat_map(|rank| (0..101).flat_map(move |i| word(rank, i).to_le_bytes())).collect();
        for rank in all {
            let (gathered, error) = rank.unwrap();
            assert!(gathered == expected, "{way:?}");
            assert!(error.contains("plan f32 as the wire type"), "{error}");
        }
    }
}

#[test]
fn the_algorithm_changes_no_bit() {
    let reduce = |threshold: usize| {
        on_worlds(3, SharedMemory::Use, |mut world| {
            let ranks = [Rank(0), Rank(1), Rank(2)];
            let tcp = world.connect("all", &ranks, GroupOptions::collectives(PLENTY)).unwrap();
            let mut tcp = tcp.unwrap();
            assert!(tcp.shares_memory());
            tcp.set_one_shot_bytes_max(threshold);
            let mut comm = Comm::from(tcp);
            let mut bytes = partial_sums(comm.rank().0, Tcp::PACKET_BYTES / 4);
            comm.all_reduce_sum(host(&mut bytes, DType::F32), NAME).unwrap();
            bytes
        })
    };
    assert_eq!(reduce(0), reduce(Tcp::PACKET_BYTES));
}

/// Two pairs of ranks, one pair without shared memory with the other: what a cluster of two machines looks like.
#[test]
fn ways_may_be_mixed_in_one_communicator() {
    let expected = on_local(4, |comm| reduce_all(comm, 4));
    let listener = ring::loopback();
    let addr = listener.local_addr().unwrap();
    let sums = std::thread::scope(|scope| {
        let start = |rank: usize| {
            let listener = &listener;
            // Ranks 0 and 1 share memory, 2 and 3 are each on a machine of their own.
            let request = ring::request(rank, 4, WAYS[rank / 2]);
            scope.spawn(move || {
                let world = match rank {
                    0 => dist_comm::World::host(listener, &request),
                    _ => dist_comm::World::join(&[addr], &request),
                };
                reduce_all(&mut all(&mut world.unwrap(), PLENTY), 4)
            })
        };
        let ranks: Vec<_> = (0..4).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(sums, expected);
}

#[test]
fn gathering_broadcasting_and_barriers_are_those_of_local_ranks() {
    for n in [1, 2, 3, 5, 8] {
        for len in [0, 1, 1023, Tcp::PACKET_BYTES + 7] {
            let calls = |comm: &mut Comm| -> Result<_, CommError> {
                let me = comm.rank().0;
                let (mut src, mut dst) = (vec![me as u8 + 1; len], vec![0; n * len]);
                comm.all_gather(host(&mut src, DType::U8), host(&mut dst, DType::U8), NAME)?;
                comm.barrier(NAME)?;
                let root = Rank(n - 1);
                comm.broadcast(host(&mut src, DType::U8), root, NAME)?;
                comm.broadcast(host(&mut dst, DType::U8), Rank(0), NAME)?;
                Ok((src, dst))
            };
            let expected = on_local(n, calls);
            for way in WAYS {
                assert_eq!(on_ranks(n, way, calls), expected, "{n} ranks, {len} bytes, {way:?}");
            }
        }
    }
}

#[test]
fn messages_go_down_a_pipeline_and_back() {
    for way in WAYS {
        let len = 5 * Tcp::PACKET_BYTES + 3;
        let all = on_ranks(3, way, |comm| -> Result<_, CommError> {
            let me = comm.rank();
            let mut bytes = vec![me.0 as u8; len];
            for step in 0..4 {
                let name = NAME.step(step);
                if me.0 > 0 {
                    comm.recv(host(&mut bytes, DType::U8), Rank(me.0 - 1), name)?;
                }
                bytes[step as usize] = bytes[step as usize].wrapping_add(1);
                if me.0 < 2 {
                    comm.send(host(&mut bytes, DType::U8), Rank(me.0 + 1), name)?;
                }
                // The last stage's word comes back to the first.
                let mut word = [bytes[0]];
                match me.0 {
                    2 => comm.send(host(&mut word, DType::U8), Rank(0), name)?,
                    0 => comm.recv(host(&mut word, DType::U8), Rank(2), name)?,
                    _ => {}
                }
            }
            Ok(bytes)
        });
        // The first stage keeps its own ones of the steps before; the last step has been through all three.
        let last = all[2].as_ref().unwrap();
        assert_eq!((&last[..4], last[4]), (&[1, 1, 1, 3][..], 0), "{way:?}");
    }
}

#[test]
fn both_sides_may_send_more_than_the_system_holds() {
    // Each waits for room towards the other; over TCP what comes in is taken in meanwhile.
    let len = 32 << 20;
    let all = on_ranks(2, SharedMemory::Avoid, |comm| -> Result<_, CommError> {
        let other = Rank(1 - comm.rank().0);
        let mut bytes = vec![comm.rank().0 as u8 + 1; len];
        comm.send(host(&mut bytes, DType::U8), other, NAME)?;
        comm.recv(host(&mut bytes, DType::U8), other, NAME)?;
        Ok((bytes[0], bytes[len - 1]))
    });
    assert_eq!(all, [Ok((2, 2)), Ok((1, 1))]);
}

#[test]
fn ranks_are_in_several_communicators_at_once() {
    // A mesh of tp 2 and pp 2: each rank reduces within its stage, then passes on.
    let all = on_worlds(4, SharedMemory::Use, |mut world| -> Result<_, CommError> {
        let me = world.rank().0;
        let mut tp = None;
        let mut pp = None;
        for stage in 0..2 {
            let ranks = [Rank(2 * stage), Rank(2 * stage + 1)];
            tp = world.connect("tp", &ranks, GroupOptions::collectives(PLENTY)).unwrap().or(tp);
        }
        for column in 0..2 {
            let options = GroupOptions::messages(PLENTY, 1 << 20);
            pp = world.connect("pp", &[Rank(column), Rank(column + 2)], options).unwrap().or(pp);
        }
        let (mut tp, mut pp) = (Comm::from(tp.unwrap()), Comm::from(pp.unwrap()));
        drop(world);
        let mut value = (me as f32).to_le_bytes();
        tp.all_reduce_sum(host(&mut value, DType::F32), NAME)?;
        match pp.rank() {
            Rank(0) => pp.send(host(&mut value, DType::F32), Rank(1), NAME)?,
            _ => pp.recv(host(&mut value, DType::F32), Rank(0), NAME)?,
        }
        Ok(f32::from_le_bytes(value))
    });
    assert_eq!(all, [Ok(1.0), Ok(1.0), Ok(1.0), Ok(1.0)]);
}

#[test]
fn misuse_has_the_errors_of_local_ranks() {
    let calls = |comm: &mut Comm| {
        let (mut src, mut dst) = ([0; 4], [0; 4]);
        comm.all_gather(host(&mut src, DType::U8), host(&mut dst, DType::U8), NAME).unwrap_err()
    };
    assert_eq!(on_ranks(2, SharedMemory::Use, calls), on_local(2, calls));
    let calls = |comm: &mut Comm| comm.send(host(&mut [0; 4], DType::U8), comm.rank(), NAME).unwrap_err();
    assert_eq!(on_ranks(2, SharedMemory::Use, calls), on_local(2, calls));
}

/// Not a benchmark: a floor under which something is broken, on a busy machine too.
#[test]
fn large_sums_are_not_slow() {
    for way in WAYS {
        let seconds = on_ranks(2, way, |comm| {
            let mut bytes = vec![0; 32 << 20];
            comm.barrier(NAME).unwrap();
            let start = Instant::now();
            comm.all_reduce_sum(host(&mut bytes, DType::F32), NAME).unwrap();
            start.elapsed()
        });
        assert!(seconds[0] < Duration::from_secs(2), "{way:?}: {seconds:?}");
    }
}
