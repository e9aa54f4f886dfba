//! A network that changes, repeats and reorders what a rank says, and ends that only pretend to know the secret.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use dist_comm::auth::{Nonce, Secret};
use dist_comm::codec::{HEADER_BYTES, PROTOCOL_VERSION};
use dist_comm::rendezvous::handshake::{Acceptor, Dialer, DialerStep, HandshakeError};
use dist_comm::rendezvous::{ConnId, Effect, Event, Member, Presentation, Rendezvous, Setup};
use dist_core::Rank;
use proptest::prelude::*;
use proptest::sample::Index;

const STRANGERS_MAX: usize = 4;
const DEADLINE: Duration = Duration::from_secs(30);

fn secret(seed: u8) -> Secret {
    Secret::new(&[seed; 32]).unwrap()
}

fn presentation(rank: usize) -> Presentation {
    Presentation {
        rank: Rank(rank),
        world_size: 2,
        plan_hash: "plan-a".to_owned(),
        checkpoint_hash: "checkpoint-a".to_owned(),
        generation: 3,
        member: Member { addr: ([127, 0, 0, 1], 4000).into(), host: "here".to_owned(), pid: 100 },
    }
}

/// Rank 0 of two, waiting for rank 1.
fn rank_zero() -> Rendezvous {
    let setup = Setup {
        ours: presentation(0),
        secret: secret(1),
        session: [9; 16],
        deadline: DEADLINE,
        handshake_deadline: DEADLINE,
        strangers_max: STRANGERS_MAX,
    };
    Rendezvous::new(setup, Duration::ZERO)
}

/// Opens connection `conn` and gives what rank 1 would answer there.
fn answer_of_rank_one(state: &mut Rendezvous, conn: u64, nonce: u8) -> Vec<u8> {
    let effects = state.on_connect(ConnId(conn), Nonce([nonce; 32]), Duration::ZERO);
    let challenge = effects.into_iter().find_map(|effect| match effect {
        Effect::Send(to, bytes) if to == ConnId(conn) => Some(bytes),
        _ => None,
    });
    let mut dialer = Dialer::new(Nonce([77; 32]), &presentation(1)).unwrap();
    match dialer.on_bytes(&secret(1), &challenge.unwrap()).unwrap() {
        DialerStep::Send(answer) => answer,
        other => panic!("{other:?}"),
    }
}

/// What the network does to some bytes.
#[derive(Clone, Debug)]
enum Harm {
    Flip(Index, u8),
    CutOff(Index),
    Lose(Index, Index),
    Repeat(Index, Index),
    Swap(Index, Index, Index),
    Insert(Index, Vec<u8>),
}

fn harm() -> impl Strategy<Value = Harm> {
    let at = any::<Index>;
    prop_oneof![
        (at(), 1..=u8::MAX).prop_map(|(at, bits)| Harm::Flip(at, bits)),
        at().prop_map(Harm::CutOff),
        (at(), at()).prop_map(|(from, to)| Harm::Lose(from, to)),
        (at(), at()).prop_map(|(from, to)| Harm::Repeat(from, to)),
        (at(), at(), at()).prop_map(|(from, middle, to)| Harm::Swap(from, middle, to)),
        (at(), prop::collection::vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Harm::Insert(at, bytes)),
    ]
}

fn apply(harm: &Harm, bytes: &mut Vec<u8>) {
    let places = |ends: &[&Index]| {
        let mut places: Vec<_> = ends.iter().map(|at| at.index(bytes.len() + 1)).collect();
        places.sort_unstable();
        places
    };
    match harm {
        Harm::Flip(at, bits) if !bytes.is_empty() => {
            let at = at.index(bytes.len());
            bytes[at] ^= bits;
        }
        Harm::Flip(..) => {}
        Harm::CutOff(at) => bytes.truncate(places(&[at])[0]),
        Harm::Lose(from, to) => {
            let places = places(&[from, to]);
            bytes.drain(places[0]..places[1]);
        }
        Harm::Repeat(from, to) => {
            let places = places(&[from, to]);
            let again = bytes[places[0]..places[1]].to_vec();
            bytes.splice(places[1]..places[1], again);
        }
        Harm::Swap(from, middle, to) => {
            let places = places(&[from, middle, to]);
            bytes[places[0]..places[2]].rotate_left(places[1] - places[0]);
        }
        Harm::Insert(at, more) => {
            let at = places(&[at])[0];
            bytes.splice(at..at, more.iter().copied());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn an_answer_that_was_changed_on_its_way_admits_nobody(
        harms in prop::collection::vec(harm(), 1..4),
        cut in 1..200_usize,
    ) {
        let mut state = rank_zero();
        let answer = answer_of_rank_one(&mut state, 1, 1);
        let mut arrived = answer.clone();
        for harm in &harms {
            apply(harm, &mut arrived);
        }
        let mut sent_back = 0;
        for piece in arrived.chunks(cut) {
            for effect in state.on_bytes(ConnId(1), piece, Duration::ZERO) {
                if let Effect::Send(_, bytes) = effect {
                    sent_back += bytes.len();
                }
            }
        }
        // Only what begins with the whole answer is one; what harm did nothing is no harm.
        if arrived.starts_with(&answer) {
            return Ok(());
        }
        prop_assert_eq!(state.connections().count(), 0);
        prop_assert!(state.outcome().is_none());
        prop_assert!(sent_back < 200, "a stranger made us send {} bytes", sent_back);
        // The true rank finds its place all the same.
        let answer = answer_of_rank_one(&mut state, 2, 2);
        state.on_bytes(ConnId(2), &answer, Duration::ZERO);
        prop_assert!(matches!(state.outcome(), Some(Ok(_))));
    }

    #[test]
    fn answers_of_many_connections_in_any_order_are_good_only_where_they_belong(
        deliveries in prop::collection::vec((0..6_usize, 0..6_u64), 0..40),
    ) {
        let mut state = rank_zero();
        let answers: Vec<_> = (0..6).map(|conn| answer_of_rank_one(&mut state, conn, conn as u8)).collect();
        for (which, conn) in deliveries {
            let was_waiting = state.outcome().is_none();
            state.on_bytes(ConnId(conn), &answers[which], Duration::ZERO);
            if was_waiting && state.outcome().is_some() {
                prop_assert_eq!(which as u64, conn, "a replayed answer was taken");
            }
            prop_assert!(state.n_strangers() <= STRANGERS_MAX);
        }
    }

    #[test]
    fn a_dialer_takes_nobody_at_his_word(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 1..100_usize) {
        let mut dialer = Dialer::new(Nonce([77; 32]), &presentation(1)).unwrap();
        let (_, challenge) = Acceptor::new(Nonce([3; 32])).unwrap();
        dialer.on_bytes(&secret(1), &challenge).unwrap();
        for piece in bytes.chunks(cut) {
            let step = dialer.on_bytes(&secret(1), piece);
            prop_assert!(!matches!(step, Ok(DialerStep::Done(_) | DialerStep::Send(_))), "{:?}", step);
        }
    }
}

/// Both sides prove the secret: who listens on rank 0's port without it cannot take a rank in.
#[test]
fn a_rank_zero_without_the_secret_takes_nobody() {
    let (mut impostor, challenge) = Acceptor::new(Nonce([3; 32])).unwrap();
    let answer = |secret: &Secret| {
        let mut dialer = Dialer::new(Nonce([77; 32]), &presentation(1)).unwrap();
        match dialer.on_bytes(secret, &challenge).unwrap() {
            DialerStep::Send(answer) => (dialer, answer),
            other => panic!("{other:?}"),
        }
    };
    // It has seen the rank's nonce and claims, and signs its verdict over them by the secret that it has.
    let (mut rank, _) = answer(&secret(1));
    let (_, by_its_own_secret) = answer(&secret(2));
    impostor.on_bytes::<Presentation>(&secret(2), &by_its_own_secret).unwrap().unwrap();
    let verdict = impostor.verdict(&secret(2), &Ok(())).unwrap().unwrap();
    assert_eq!(rank.on_bytes(&secret(1), &verdict), Err(HandshakeError::Secret));
}

#[test]
fn another_protocol_version_is_reported_and_leaves_the_rank_missing() {
    let mut state = rank_zero();
    let mut answer = answer_of_rank_one(&mut state, 1, 1);
    assert!(answer.len() > HEADER_BYTES);
    answer[4..6].copy_from_slice(&(PROTOCOL_VERSION + 1).to_le_bytes());
    let effects = state.on_bytes(ConnId(1), &answer, Duration::ZERO);
    let expected = format!(
        "protocol version {} (ours: {PROTOCOL_VERSION}): run the same build of dist-cli on every machine",
        PROTOCOL_VERSION + 1
    );
    let report = Effect::Report(Event::Stranger { why: expected.clone() });
    assert_eq!(effects, [Effect::Close(ConnId(1)), report]);
    state.on_tick(DEADLINE);
    let error = state.outcome().unwrap().clone().unwrap_err();
    let turned_away = format!("; one connection was turned away: {expected}");
    assert_eq!(
        error.to_string(),
        "rendezvous failed after 30.0 s: missing ranks: 1".to_owned() + &turned_away
    );
}

#[test]
fn whoever_comes_after_the_end_is_closed_and_changes_nothing() {
    for is_late in [false, true] {
        let mut state = rank_zero();
        let answer = answer_of_rank_one(&mut state, 1, 1);
        if is_late {
            state.on_tick(DEADLINE);
        } else {
            state.on_bytes(ConnId(1), &answer, Duration::ZERO);
        }
        let outcome = state.outcome().unwrap().clone();
        assert_eq!(outcome.is_err(), is_late);
        let effects = state.on_connect(ConnId(2), Nonce([5; 32]), DEADLINE);
        assert_eq!(effects, [Effect::Close(ConnId(2))]);
        assert_eq!(state.on_bytes(ConnId(1), &answer, DEADLINE), []);
        assert_eq!(state.on_tick(2 * DEADLINE), []);
        assert_eq!(state.outcome(), Some(&outcome));
    }
}
