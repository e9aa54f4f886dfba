//! Collectives between ranks of this machine: `cargo bench -p dist-comm`. Ranks are threads, each with its own mapping
//! of the shared memory and its own sockets, as processes have. Prints a table of medians for both algorithms and both
//! ways, from which `ONE_SHOT_SENT_MAX` is taken, and the memory-copy bandwidth of the same minute as the limit. Ranks
//! are pinned, one to a core in turn, because some schedulers pack threads that often wait. A second table has the other
//! calls, and ranks that are threads of one process beside them.
//!
//! Arguments that are numbers choose the worlds, e.g. `cargo bench -p dist-comm -- 2 4`.

#![allow(clippy::print_stdout)]

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use dist_comm::auth::Secret;
use dist_comm::{CallName, Comm, GroupOptions, JoinRequest, Local, SharedMemory, Tcp, World};
use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};
use rustix::thread::{CpuSet, sched_setaffinity};

const LIMIT: Duration = Duration::from_secs(60);
const LARGE: usize = 64 << 20;

/// Bytes that are copied or summed between two uses of the same memory, well beyond the caches.
const ROTATION: usize = 256 << 20;

fn main() {
    let worlds: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let worlds = if worlds.is_empty() { vec![2] } else { worlds };
    println!("device={} cores={}", cpu(), std::thread::available_parallelism().map_or(0, usize::from));
    println!("dtype=f32 commit={} command=\"cargo bench -p dist-comm\"", commit());
    let (one, all) = (copy_bandwidth(1), copy_bandwidth(2));
    println!("memory copy of 64 MiB: {one:.2} GB/s by one thread, {all:.2} GB/s by two together");
    println!("\nranks way   bytes       one-shot     direct       GB/s  of copy (one thread, two)");
    for &n in &worlds {
        for way in [SharedMemory::Use, SharedMemory::Avoid] {
            for (bytes, medians) in on_worlds(n, way, algorithms) {
                let cell = |median: Option<Duration>| {
                    median.map_or("       -".to_owned(), |time| format!("{:8.1}", time.as_secs_f64() * 1e6))
                };
                let best = medians.into_iter().flatten().min().map_or(0.0, |time| time.as_secs_f64());
                let rate = bytes as f64 / best / 1e9;
                let way = if way == SharedMemory::Use { "shm" } else { "tcp" };
                println!(
                    "{n:5} {way:5} {bytes:9} {} µs {} µs {rate:10.2}  {:.2} {:.2}",
                    cell(medians[0]),
                    cell(medians[1]),
                    rate / one,
                    rate / all
                );
            }
        }
    }
    println!(
        "\nranks call           bytes      threads           shm           tcp     GB/s of shm, of copy"
    );
    for &n in &worlds {
        let tables = [
            on_threads(n, calls),
            on_worlds(n, SharedMemory::Use, |tcp| calls(Comm::from(tcp))),
            on_worlds(n, SharedMemory::Avoid, |tcp| calls(Comm::from(tcp))),
        ];
        for (i, (call, bytes, _)) in tables[0].iter().enumerate() {
            let times = tables.each_ref().map(|table| table[i].2.as_secs_f64());
            let [threads, shm, tcp] = times.map(|time| format!("{:10.1} µs", time * 1e6));
            // A gather's bytes are all ranks' together, as they arrive.
            let rate = *bytes as f64 / times[1] / 1e9;
            println!("{n:5} {call:10} {bytes:9} {threads} {shm} {tcp} {rate:8.2} {:.2}", rate / one);
        }
    }
}

/// What rank 0 makes of a communicator of `n` threads of one process.
fn on_threads<T: Send>(n: usize, rank_main: impl Fn(Comm) -> T + Sync) -> T {
    std::thread::scope(|scope| {
        let start = |(rank, local)| {
            let rank_main = &rank_main;
            scope.spawn(move || {
                pin(rank);
                rank_main(Comm::Local(local))
            })
        };
        let ranks: Vec<_> = Local::world(n, LIMIT).into_iter().enumerate().map(start).collect();
        let mut all: Vec<_> = ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect();
        all.swap_remove(0)
    })
}

/// What rank 0 makes of a communicator of `n` ranks that found each other.
fn on_worlds<T: Send>(n: usize, way: SharedMemory, rank_main: impl Fn(Tcp) -> T + Sync) -> T {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let addr = listener.local_addr().expect("an address");
    std::thread::scope(|scope| {
        let start = |rank: usize| {
            let (listener, rank_main) = (&listener, &rank_main);
            scope.spawn(move || {
                pin(rank);
                let request = request(rank, n, way);
                let world = match rank {
                    0 => World::host(listener, &request),
                    _ => World::join(&[addr], &request),
                };
                let mut world = world.expect("all ranks");
                let ranks: Vec<_> = (0..n).map(Rank).collect();
                let tcp = world.connect("all", &ranks, GroupOptions::collectives(LIMIT)).expect("a link");
                rank_main(tcp.expect("a member"))
            })
        };
        let ranks: Vec<_> = (0..n).map(start).collect();
        let mut tables: Vec<_> = ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect();
        tables.swap_remove(0)
    })
}

/// Keeps this thread on one core.
fn pin(thread: usize) {
    let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cores = CpuSet::new();
    cores.set(thread % n_cores);
    sched_setaffinity(None, &cores).expect("a core of our own");
}

fn request(rank: usize, world_size: usize, shared_memory: SharedMemory) -> JoinRequest {
    JoinRequest {
        rank: Rank(rank),
        world_size,
        generation: 1,
        plan_hash: "bench".to_owned(),
        checkpoint_hash: "bench".to_owned(),
        secret: Secret::new(&[1; 32]).expect("long enough"),
        deadline: LIMIT,
        shared_memory,
    }
}

/// Medians of both algorithms of an all-reduce for each size.
fn algorithms(mut tcp: Tcp) -> Vec<(usize, [Option<Duration>; 2])> {
    let sizes = [1 << 10, 4 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20, 16 << 20, LARGE];
    let mut table = Vec::new();
    for bytes in sizes {
        tcp.set_one_shot_bytes_max(Tcp::PACKET_BYTES);
        let mut medians = [None, None];
        if bytes <= Tcp::PACKET_BYTES {
            (tcp, medians[0]) = median(tcp, bytes);
        }
        tcp.set_one_shot_bytes_max(0);
        (tcp, medians[1]) = median(tcp, bytes);
        table.push((bytes, medians));
    }
    table
}

fn median(tcp: Tcp, bytes: usize) -> (Tcp, Option<Duration>) {
    let mut comm = Comm::from(tcp);
    let time = repeated(bytes, |buf, name| comm.all_reduce_sum(buf, name).expect("all ranks"));
    let Comm::Tcp(tcp) = comm else { unreachable!("it went in as one") };
    (*tcp, Some(time))
}

/// The median time of a call on `bytes`, which change each time.
fn repeated(bytes: usize, mut call: impl FnMut(RawBuf<'_>, CallName)) -> Duration {
    let per_buffer = bytes.max(64 << 10);
    let repeats = (ROTATION / per_buffer).clamp(9, 3000);
    let mut buffers: Vec<Vec<u8>> =
        (0..(ROTATION / per_buffer).clamp(2, 64)).map(|_| vec![1; bytes]).collect();
    let mut times: Vec<Duration> = (0..repeats)
        .map(|i| {
            let which = i % buffers.len();
            let buf = RawBuf::Host { bytes: &mut buffers[which], dtype: DType::F32 };
            let start = Instant::now();
            call(buf, CallName::new("bench").step(i as u64));
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[repeats / 2]
}

/// Every call at a small and at a large size: its name, its bytes, its median.
fn calls(mut comm: Comm) -> Vec<(&'static str, usize, Duration)> {
    let (n, me) = (comm.world_size(), comm.rank());
    let expect = "all ranks";
    let mut table = vec![("barrier", 0, repeated(0, |_, name| comm.barrier(name).expect(expect)))];
    for bytes in [16 << 10, LARGE] {
        let time = repeated(bytes, |buf, name| comm.all_reduce_sum(buf, name).expect(expect));
        table.push(("all_reduce", bytes, time));
        let mut part = vec![1; bytes / n];
        let time = repeated(bytes, |all, name| {
            comm.all_gather(RawBuf::Host { bytes: &mut part, dtype: DType::F32 }, all, name).expect(expect);
        });
        table.push(("all_gather", bytes, time));
        let time = repeated(bytes, |buf, name| comm.broadcast(buf, Rank(0), name).expect(expect));
        table.push(("broadcast", bytes, time));
        // There and back between the first two; the others wait.
        let time = repeated(bytes, |buf, name| {
            let RawBuf::Host { bytes, dtype } = buf else { unreachable!("it is made here") };
            let peer = Rank(1 - me.0.min(1));
            for is_there in [true, false] {
                let buf = RawBuf::Host { bytes: &mut *bytes, dtype };
                match me.0 {
                    0 | 1 if (me.0 == 0) == is_there => comm.send(buf, peer, name).expect(expect),
                    0 | 1 => comm.recv(buf, peer, name).expect(expect),
                    _ => {}
                }
            }
        });
        comm.barrier(CallName::new("the next size")).expect(expect);
        table.push(("send, recv", bytes, time / 2));
    }
    table
}

/// GB/s of copying 64 MiB, by all threads together.
fn copy_bandwidth(n_threads: usize) -> f64 {
    let (barrier, repeats) = (Barrier::new(n_threads), 12);
    let seconds: Vec<f64> = std::thread::scope(|scope| {
        let barrier = &barrier;
        let copy = move |thread| {
            pin(thread);
            let pairs = ROTATION / LARGE / 2;
            let from: Vec<Vec<u8>> = (0..pairs).map(|i| vec![i as u8 + 1; LARGE]).collect();
            let mut to: Vec<Vec<u8>> = (0..pairs).map(|_| vec![1; LARGE]).collect();
            barrier.wait();
            let start = Instant::now();
            for i in 0..repeats {
                to[i % pairs].copy_from_slice(std::hint::black_box(&from[i % pairs]));
                std::hint::black_box(&mut to);
            }
            start.elapsed().as_secs_f64()
        };
        let threads: Vec<_> = (0..n_threads).map(|thread| scope.spawn(move || copy(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let longest = seconds.into_iter().fold(0.0, f64::max);
    (n_threads * repeats * LARGE) as f64 / longest / 1e9
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned())
}

fn commit() -> String {
    let output = Command::new("git").args(["describe", "--always", "--dirty"]).output();
    output.map_or_else(
        |_| "unknown".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}
