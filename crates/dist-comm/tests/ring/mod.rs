//! Ranks for tests: threads of this process that find each other over real sockets on loopback.

// Each test file is a crate of its own and uses some of this.
#![allow(dead_code, unreachable_pub)]

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use dist_comm::auth::Secret;
use dist_comm::{Comm, GroupOptions, JoinRequest, SharedMemory, World};
use dist_core::philox::philox4x32;
use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};

/// Time for what should take milliseconds, on a machine with much else to do.
pub const PLENTY: Duration = Duration::from_secs(20);

pub fn request(rank: usize, world_size: usize, shared_memory: SharedMemory) -> JoinRequest {
    JoinRequest {
        rank: Rank(rank),
        world_size,
        generation: 1,
        plan_hash: "plan-a".to_owned(),
        checkpoint_hash: "checkpoint-a".to_owned(),
        secret: Secret::new(&[42; 32]).unwrap(),
        deadline: PLENTY,
        shared_memory,
    }
}

pub fn loopback() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

/// Runs `rank_main` on `n` ranks, each on its thread with its world, and gives their results in rank order.
pub fn on_worlds<T: Send>(
    n: usize,
    shared_memory: SharedMemory,
    rank_main: impl Fn(World) -> T + Sync,
) -> Vec<T> {
    let listener = loopback();
    let addr = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let start = |rank: usize| {
            let (listener, rank_main) = (&listener, &rank_main);
            scope.spawn(move || {
                let request = request(rank, n, shared_memory);
                let world = match rank {
                    0 => World::host(listener, &request),
                    _ => World::join(&[addr], &request),
                };
                rank_main(world.unwrap())
            })
        };
        let ranks: Vec<_> = (0..n).map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    })
}

/// Runs `rank_main` on `n` ranks with a communicator of all of them.
pub fn on_ranks<T: Send>(
    n: usize,
    shared_memory: SharedMemory,
    rank_main: impl Fn(&mut Comm) -> T + Sync,
) -> Vec<T> {
    on_worlds(n, shared_memory, |mut world| rank_main(&mut all(&mut world, PLENTY)))
}

/// The communicator of all ranks.
pub fn all(world: &mut World, deadline: Duration) -> Comm {
    let ranks: Vec<_> = (0..world.members().len()).map(Rank).collect();
    let tcp = world.connect("all", &ranks, GroupOptions::collectives(deadline)).unwrap();
    Comm::from(tcp.expect("a member"))
}

pub fn host(bytes: &mut [u8], dtype: DType) -> RawBuf<'_> {
    RawBuf::Host { bytes, dtype }
}

/// Values of very different sizes, so that another order of adding gives other bits.
pub fn partial_sums(rank: usize, len: usize) -> Vec<u8> {
    let value = |i: usize| {
        let [mantissa, exponent, ..] = philox4x32([i as u32, rank as u32, 0, 0], [7, 7]);
        (mantissa as f32 / u32::MAX as f32 - 0.5) * 2.0_f32.powi((exponent % 24) as i32)
    };
    (0..len).flat_map(|i| value(i).to_le_bytes()).collect()
}
