//! Links between ranks that go dead while all processes live: a machine's cable is pulled, or one connection to rank 0
//! is broken off or held back. Nobody hangs, and whoever is named stands at an end of the dead link.
#![cfg(target_os = "linux")]

#[path = "support/network.rs"]
mod network;
#[path = "support/proxy.rs"]
mod proxy;
#[path = "support/ranks.rs"]
mod ranks;
#[path = "support/sentence.rs"]
mod sentence;

use std::time::Duration;

use network::{Network, skip};
use proxy::Proxy;
use ranks::{Machine, N_RANKS, Phase, Run, run_cases};
use sentence::Sentence;

/// What ranks wait for one that is silent.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Until all have ended: the deadline, the second that is allowed beyond it, and what a busy machine may take.
const LIMIT: Duration = Duration::from_secs(3 + 1 + 14);

/// Every rank ends in one error; `may_blame` says whom a rank may name.
fn check_ends(run: &mut Run, may_blame: impl Fn(usize) -> Vec<usize>) -> Result<(), String> {
    let ends = run.ends(None, LIMIT);
    let with_words = |error: String| format!("{error}\n{}", run.told());
    if let Some(end) = ends.map_err(with_words)?.iter().find(|end| end.code() != Some(1)) {
        return Err(with_words(format!("a rank ended with {end}")));
    }
    for rank in 0..N_RANKS {
        let sentence = Sentence::of(&run.err(rank)).map_err(with_words)?;
        if !may_blame(rank).contains(&sentence.rank) {
            return Err(with_words(format!("rank {rank} blames rank {}: {}", sentence.rank, sentence.text)));
        }
        if sentence.waited.is_some_and(|waited| waited > LIMIT) {
            return Err(with_words(format!("rank {rank} waited for too long")));
        }
    }
    run.nobody_is_left(None, Duration::from_secs(10)).map_err(with_words)
}

/// No packet passes between one machine and the three others, and no connection closes.
#[test]
fn a_pulled_cable_ends_all_ranks_on_both_sides() {
    if let Err(why) = Network::new(1) {
        return skip("a_pulled_cable_ends_all_ranks_on_both_sides", &why);
    }
    let cases: Vec<_> =
        Phase::ALL.into_iter().flat_map(|phase| (0..N_RANKS).map(move |rank| (phase, rank))).collect();
    run_cases(&cases, |&(phase, cut_off)| {
        let network = Network::new(N_RANKS)?;
        let mut run = Run::of_four_machines(phase, TIMEOUT, "--no-shared-memory", |rank, master| Machine {
            master: master.map_or_else(|| format!("{}:0", Network::address(rank)), str::to_owned),
            wrap: network.wrap(rank),
        });
        run.reach(phase, cut_off);
        network.pull_cable(cut_off)?;
        check_ends(&mut run, |rank| {
            // Seen from the machine that is cut off, it is all others that are silent.
            if rank == cut_off {
                (0..N_RANKS).filter(|&other| other != cut_off).collect()
            } else {
                vec![cut_off]
            }
        })
    });
}

/// How the connection to rank 0 goes dead.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Death {
    Closed,
    Held,
}

/// The connection by which a rank is told what to do goes through a middleman; all others are direct.
#[test]
fn a_dead_connection_to_rank_0_ends_all_ranks() {
    let deaths = [
        (Death::Closed, Phase::Load),
        (Death::Closed, Phase::Prefill),
        (Death::Closed, Phase::Decode),
        (Death::Held, Phase::Prefill),
        (Death::Held, Phase::Decode),
    ];
    let of_death = |(death, phase)| (1..N_RANKS).map(move |rank| (death, phase, rank));
    let cases: Vec<_> = deaths.into_iter().flat_map(of_death).collect();
    run_cases(&cases, |&(death, phase, cut_off)| {
        let mut proxy = None;
        let mut run = Run::of_four_machines(phase, TIMEOUT, "--no-shared-memory", |rank, master| {
            let mut master = master.unwrap_or("127.0.0.1:0").to_owned();
            if rank == cut_off {
                master = proxy.insert(Proxy::to(master)).addr();
            }
            Machine { master, wrap: Vec::new() }
        });
        run.reach(phase, cut_off);
        let proxy = proxy.expect("every case has one");
        match death {
            Death::Closed => proxy.close(),
            Death::Held => proxy.hold(),
        }
        check_ends(&mut run, |_| vec![0, cut_off])
    });
}
