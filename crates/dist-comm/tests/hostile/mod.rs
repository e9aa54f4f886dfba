//! What must hold for any bytes that come in from a connection: whole frames or one lasting error, never more memory
//! than one frame, and a rendezvous that stays as it was. The fuzz target `frame` and the replay of its seeds share it.

// The file that shares it may be no test in the eyes of the compiler.
#![allow(clippy::expect_used, unreachable_pub)]

use std::time::Duration;

use dist_comm::auth::{Nonce, Secret};
use dist_comm::codec::{FrameDecoder, HEADER_BYTES, frame};
use dist_comm::rendezvous::{ConnId, Member, Presentation, Rendezvous, Setup};
use dist_core::Rank;

const LIMIT: usize = 512;

/// The first byte says how long the pieces are in which the others come.
pub fn check(bytes: &[u8]) {
    let Some((&cut, bytes)) = bytes.split_first() else { return };
    let pieces = || bytes.chunks(usize::from(cut).max(1));
    decode(pieces(), bytes);
    rendezvous(pieces());
}

fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>, bytes: &[u8]) {
    let mut decoder = FrameDecoder::new(LIMIT);
    let mut seen = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        while let Ok(Some(payload)) = decoder.next_frame() {
            seen.extend(frame(payload, LIMIT).expect("it was within the limit"));
        }
        assert!(decoder.n_waiting() < HEADER_BYTES + LIMIT);
    }
    assert!(bytes.starts_with(&seen), "frames are what came in");
}

fn rendezvous<'a>(pieces: impl Iterator<Item = &'a [u8]>) {
    let member = Member { addr: ([127, 0, 0, 1], 1).into(), host: "here".to_owned(), pid: 1 };
    let ours = Presentation {
        rank: Rank(0),
        world_size: 2,
        plan_hash: "a".to_owned(),
        checkpoint_hash: "a".to_owned(),
        generation: 1,
        member,
    };
    let setup = Setup {
        ours,
        secret: Secret::new(&[1; 32]).expect("long enough"),
        session: [0; 16],
        deadline: Duration::from_secs(9),
        handshake_deadline: Duration::from_secs(9),
        strangers_max: 2,
    };
    let mut state = Rendezvous::new(setup, Duration::ZERO);
    state.on_connect(ConnId(1), Nonce([3; 32]), Duration::ZERO);
    for piece in pieces {
        state.on_bytes(ConnId(1), piece, Duration::ZERO);
    }
    assert!(state.outcome().is_none() && state.connections().next().is_none(), "nobody proved the secret");
}
