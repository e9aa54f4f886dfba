//! Ranks that are late, gone or somewhere else: the others are told who, where and since when.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use dist_comm::{CallName, Comm, CommError, Departure, Local, Solo};
use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};

const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(30);

fn sum(comm: &mut Comm, n_bytes: usize, name: CallName) -> Result<(), CommError> {
    comm.all_reduce_sum(RawBuf::Host { bytes: &mut vec![0; n_bytes], dtype: DType::F32 }, name)
}

fn buf(bytes: &mut [u8]) -> RawBuf<'_> {
    RawBuf::Host { bytes, dtype: DType::F32 }
}

fn ends(n: usize, deadline: Duration) -> Vec<Comm> {
    Local::world(n, deadline).into_iter().map(Comm::Local).collect()
}

#[test]
fn a_rank_that_never_comes_is_named_with_its_last_call() {
    let name = |step| CallName::new("attention output").layer(11).phase("decode").step(step);
    let all_done = Barrier::new(3);
    let rank_main = |mut comm: Comm| {
        sum(&mut comm, 64, name(71)).expect("all are there");
        let result = if comm.rank() == Rank(2) { Ok(()) } else { sum(&mut comm, 64, name(72)) };
        all_done.wait(); // rank 2 is alive all the time
        result.map_err(|error| error.to_string())
    };
    let start = Instant::now();
    let results: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = ends(3, SHORT).into_iter().map(|comm| scope.spawn(|| rank_main(comm))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    });
    let took = start.elapsed();
    assert!((SHORT..SHORT + Duration::from_secs(1)).contains(&took), "{took:?}");
    let told = "rank 2 never entered all_reduce #2 (layer 11, attention output; decode step 72); \
                it was last seen in all_reduce #1 0.";
    let told = |error: &String| error.starts_with(told) && error.ends_with(" s ago");
    assert!(results[..2].iter().all(|result| result.as_ref().is_err_and(told)), "{results:?}");
    assert_eq!(results[2], Ok(()));
}

#[test]
fn ranks_that_were_never_there_are_all_listed_by_their_world_names() {
    let members = [4, 5, 6].map(Rank).to_vec();
    let mut ends = Local::group(members, SHORT).into_iter().map(Comm::Local).collect::<Vec<_>>();
    let error = ends[0].barrier(CallName::new("start")).expect_err("nobody else");
    let told = ["rank 5", "rank 6"]
        .map(|rank| format!("{rank} never entered barrier #1 (start); it was never seen in 0."));
    assert!(error.to_string().split(". ").zip(&told).all(|(said, told)| said.starts_with(told)), "{error}");
    assert_eq!(error.to_string().matches("never entered").count(), 2, "{error}");
    assert_eq!(ends[0].barrier(CallName::new("again")), Err(error), "an error ends the communicator");
    let lost = ends[1].barrier(CallName::new("start")).expect_err("rank 4 gave up and 6 is absent");
    assert!(matches!(lost, CommError::Timeout { .. }), "{lost}");
}

#[test]
fn a_panic_reaches_the_others_at_once() {
    let start = Instant::now();
    let results = std::thread::scope(|scope| {
        let rank_main = |mut comm: Comm| {
            sum(&mut comm, 8, CallName::new("first"))?;
            if comm.rank() == Rank(1) {
                std::panic::resume_unwind(Box::new("a bug in rank 1"));
            }
            sum(&mut comm, 8, CallName::new("second"))
        };
        let ranks: Vec<_> =
            ends(4, LONG).into_iter().map(|comm| scope.spawn(move || rank_main(comm))).collect();
        ranks.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(results[1].is_err());
    for survivor in [0, 2, 3] {
        let error = results[survivor].as_ref().expect("no panic").as_ref().expect_err("rank 1 is gone");
        let CommError::RankLost { rank: Rank(1), why: Departure::Panicked, last: Some(last), .. } = error
        else {
            panic!("{error}");
        };
        assert_eq!(last.call.number, 1);
        let told = "rank 1 is lost before all_reduce #2 (second): its thread panicked; it was last seen in all_reduce #1";
        assert!(error.to_string().starts_with(told), "{error}");
    }
}

#[test]
fn a_rank_that_leaves_ends_waiting_receivers_but_not_what_it_sent() {
    let mut ends = ends(2, LONG);
    let (mut one, mut zero) = (ends.pop().expect("two"), ends.pop().expect("two"));
    let name = CallName::new("stage output").step(3);
    let send =
        |comm: &mut Comm| comm.send(RawBuf::Host { bytes: &mut [7; 4], dtype: DType::U8 }, Rank(1), name);
    send(&mut zero).expect("there is room");
    drop(zero);
    let mut bytes = [0; 4];
    let mut recv = || one.recv(RawBuf::Host { bytes: &mut bytes, dtype: DType::U8 }, Rank(0), name);
    assert_eq!(recv(), Ok(()));
    let error = recv().expect_err("nothing more can come");
    let told = "rank 0 is lost before recv #2 from rank 0 (stage output; step 3): it left; it was last seen in send #1";
    assert!(error.to_string().starts_with(told), "{error}");
    assert_eq!(bytes, [7; 4]);
}

#[test]
fn a_receiver_and_a_sender_without_the_other_stop_at_the_deadline() {
    let mut pair = ends(2, SHORT);
    let error = pair[1].recv(buf(&mut [0]), Rank(0), CallName::new("hidden")).expect_err("nothing sent");
    let told = "rank 0 never sent what recv #1 from rank 0 (hidden) waits for; it was never seen in 0.";
    assert!(error.to_string().starts_with(told), "{error}");
    let mut pair = ends(2, SHORT);
    let error = (0..100).find_map(|_| pair[0].send(buf(&mut [0]), Rank(1), CallName::new("hidden")).err());
    let told = error.expect("nobody takes them").to_string();
    let start = "rank 1 never took up send #9 to rank 1 (hidden); it was never seen in 0.";
    assert!(told.starts_with(start), "{told}");
}

/// Two ranks run different calls; both errors must name both.
#[track_caller]
fn check_mismatch(
    zero: fn(&mut Comm) -> Result<(), CommError>,
    one: fn(&mut Comm) -> Result<(), CommError>,
    told: [&str; 2],
) {
    let mut ends = ends(2, LONG).into_iter();
    let (mut first, mut second) = (ends.next().expect("two"), ends.next().expect("two"));
    let (error, other) = std::thread::scope(|scope| {
        let other = scope.spawn(move || one(&mut second).expect_err("mismatch"));
        (zero(&mut first).expect_err("mismatch"), other.join().expect("no panic"))
    });
    assert_eq!(
        error.to_string(),
        format!("ranks have come apart: {} {}", told[0], told[1].replace("RANK 1 is", "rank 1"))
    );
    for error in [error, other] {
        assert!(matches!(error, CommError::Mismatch { .. }), "{error}");
    }
}

#[test]
fn calls_that_differ_name_both_sides() {
    check_mismatch(
        |comm| sum(comm, 64, CallName::new("hidden")),
        |comm| {
            comm.broadcast(
                RawBuf::Host { bytes: &mut [0; 64], dtype: DType::F32 },
                Rank(0),
                CallName::new("hidden"),
            )
        },
        [
            "rank 0 is in all_reduce #1 (hidden) with 64 bytes of f32,",
            "rank 1 in broadcast #1 (hidden) with 64 bytes of f32 from rank 0",
        ],
    );
    check_mismatch(
        |comm| sum(comm, 64, CallName::new("hidden")),
        |comm| sum(comm, 32, CallName::new("hidden")),
        [
            "rank 0 is in all_reduce #1 (hidden) with 64 bytes of f32,",
            "rank 1 in all_reduce #1 (hidden) with 32 bytes of f32",
        ],
    );
    check_mismatch(
        |comm| sum(comm, 8, CallName::new("hidden").layer(3)),
        |comm| sum(comm, 8, CallName::new("hidden").layer(4)),
        [
            "rank 0 is in all_reduce #1 (layer 3, hidden) with 8 bytes of f32,",
            "rank 1 in all_reduce #1 (layer 4, hidden) with 8 bytes of f32",
        ],
    );
}

#[test]
fn what_cannot_be_done_is_said_and_reaches_the_others() {
    let mut ends = ends(2, LONG);
    let device = || RawBuf::Device { ptr: 64, bytes: 8, dtype: DType::F32 };
    let error = ends[0].all_reduce_sum(device(), CallName::new("x")).expect_err("no device memory");
    let told =
        "local ranks cannot take device memory: use NCCL between accelerators, or copy to the host first";
    assert_eq!(error.to_string(), told);
    let lost = ends[1].barrier(CallName::new("x")).expect_err("rank 0 gave up");
    assert!(lost.to_string().contains("it gave up: local ranks cannot take device memory"), "{lost}");
}

#[test]
fn arguments_are_checked() {
    let name = CallName::new("x");
    let fresh = || ends(2, SHORT).remove(0);
    let errors = [
        fresh().all_gather(buf(&mut [0; 8]), buf(&mut [0; 8]), name),
        fresh().broadcast(buf(&mut [0; 8]), Rank(2), name),
        fresh().send(buf(&mut [0; 8]), Rank(0), name),
        fresh().all_reduce_sum(RawBuf::Host { bytes: &mut [0; 8], dtype: DType::BF16 }, name),
        fresh().all_reduce_sum(buf(&mut [0; 7]), name),
    ];
    let told = errors.map(|result| result.expect_err("refused").to_string());
    assert_eq!(told[0], "all_gather #1 (x) got a buffer of 8 bytes where 16 are needed");
    assert_eq!(
        told[1],
        "broadcast #1 (x) names rank 2; the communicator has ranks 0 to 1, and nobody sends to itself"
    );
    assert!(told[2].contains("nobody sends to itself"), "{}", told[2]);
    assert!(told[3..].iter().all(|told| told.ends_with("plan f32 as the wire type")), "{told:?}");
}

#[test]
fn one_rank_needs_nobody() {
    let mut comm = Comm::Solo(Solo::new());
    let name = CallName::new("x");
    let (mut src, mut dst) = ([1, 2, 3, 4], [0; 4]);
    assert_eq!((comm.rank(), comm.world_size()), (Rank(0), 1));
    comm.all_gather(buf(&mut src), buf(&mut dst), name).expect("a copy");
    comm.all_reduce_sum(buf(&mut dst), name).expect("nothing to add");
    comm.broadcast(buf(&mut dst), Rank(0), name).expect("nothing to copy");
    comm.barrier(name).expect("nobody to wait for");
    assert_eq!(dst, src);
    assert!(comm.send(buf(&mut dst), Rank(0), name).is_err());
    assert!(comm.all_gather(buf(&mut src), buf(&mut [0; 8]), name).is_err());
}
