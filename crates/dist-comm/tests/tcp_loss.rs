//! What ranks say when one of them is slow, gone or stopped. The last tests start real processes and send real signals;
//! each starts this file's test binary again as a rank.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

mod ring;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use dist_comm::{
    CallName, Comm, CommError, ControlError, Departure, GroupOptions, SharedMemory, Wait, World,
};
use dist_core::{DType, Rank};
use ring::{PLENTY, all, host, on_worlds, request};
use rustix::process::{Pid, Signal, kill_process};

const WAYS: [SharedMemory; 2] = [SharedMemory::Use, SharedMemory::Avoid];

fn name(step: u64) -> CallName {
    CallName::new("attention output").layer(11).phase("decode").step(step)
}

fn reduce(comm: &mut Comm, step: u64) -> Result<(), CommError> {
    comm.all_reduce_sum(host(&mut [0; 16 << 10], DType::F32), name(step))
}

#[test]
fn a_slow_rank_is_named_with_the_call_and_where_it_was_last() {
    for way in WAYS {
        let errors = on_worlds(4, way, |mut world| {
            let mut comm = all(&mut world, Duration::from_millis(600));
            (0..3).for_each(|step| reduce(&mut comm, step).unwrap());
            if world.rank() == Rank(2) {
                std::thread::sleep(Duration::from_millis(1500));
            }
            let start = Instant::now();
            (reduce(&mut comm, 3).unwrap_err().to_string(), start.elapsed())
        });
        for (error, took) in &errors {
            let expected = "rank 2 never entered all_reduce #4 (layer 11, attention output; decode step 3); it was \
                            last seen in all_reduce #3 ";
            assert!(error.starts_with(expected), "{way:?}: {error}");
            assert!(*took < Duration::from_millis(1600), "{took:?}");
        }
    }
}

#[test]
fn a_rank_that_computes_for_long_is_waited_for() {
    for way in WAYS {
        let results = on_worlds(3, way, |mut world| {
            let mut comm = all(&mut world, PLENTY);
            reduce(&mut comm, 0)?;
            if world.rank() == Rank(1) {
                // Longer than any silence that would be suspicious.
                std::thread::sleep(Duration::from_millis(1500));
            }
            reduce(&mut comm, 1)
        });
        assert_eq!(results, vec![Ok(()); 3]);
    }
}

#[test]
fn a_rank_that_gets_on_may_take_longer_than_the_deadline() {
    for way in WAYS {
        let results = on_worlds(3, way, |mut world| {
            let mut comm = all(&mut world, Duration::from_millis(800));
            reduce(&mut comm, 0)?;
            if world.rank() == Rank(1) {
                for _ in 0..40 {
                    std::thread::sleep(Duration::from_millis(50));
                    comm.get_on();
                }
            }
            reduce(&mut comm, 1)
        });
        assert_eq!(results, vec![Ok(()); 3], "{way:?}");
    }
}

/// How a rank ends.
type End = fn(&World);

#[test]
fn a_rank_that_leaves_or_panics_or_fails_is_a_loss_at_once() {
    let ends: [(End, &str); 3] = [
        (
            |_| {},
            "rank 1 is lost before all_reduce #2 (layer 11, attention output; decode step 1): it left; ",
        ),
        (|world| world.fail("out of memory: 8 GiB for the KV cache"), "it gave up: out of memory: 8 GiB"),
        (|_| std::panic::resume_unwind(Box::new("as if")), "its thread panicked; "),
    ];
    for way in WAYS {
        for (end, expected) in ends {
            let errors = on_worlds(3, way, |mut world| {
                let mut comm = all(&mut world, PLENTY);
                reduce(&mut comm, 0).unwrap();
                if world.rank() == Rank(1) {
                    let ended = std::panic::AssertUnwindSafe(move || {
                        let _comm = comm;
                        end(&world);
                    });
                    let _ = std::panic::catch_unwind(ended);
                    return None;
                }
                let start = Instant::now();
                let error = reduce(&mut comm, 1).unwrap_err();
                assert!(start.elapsed() < Duration::from_secs(5));
                assert_eq!(reduce(&mut comm, 2), Err(error.clone()), "the first error stays");
                Some(error.to_string())
            });
            for error in errors.into_iter().flatten() {
                assert!(error.contains(expected), "{way:?}: {error}");
            }
        }
    }
}

#[test]
fn an_idle_rank_learns_of_a_loss_elsewhere() {
    let results = on_worlds(3, SharedMemory::Use, |mut world| {
        match world.rank().0 {
            0 => std::thread::sleep(Duration::from_millis(500)),
            2 => world.fail("disk full"),
            _ => return Some(world.control().recv(Rank(0), Wait::UntilSilentFor(PLENTY))),
        }
        None
    });
    let error = results[1].clone().unwrap().unwrap_err();
    let why = Departure::Failed("disk full".to_owned());
    assert_eq!(error, ControlError::RankLost { rank: Rank(2), why, last: None });
}

#[test]
fn a_busy_rank_that_looks_up_learns_of_a_loss() {
    let results = on_worlds(3, SharedMemory::Use, |world| {
        match world.rank().0 {
            0 => std::thread::sleep(Duration::from_millis(500)),
            2 => world.fail("disk full"),
            _ => {
                let start = Instant::now();
                let mut looked = Ok(());
                while looked.is_ok() && start.elapsed() < PLENTY {
                    looked = world.look(PLENTY);
                    std::thread::sleep(Duration::from_millis(1));
                }
                return Some(looked);
            }
        }
        None
    });
    let error = results[1].clone().unwrap().unwrap_err();
    assert!(matches!(error, ControlError::RankLost { rank: Rank(2), .. }), "{error}");
}

#[test]
fn ranks_that_have_come_apart_say_so() {
    for way in WAYS {
        let errors = on_worlds(2, way, |mut world| {
            let mut comm = all(&mut world, PLENTY);
            let step = world.rank().0 as u64;
            reduce(&mut comm, step).unwrap_err()
        });
        let is_apart = |error: &CommError| match error {
            CommError::Mismatch { .. } => true,
            // The other one may have said so first.
            CommError::RankLost { why: Departure::Failed(why), .. } => why.contains("have come apart"),
            _ => false,
        };
        assert!(errors.iter().all(is_apart), "{errors:?}");
    }
}

/// What one rank does in the place of an all-reduce.
type OtherCall = fn(&mut Comm) -> Result<(), CommError>;

/// A rank in another operation or with another size, said with both sides' calls by one of the two at least.
#[test]
fn another_operation_or_size_names_both_calls() {
    let others: [(OtherCall, &str); 2] = [
        (|comm| comm.barrier(name(0)), "barrier #1 ("),
        (|comm| comm.all_reduce_sum(host(&mut [0; 64], DType::F32), name(0)), "with 64 bytes of f32"),
    ];
    for way in WAYS {
        for (other, theirs) in others {
            let errors = on_worlds(2, way, |mut world| {
                let mut comm = all(&mut world, PLENTY);
                let call = if world.rank() == Rank(1) { other } else { |comm: &mut Comm| reduce(comm, 0) };
                call(&mut comm).unwrap_err().to_string()
            });
            let is_whole = |error: &String| {
                error.contains("ranks have come apart: ")
                    && error.contains("all_reduce #1 (")
                    && error.contains("with 16384 bytes of f32")
                    && error.contains(theirs)
            };
            assert!(errors.iter().all(is_whole), "{way:?}: {errors:?}");
        }
    }
}

#[test]
fn a_rank_that_made_no_call_at_all_was_never_seen() {
    let limit = Duration::from_millis(400);
    let told = on_worlds(3, SharedMemory::Use, |mut world| {
        let mut comm = all(&mut world, limit);
        if world.rank() == Rank(1) {
            // There until the others have given it up.
            let lost = world.control().recv(Rank(0), Wait::Within(PLENTY));
            return lost.unwrap_err().to_string();
        }
        let start = Instant::now();
        let error = reduce(&mut comm, 73).unwrap_err().to_string();
        assert!(start.elapsed() < limit + Duration::from_secs(1));
        error
    });
    let expected =
        "rank 1 never entered all_reduce #1 (layer 11, attention output; decode step 73); it was never seen";
    assert!(told[0].starts_with(expected) && told[2].starts_with(expected), "{told:?}");
    assert!(told[1].starts_with("rank 1 is lost: "), "{}", told[1]);
}

/// tp 2 × pp 2; rank 3 stays away. Its neighbours wait for it in two communicators, rank 0 for rank 2 in a third.
#[test]
fn a_rank_that_stays_away_is_named_across_communicators() {
    let limit = Duration::from_millis(800);
    for way in WAYS {
        let told = on_worlds(4, way, |mut world| {
            let (mut tp, mut pp) = mesh_of_four(&mut world, limit);
            tp.barrier(name(0)).unwrap();
            let start = Instant::now();
            let mut word = [0; 4];
            let error = match world.rank().0 {
                0 | 1 => pp.recv(host(&mut word, DType::U8), Rank(1), name(1)).unwrap_err(),
                2 => tp.barrier(name(1)).unwrap_err(),
                _ => {
                    let lost = world.control().recv(Rank(0), Wait::Within(PLENTY));
                    assert!(matches!(lost, Err(ControlError::RankLost { .. })), "{lost:?}");
                    return None;
                }
            };
            assert!(start.elapsed() < limit + Duration::from_secs(1), "{:?}", start.elapsed());
            Some(error.to_string())
        });
        for error in told.into_iter().flatten() {
            assert!(error.starts_with("rank 3 never "), "{way:?}: {error}");
            assert!(error.contains("it was last seen in barrier #1 "), "{way:?}: {error}");
        }
    }
}

/// Both communicators of a rank in a mesh of tp 2 × pp 2.
fn mesh_of_four(world: &mut World, limit: Duration) -> (Comm, Comm) {
    let options = GroupOptions::collectives(limit);
    let mut connect = |name: &str, groups: [[Rank; 2]; 2]| {
        let found = groups.map(|group| world.connect(name, &group, options).unwrap());
        Comm::from(found.into_iter().flatten().next().unwrap())
    };
    let tp = connect("tp", [[Rank(0), Rank(1)], [Rank(2), Rank(3)]]);
    (tp, connect("pp", [[Rank(0), Rank(2)], [Rank(1), Rank(3)]]))
}

/// The end of a chain of waits is named, not its first link: stage 2 waits for stage 1, which waits for stage 0.
#[test]
fn a_pipeline_names_the_stage_that_is_slow() {
    let errors = on_worlds(3, SharedMemory::Use, |mut world| {
        let mut comm = all(&mut world, Duration::from_millis(800));
        let me = world.rank().0;
        if me == 0 {
            std::thread::sleep(Duration::from_millis(1600));
            return None;
        }
        Some(comm.recv(host(&mut [0; 4], DType::U8), Rank(me - 1), name(0)).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        let named = match error {
            CommError::Timeout { missing, .. } => missing[0].rank,
            CommError::RankLost { rank, .. } => rank,
            other => panic!("{other}"),
        };
        assert_eq!(named, Rank(0));
    }
}

const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Not a test: one rank of the tests below, in a process of its own.
#[test]
#[ignore = "started by the tests below"]
fn rank_process() {
    let var = |name: &str| std::env::var(name).unwrap();
    let (rank, n): (usize, usize) = (var("TEST_RANK").parse().unwrap(), var("TEST_RANKS").parse().unwrap());
    let addr: SocketAddr = var("TEST_ADDR").parse().unwrap();
    let request = request(rank, n, if var("TEST_SHARES") == "true" { WAYS[0] } else { WAYS[1] });
    let world = match rank {
        0 => World::host(&std::net::TcpListener::bind(addr).unwrap(), &request),
        _ => World::join(&[addr], &request),
    };
    let mut comm = all(&mut world.unwrap(), STOP_DEADLINE);
    for step in 0.. {
        if let Err(error) = reduce(&mut comm, step) {
            println!("\nended: {error}");
            return;
        }
        if step == 20 {
            println!("\nready");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Processes that do not outlive the test.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts ranks, sends `signal` to one when all are at work, and gives what the others say with how long it took.
fn signal_one(n: usize, victim: usize, signal: Signal, shares: bool) -> Vec<(usize, String, Duration)> {
    let addr = ring::loopback().local_addr().unwrap();
    let (tell, told) = mpsc::channel();
    let start = |rank: usize| {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "rank_process", "--ignored", "--nocapture"])
            .env("TEST_RANK", rank.to_string())
            .env("TEST_RANKS", n.to_string())
            .env("TEST_ADDR", addr.to_string())
            .env("TEST_SHARES", shares.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let tell = tell.clone();
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| drop(tell.send((rank, line))));
        });
        child
    };
    let ranks = Ranks((0..n).map(start).collect());
    let next = |word: &str| loop {
        let (rank, line) = told.recv_timeout(PLENTY).expect("the ranks say something");
        if line.starts_with(word) {
            return (rank, line);
        }
    };
    (0..n).for_each(|_| drop(next("ready")));
    kill_process(Pid::from_child(&ranks.0[victim]), signal).unwrap();
    let start = Instant::now();
    let others = (1..n).map(|_| {
        let (rank, line) = next("ended");
        (rank, line, start.elapsed())
    });
    others.collect()
}

fn check_signal(signal: Signal, limit: Duration, sentence: &str) {
    for shares in [true, false] {
        for victim in [0, 2] {
            for (rank, line, took) in signal_one(3, victim, signal, shares) {
                assert_ne!(rank, victim);
                let named = format!("ended: rank {victim} ");
                assert!(line.starts_with(&named) && line.contains(sentence), "rank {rank}: {line}");
                assert!(took < limit, "rank {rank} took {took:?}: {line}");
            }
        }
    }
}

#[test]
fn a_killed_process_is_named_at_once() {
    check_signal(
        Signal::KILL,
        Duration::from_secs(1),
        "its connections closed; it was last seen in all_reduce #",
    );
}

#[test]
fn a_stopped_process_is_named_within_the_deadline_plus_a_second() {
    let limit = STOP_DEADLINE + Duration::from_secs(1);
    check_signal(Signal::STOP, limit, "never entered all_reduce #");
}
