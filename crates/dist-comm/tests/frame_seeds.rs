//! The seeds of the fuzz target `frame`, and what was ever found by it, stay without a finding.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

mod hostile;

use std::path::PathBuf;

/// The seeds, in the folder that `DIST_REPO` names or in one upwards from the current one.
fn folder() -> PathBuf {
    let from = std::env::var_os("DIST_REPO").map_or_else(|| std::env::current_dir().unwrap(), PathBuf::from);
    let folders = from.ancestors().map(|folder| folder.join("fuzz/seeds/frame"));
    folders.into_iter().find(|folder| folder.is_dir()).expect("fuzz/seeds/frame")
}

#[test]
fn seeds_of_the_fuzz_target_hold() {
    let folder = folder();
    let seeds: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(seeds.len() >= 6, "{seeds:?}");
    for seed in seeds {
        let bytes = std::fs::read(&seed).unwrap();
        // As they are cut by their first byte, then byte by byte and all at once.
        for cut in [bytes[0], 1, u8::MAX] {
            hostile::check(&[&[cut], &bytes[1..]].concat());
        }
    }
}

/// A check that cannot fail would be no check: the same bytes with the right secret are a rank.
#[test]
#[should_panic(expected = "nobody proved the secret")]
fn a_proof_of_the_right_secret_would_be_a_finding() {
    use dist_comm::auth::{Nonce, Secret};
    use dist_comm::rendezvous::handshake::{Acceptor, Dialer, DialerStep};
    use dist_comm::rendezvous::{Member, Presentation};
    use dist_core::Rank;

    let member = Member { addr: ([127, 0, 0, 1], 2).into(), host: "here".to_owned(), pid: 2 };
    let (plan_hash, checkpoint_hash) = ("a".to_owned(), "a".to_owned());
    let claims =
        Presentation { rank: Rank(1), world_size: 2, plan_hash, checkpoint_hash, generation: 1, member };
    let (_, challenge) = Acceptor::new(Nonce([3; 32])).unwrap();
    let mut dialer = Dialer::new(Nonce([4; 32]), &claims).unwrap();
    let answer = dialer.on_bytes(&Secret::new(&[1; 32]).unwrap(), &challenge).unwrap();
    let DialerStep::Send(answer) = answer else { panic!("no answer") };
    hostile::check(&[&[50], &answer[..]].concat());
}
