//! The rendezvous as a state machine: clock, network and strangers are the test's.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use dist_comm::auth::{Nonce, Secret};
use dist_comm::codec::{FrameDecoder, from_bytes};
use dist_comm::rendezvous::handshake::{Dialer, DialerStep};
use dist_comm::rendezvous::{
    ConnId, Effect, Event, Member, Outcome, Presentation, Refusal, Rendezvous, RendezvousError, Setup,
};
use dist_core::Rank;
use proptest::prelude::*;

const DEADLINE: Duration = Duration::from_secs(30);
const HANDSHAKE: Duration = Duration::from_secs(5);

fn secret(seed: u8) -> Secret {
    Secret::new(&[seed; 32]).unwrap()
}

fn presentation(rank: usize, world_size: usize) -> Presentation {
    Presentation {
        rank: Rank(rank),
        world_size,
        plan_hash: "plan-a".to_owned(),
        checkpoint_hash: "checkpoint-a".to_owned(),
        generation: 3,
        member: Member {
            addr: ([127, 0, 0, 1], 4000 + rank as u16).into(),
            host: "here".to_owned(),
            pid: 100 + rank as u32,
        },
    }
}

/// One end outside rank 0: a rank, or bytes that somebody sends.
#[allow(clippy::large_enum_variant)]
enum Outside {
    Rank { dialer: Option<Dialer>, secret: Secret, verdict: Option<Result<(), Refusal>>, rest: FrameDecoder },
    Stranger,
}

/// Rank 0, its clock and all connections.
struct Network {
    state: Rendezvous,
    now: Duration,
    outside: BTreeMap<ConnId, Outside>,
    closed: Vec<ConnId>,
    events: Vec<Event>,
    next: u64,
}

impl Network {
    fn new(world_size: usize) -> Self {
        let setup = Setup {
            ours: presentation(0, world_size),
            secret: secret(1),
            session: [9; 16],
            deadline: DEADLINE,
            handshake_deadline: HANDSHAKE,
            strangers_max: 8,
        };
        let state = Rendezvous::new(setup, Duration::ZERO);
        let (outside, closed, events) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { state, now: Duration::ZERO, outside, closed, events, next: 0 }
    }

    fn connect(&mut self, outside: Outside) -> ConnId {
        self.next += 1;
        let conn = ConnId(self.next);
        self.outside.insert(conn, outside);
        let effects = self.state.on_connect(conn, Nonce([self.next as u8; 32]), self.now);
        self.act(effects, usize::MAX);
        conn
    }

    fn connect_rank(&mut self, presentation: &Presentation, secret: Secret) -> ConnId {
        let dialer = Dialer::new(Nonce([77; 32]), presentation).unwrap();
        let rest = FrameDecoder::new(1 << 20);
        self.connect(Outside::Rank { dialer: Some(dialer), secret, verdict: None, rest })
    }

    /// Does what the state machine says, cutting the answers of the ranks in pieces of `cut` bytes.
    fn act(&mut self, effects: Vec<Effect>, cut: usize) {
        for effect in effects {
            match effect {
                Effect::Send(conn, bytes) => self.deliver(conn, &bytes, cut),
                Effect::Close(conn) => self.closed.push(conn),
                Effect::Report(event) => self.events.push(event),
            }
        }
    }

    fn deliver(&mut self, conn: ConnId, bytes: &[u8], cut: usize) {
        let Some(Outside::Rank { dialer, secret, verdict, rest }) = self.outside.get_mut(&conn) else {
            return;
        };
        let Some(talking) = dialer else { return rest.feed(bytes) };
        match talking.on_bytes(secret, bytes) {
            Ok(DialerStep::Send(answer)) => {
                for piece in answer.chunks(cut.min(answer.len())) {
                    let effects = self.state.on_bytes(conn, piece, self.now);
                    self.act(effects, cut);
                }
            }
            Ok(DialerStep::Done(found)) => {
                *verdict = Some(found);
                *rest = dialer.take().map_or_else(|| FrameDecoder::new(1 << 20), Dialer::into_decoder);
                rest.set_limit(1 << 20);
            }
            Ok(DialerStep::Wait) => {}
            Err(_) => *dialer = None,
        }
    }

    fn tick(&mut self, by: Duration) {
        self.now += by;
        let effects = self.state.on_tick(self.now);
        self.act(effects, usize::MAX);
    }

    fn verdict(&self, conn: ConnId) -> Option<&Result<(), Refusal>> {
        let Outside::Rank { verdict, .. } = &self.outside[&conn] else { return None };
        verdict.as_ref()
    }

    fn outcome(&mut self, conn: ConnId) -> Option<Outcome> {
        let Some(Outside::Rank { rest, .. }) = self.outside.get_mut(&conn) else { return None };
        rest.next_frame().unwrap().map(|payload| from_bytes(payload).unwrap())
    }
}

#[test]
fn all_ranks_learn_of_all() {
    let mut net = Network::new(3);
    let two = net.connect_rank(&presentation(2, 3), secret(1));
    assert_eq!(net.outcome(two), None);
    let one = net.connect_rank(&presentation(1, 3), secret(1));
    let members: Vec<_> = (0..3).map(|rank| presentation(rank, 3).member).collect();
    assert_eq!(net.state.outcome(), Some(&Ok(members.clone())));
    for conn in [one, two] {
        assert_eq!(net.outcome(conn), Some(Outcome::Welcome { session: [9; 16], members: members.clone() }));
    }
    assert_eq!(net.events, [Event::Admitted(Rank(2)), Event::Admitted(Rank(1))]);
}

#[test]
fn a_world_of_one_waits_for_nobody() {
    assert_eq!(Network::new(1).state.outcome(), Some(&Ok(vec![presentation(0, 1).member])));
}

fn check_refusal(change: impl FnOnce(&mut Presentation), expected: &str) {
    let mut net = Network::new(3);
    let mut wrong = presentation(2, 3);
    change(&mut wrong);
    let conn = net.connect_rank(&wrong, secret(1));
    let refusal = net.verdict(conn).expect("an answer").clone().expect_err("a refusal");
    assert_eq!(refusal.to_string(), expected);
    assert!(net.closed.contains(&conn));
    assert_eq!(net.events, [Event::Refused(wrong.rank, refusal)]);
    assert_eq!(net.state.outcome(), None, "the right rank 2 may still come");
    net.connect_rank(&presentation(2, 3), secret(1));
    net.connect_rank(&presentation(1, 3), secret(1));
    assert!(net.state.outcome().unwrap().is_ok());
}

#[test]
fn refusals_name_both_values() {
    check_refusal(|rank| rank.world_size = 4, "it expects 4 ranks (rank 0: 3)");
    check_refusal(|rank| rank.rank = Rank(3), "there is no rank 3 in a world of 3");
    check_refusal(|rank| rank.generation = 2, "it is of generation 2 (rank 0: 3)");
    check_refusal(
        |rank| rank.plan_hash = "plan-b".to_owned(),
        "it holds another plan, start it with the same flags or run `dist-cli shard`: plan-b (rank 0: plan-a)",
    );
    check_refusal(
        |rank| rank.checkpoint_hash = "checkpoint-b".to_owned(),
        "it reads another checkpoint, give it the same files: checkpoint-b (rank 0: checkpoint-a)",
    );
    check_refusal(
        |rank| rank.rank = Rank(0),
        "rank 0 is process 100 on here already (this one: process 102 on here)",
    );
}

#[test]
fn a_second_rank_two_does_not_spoil_the_first() {
    let mut net = Network::new(3);
    let first = net.connect_rank(&presentation(2, 3), secret(1));
    let second = net.connect_rank(&presentation(2, 3), secret(1));
    assert_eq!(net.verdict(first), Some(&Ok(())));
    assert!(matches!(net.verdict(second), Some(Err(Refusal::Duplicate { rank: Rank(2), .. }))));
    net.connect_rank(&presentation(1, 3), secret(1));
    assert!(net.state.outcome().unwrap().is_ok());
}

#[test]
fn missing_ranks_are_listed_at_the_deadline_and_the_others_are_told() {
    let mut net = Network::new(5);
    let here = net.connect_rank(&presentation(3, 5), secret(1));
    let mut wrong = presentation(4, 5);
    "plan-b".clone_into(&mut wrong.plan_hash);
    net.connect_rank(&wrong, secret(1));
    net.tick(Duration::from_millis(29_999));
    assert_eq!(net.state.outcome(), None);
    net.tick(Duration::from_millis(1));
    let error = net.state.outcome().unwrap().clone().unwrap_err();
    let expected = "rendezvous failed after 30.0 s: missing ranks: 1, 2; rank 4 was refused: it holds another plan, \
                    start it with the same flags or run `dist-cli shard`: plan-b (rank 0: plan-a)";
    assert_eq!(error.to_string(), expected);
    assert_eq!(net.outcome(here), Some(Outcome::Abort { why: expected.to_owned() }));
}

#[test]
fn nobody_waits_for_a_rank_that_was_refused() {
    let mut net = Network::new(3);
    net.connect_rank(&presentation(1, 3), secret(1));
    let mut wrong = presentation(2, 3);
    "checkpoint-b".clone_into(&mut wrong.checkpoint_hash);
    net.connect_rank(&wrong, secret(1));
    let Some(Err(RendezvousError::Incomplete { missing, refused, .. })) = net.state.outcome() else {
        panic!("it should have ended");
    };
    assert_eq!((missing.len(), refused[0].0), (0, Rank(2)));
}

#[test]
fn a_rank_that_left_may_come_again() {
    let mut net = Network::new(2 + 1);
    let conn = net.connect_rank(&presentation(1, 3), secret(1));
    let effects = net.state.on_close(conn);
    assert_eq!(effects, [Effect::Report(Event::Left(Rank(1)))]);
    net.connect_rank(&presentation(2, 3), secret(1));
    assert_eq!(net.state.outcome(), None);
    net.connect_rank(&presentation(1, 3), secret(1));
    assert!(net.state.outcome().unwrap().is_ok());
}

#[test]
fn another_secret_and_a_reflected_challenge_prove_nothing() {
    let mut net = Network::new(2);
    let conn = net.connect_rank(&presentation(1, 2), secret(2));
    assert_eq!((net.verdict(conn), net.closed.clone()), (None, vec![conn]));
    // What rank 0 sends is sent back to it.
    let mirror = net.connect(Outside::Stranger);
    let effects = net.state.on_connect(ConnId(99), Nonce([5; 32]), net.now);
    let Some(Effect::Send(_, challenge)) = effects.first() else { panic!("a challenge") };
    let effects = net.state.on_bytes(mirror, challenge, net.now);
    assert!(effects.contains(&Effect::Close(mirror)));
    assert_eq!(net.state.outcome(), None);
}

#[test]
fn who_was_turned_away_is_told_beside_who_is_missing() {
    let mut net = Network::new(2);
    net.connect_rank(&presentation(1, 2), secret(2));
    net.tick(Duration::from_secs(30));
    let error = net.state.outcome().unwrap().clone().unwrap_err();
    let expected = "rendezvous failed after 30.0 s: missing ranks: 1; one connection was turned away: the two sides \
                    have different secrets: give every rank the same one";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn silence_costs_a_slot_until_its_deadline_and_no_more_than_the_slots() {
    let mut net = Network::new(2);
    for _ in 0..100 {
        net.connect(Outside::Stranger);
    }
    assert_eq!((net.state.n_strangers(), net.closed.len()), (8, 92));
    net.tick(HANDSHAKE);
    assert_eq!((net.state.n_strangers(), net.closed.len()), (0, 100));
    net.connect_rank(&presentation(1, 2), secret(1));
    assert!(net.state.outcome().unwrap().is_ok());
}

/// What happens on the network, in any order.
#[derive(Clone, Debug)]
enum Happening {
    Garbage(Vec<u8>),
    HalfFrame(usize),
    HugeLength,
    Silence,
    WrongSecret(usize),
    WrongPlan(usize),
    Hangup,
    Rank(usize),
    Pass(u64),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..100).prop_map(Happening::Garbage),
        (0..40_usize).prop_map(Happening::HalfFrame),
        Just(Happening::HugeLength),
        Just(Happening::Silence),
        (0..6_usize).prop_map(Happening::WrongSecret),
        (6..9_usize).prop_map(Happening::WrongPlan),
        Just(Happening::Hangup),
        (1..4_usize).prop_map(Happening::Rank),
        (0..200_u64).prop_map(Happening::Pass),
    ]
}

fn happen(net: &mut Network, happening: Happening, cut: usize) {
    let speak = |net: &mut Network, bytes: &[u8]| {
        let conn = net.connect(Outside::Stranger);
        for piece in bytes.chunks(cut) {
            let effects = net.state.on_bytes(conn, piece, net.now);
            net.act(effects, cut);
        }
        conn
    };
    match happening {
        Happening::Garbage(bytes) => drop(speak(net, &bytes)),
        Happening::HalfFrame(len) => {
            let frame = dist_comm::codec::frame(&[0; 28], 28).unwrap();
            speak(net, &frame[..len.min(frame.len() - 1)]);
        }
        Happening::HugeLength => drop(speak(net, &dist_comm::codec::header(u32::MAX as usize))),
        Happening::Silence => drop(net.connect(Outside::Stranger)),
        Happening::WrongSecret(rank) => drop(net.connect_rank(&presentation(rank, 4), secret(2))),
        Happening::WrongPlan(rank) => {
            let mut wrong = presentation(rank, 4);
            "plan-b".clone_into(&mut wrong.plan_hash);
            net.connect_rank(&wrong, secret(1));
        }
        Happening::Hangup => {
            let conn = speak(net, b"dG");
            let effects = net.state.on_close(conn);
            net.act(effects, cut);
        }
        Happening::Rank(rank) => drop(net.connect_rank(&presentation(rank, 4), secret(1))),
        Happening::Pass(ms) => net.tick(Duration::from_millis(ms)),
    }
}

proptest! {
    #[test]
    fn whatever_strangers_do_the_ranks_find_each_other(
        happenings in prop::collection::vec(happening(), 0..60),
        order in Just(vec![1_usize, 2, 3]).prop_shuffle(),
        cut in 1..80_usize,
    ) {
        let mut net = Network::new(4);
        for happening in happenings {
            happen(&mut net, happening, cut);
            prop_assert!(net.state.n_strangers() <= 8);
        }
        for rank in order {
            net.connect_rank(&presentation(rank, 4), secret(1));
        }
        let members: Vec<_> = (0..4).map(|rank| presentation(rank, 4).member).collect();
        prop_assert_eq!(net.state.outcome(), Some(&Ok(members)));
    }
}
