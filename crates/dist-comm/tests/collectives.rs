//! Every collective between ranks that are threads: the right bytes, the same bits everywhere and every time.

use std::time::Duration;

use dist_comm::{CallName, Comm, CommError, Local};
use dist_core::philox::philox4x32;
use dist_core::raw::RawBuf;
use dist_core::shape::tree_split;
use dist_core::{DType, Rank};
use proptest::prelude::*;

const NAME: CallName = CallName::new("test");

/// Runs `rank_main` on `n` ranks and gives their results in rank order.
fn on_ranks<T: Send>(n: usize, rank_main: impl Fn(&mut Comm) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let ends = Local::world(n, Duration::from_secs(20)).into_iter();
        let start = |local| scope.spawn(|| rank_main(&mut Comm::Local(local)));
        let ranks: Vec<_> = ends.map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    })
}

fn host(bytes: &mut [u8], dtype: DType) -> RawBuf<'_> {
    RawBuf::Host { bytes, dtype }
}

/// Values of very different sizes, so that another order of adding gives other bits.
fn partial_sums(rank: usize, len: usize) -> Vec<f32> {
    let value = |i: usize| {
        let [mantissa, exponent, ..] = philox4x32([i as u32, rank as u32, 0, 0], [7, 7]);
        (mantissa as f32 / u32::MAX as f32 - 0.5) * 2.0_f32.powi((exponent % 24) as i32)
    };
    (0..len).map(value).collect()
}

/// The tree, written as its definition.
fn tree_sum(values: &[f32]) -> f32 {
    if let [value] = values {
        return *value;
    }
    let (left, right) = values.split_at(tree_split(values.len()));
    tree_sum(left) + tree_sum(right)
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

#[test]
fn sums_are_the_tree_over_ranks_in_every_bit() {
    for n in 1..=8 {
        for len in [0, 1, 3, 255, 256, 257, 4099] {
            let parts: Vec<Vec<f32>> = (0..n).map(|rank| partial_sums(rank, len)).collect();
            let sums: Vec<f32> =
                (0..len).map(|i| tree_sum(&parts.iter().map(|part| part[i]).collect::<Vec<_>>())).collect();
            let expected = to_bytes(&sums);
            for _ in 0..2 {
                let all = on_ranks(n, |comm| {
                    let mut bytes = to_bytes(&parts[comm.rank().0]);
                    comm.all_reduce_sum(host(&mut bytes, DType::F32), NAME).map(|()| bytes)
                });
                assert_eq!(all, vec![Ok(expected.clone()); n], "{n} ranks, {len} elements");
            }
        }
    }
}

#[test]
fn all_gather_stands_in_rank_order() {
    for n in 1..=8 {
        for len in [0, 1, 5, 1023] {
            let part = |rank: usize| vec![rank as u8 + 1; len];
            let all = on_ranks(n, |comm| {
                let (mut src, mut dst) = (part(comm.rank().0), vec![0; n * len]);
                comm.all_gather(host(&mut src, DType::U8), host(&mut dst, DType::U8), NAME).map(|()| dst)
            });
            assert_eq!(all, vec![Ok((0..n).flat_map(part).collect::<Vec<_>>()); n]);
        }
    }
}

#[test]
fn broadcast_copies_the_roots() {
    for n in 1..=8 {
        for root in 0..n {
            let all = on_ranks(n, |comm| {
                let mut bytes = [comm.rank().0 as u8; 7];
                comm.broadcast(host(&mut bytes, DType::U8), Rank(root), NAME).map(|()| bytes)
            });
            assert_eq!(all, vec![Ok([root as u8; 7]); n]);
        }
    }
}

#[test]
fn a_ring_passes_messages_in_order() {
    for n in 2..=8 {
        let all = on_ranks(n, |comm| {
            let me = comm.rank().0;
            let (next, before) = (Rank((me + 1) % n), Rank((me + n - 1) % n));
            let mut got = Vec::new();
            for message in 0..5_u8 {
                comm.send(host(&mut [me as u8, message, 0], DType::U8), next, NAME)?;
            }
            for _ in 0..5 {
                let mut bytes = [9; 3];
                comm.recv(host(&mut bytes, DType::U8), before, NAME)?;
                got.push(bytes);
            }
            comm.barrier(NAME).map(|()| (before, got))
        });
        for result in all {
            let (before, got) = result.expect("nobody is late");
            assert_eq!(got, (0..5).map(|message| [before.0 as u8, message, 0]).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_sender_waits_for_a_receiver_that_is_far_behind() {
    let all = on_ranks(2, |comm| {
        for message in 0..200_u8 {
            let mut bytes = [message];
            if comm.rank() == Rank(0) {
                comm.send(host(&mut bytes, DType::U8), Rank(1), NAME)?;
            } else {
                comm.recv(host(&mut bytes, DType::U8), Rank(0), NAME)?;
                assert_eq!(bytes, [message]);
            }
        }
        Ok::<(), CommError>(())
    });
    assert_eq!(all, [Ok(()), Ok(())]);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Sum(usize),
    Gather(usize),
    Broadcast(usize, usize),
    Barrier,
    Pass(usize, usize, usize),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_usize..300).prop_map(Step::Sum),
        (0_usize..300).prop_map(Step::Gather),
        (0_usize..8, 0_usize..300).prop_map(|(root, len)| Step::Broadcast(root, len)),
        Just(Step::Barrier),
        (0_usize..8, 1_usize..8, 0_usize..300).prop_map(|(from, by, len)| Step::Pass(from, by, len)),
    ]
}

/// Everything that a rank saw, as one list of bytes.
fn run_step(comm: &mut Comm, number: usize, step: Step) -> Result<Vec<u8>, CommError> {
    let (n, me) = (comm.world_size(), comm.rank().0);
    let name = CallName::new("random").step(number as u64);
    let mine = |len| to_bytes(&partial_sums(me + 8 * number, len));
    let mut bytes;
    match step {
        Step::Sum(len) => {
            bytes = mine(len);
            comm.all_reduce_sum(host(&mut bytes, DType::F32), name)?;
        }
        Step::Gather(len) => {
            bytes = vec![0; 4 * len * n];
            comm.all_gather(host(&mut mine(len), DType::F32), host(&mut bytes, DType::F32), name)?;
        }
        Step::Broadcast(root, len) => {
            bytes = mine(len);
            comm.broadcast(host(&mut bytes, DType::F32), Rank(root % n), name)?;
        }
        Step::Barrier => {
            bytes = Vec::new();
            comm.barrier(name)?;
        }
        Step::Pass(from, by, len) => {
            let (from, to) = (from % n, (from + by) % n);
            bytes = to_bytes(&partial_sums(number, len));
            if from != to && me == from {
                comm.send(host(&mut bytes, DType::F32), Rank(to), name)?;
            } else if from != to && me == to {
                bytes = vec![0; 4 * len];
                comm.recv(host(&mut bytes, DType::F32), Rank(from), name)?;
            }
        }
    }
    Ok(bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_sequence_of_calls_leaves_all_ranks_alike(
        n in 1_usize..=8, steps in prop::collection::vec(steps(), 1..24),
    ) {
        let run = || on_ranks(n, |comm| {
            steps.iter().enumerate().map(|(number, &step)| run_step(comm, number, step)).collect::<Result<Vec<_>, _>>()
        });
        let all = run();
        prop_assert!(all.iter().all(|seen| seen.is_ok() && *seen == all[0]));
        prop_assert_eq!(run(), all);
    }
}
