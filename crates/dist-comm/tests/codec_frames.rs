//! Frames under hostile bytes: cut anywhere, of any length, of any kind.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

use dist_comm::codec::{
    FrameDecoder, FrameError, HEADER_BYTES, PROTOCOL_VERSION, frame, from_bytes, header, to_bytes,
};
use proptest::prelude::*;

const LIMIT: usize = 256;

/// All frames that come of a stream in pieces, then what ended it.
fn decode(pieces: &[&[u8]]) -> (Vec<Vec<u8>>, Option<FrameError>) {
    let mut decoder = FrameDecoder::new(LIMIT);
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(payload)) => frames.push(payload.to_vec()),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
        assert!(decoder.n_waiting() < HEADER_BYTES + LIMIT, "more than one unfinished frame is held");
    }
    (frames, None)
}

proptest! {
    #[test]
    fn frames_come_out_whole_however_they_are_cut(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..=LIMIT), 0..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let bytes: Vec<u8> = payloads.iter().flat_map(|payload| frame(payload, LIMIT).unwrap()).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
        prop_assert_eq!(decode(&pieces), (payloads, None));
    }

    #[test]
    fn any_bytes_end_in_frames_or_one_lasting_error(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut decoder = FrameDecoder::new(LIMIT);
        decoder.feed(&bytes);
        while let Ok(Some(_)) = decoder.next_frame() {}
        if let Err(error) = decoder.next_frame() {
            decoder.feed(&frame(b"a good one", LIMIT).unwrap());
            prop_assert_eq!(decoder.next_frame(), Err(error));
            prop_assert_eq!(decoder.n_waiting(), 0, "an error holds no memory");
        }
    }

    #[test]
    fn a_changed_header_is_never_a_frame_of_another_length(at in 0..HEADER_BYTES, to in any::<u8>()) {
        let mut bytes = frame(b"payload", LIMIT).unwrap();
        let was = std::mem::replace(&mut bytes[at], to);
        let (frames, error) = decode(&[&bytes]);
        if was == to {
            prop_assert_eq!((frames.len(), error), (1, None));
        } else if at < 8 {
            prop_assert!(frames.is_empty() && error.is_some());
        } else {
            // A shorter length leaves bytes that are no header; a longer one waits or is over the limit.
            prop_assert!(frames.is_empty() || frames[0].len() < 7 && error.is_some());
        }
    }

    #[test]
    fn any_bytes_as_a_message_cost_no_more_than_they_are(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = from_bytes::<(Vec<u64>, String, Option<Vec<Vec<u8>>>)>(&bytes);
    }
}

#[test]
fn a_huge_length_is_refused_at_the_header() {
    let (_, error) = decode(&[&header(u32::MAX as usize)]);
    assert_eq!(error, Some(FrameError::TooLong { len: u32::MAX as usize, limit: LIMIT }));
}

#[test]
fn foreign_bytes_are_refused_at_the_first_that_differs() {
    for bytes in [&b"GET / HTTP/1.1\r\n"[..], b"d", b"dGPX", b"\x16\x03\x01", b"dG\0"] {
        let (frames, error) = decode(&[bytes]);
        let is_ours_so_far = b"dGPT".starts_with(bytes);
        assert!(frames.is_empty());
        assert_eq!(error.is_none(), is_ours_so_far, "{bytes:?}");
    }
}

#[test]
fn another_version_is_named_with_ours() {
    let mut bytes = frame(b"", LIMIT).unwrap();
    bytes[4] += 1;
    let theirs = PROTOCOL_VERSION + 1;
    assert_eq!(decode(&[&bytes]).1, Some(FrameError::Version { ours: PROTOCOL_VERSION, theirs }));
}

#[test]
fn messages_are_exact() {
    let bytes = to_bytes(&(7_u64, "seven")).unwrap();
    assert_eq!(from_bytes::<(u64, String)>(&bytes), Ok((7, "seven".to_owned())));
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(from_bytes::<(u64, String)>(&longer), Err(FrameError::Malformed { .. })));
    assert!(from_bytes::<(u64, String)>(&bytes[..bytes.len() - 1]).is_err());
    // A vector that claims 2^60 elements.
    assert!(from_bytes::<Vec<u64>>(&[253, 0, 0, 0, 0, 0, 0, 0, 16]).is_err());
}

#[test]
fn a_payload_over_the_limit_is_not_framed() {
    assert_eq!(frame(&[0; LIMIT + 1], LIMIT), Err(FrameError::TooLong { len: LIMIT + 1, limit: LIMIT }));
}
