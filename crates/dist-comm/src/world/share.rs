//! Ranks of one machine agree on memory to share. The lower rank of a pair makes a segment and says where it is; the
//! higher one opens it or declines, and then the pair stays on TCP.

use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use dist_core::Rank;
use dist_core::shape::div_ceil;
use serde::{Deserialize, Serialize};

use super::Ahead;
use super::mesh::Line;
use crate::auth::random_bytes;
use crate::codec::{FrameDecoder, HANDSHAKE_LIMIT, from_bytes, message_frame};
use crate::deadline::Deadline;
use crate::rendezvous::{Member, RendezvousError};
use crate::rendezvous_io::dial::{read_frame, write_within};
use crate::rendezvous_io::local_error;
use crate::shm::{RingShape, Segment};
use crate::tcp::link::{Link, TcpLink};
use crate::tcp::packet::PACKET_BYTES;

/// Slots of a ring at least: an all-reduce is never more than three packets ahead.
const SLOTS_MIN: usize = 6;

/// Where a segment is; `None` if it could not be made.
#[derive(Serialize, Deserialize)]
struct Offer {
    path: Option<PathBuf>,
    token: [u8; 16],
}

#[derive(Serialize, Deserialize)]
struct Taken(bool);

/// Turns connections into links, through shared memory where both ends can.
pub(super) fn share(
    members: &[Member],
    me: Rank,
    lines: Vec<Line>,
    ahead: Ahead,
    limit: Duration,
) -> Result<Vec<(Rank, Link)>, RendezvousError> {
    let ahead_bytes = match ahead {
        Ahead::Together(bytes) => bytes / lines.len().max(1),
        Ahead::Each(bytes) => bytes,
    };
    let n_slots = div_ceil(ahead_bytes, PACKET_BYTES).max(SLOTS_MIN);
    let shape = RingShape { n_slots, payload_bytes: PACKET_BYTES };
    let is_near = |rank: Rank| members[rank.0].host == members[me.0].host;
    let deadline = Deadline::after(limit);
    // All offers go out before any is answered, so that nobody waits in a circle.
    let mut pairs = Vec::new();
    for (rank, mut stream, decoder) in lines {
        let made = if is_near(rank) && me < rank { offer(&mut stream, shape, &deadline) } else { Ok(None) };
        let made = made.map_err(|error| local_error(&format!("shared memory with {rank}"), &error))?;
        pairs.push((rank, stream, decoder, made));
    }
    let mut links = Vec::new();
    let mut offered = Vec::new();
    for (rank, mut stream, mut decoder, made) in pairs {
        if is_near(rank) && rank < me {
            let opened = answer(&mut stream, &mut decoder, shape, &deadline)
                .map_err(|error| local_error(&format!("shared memory with {rank}"), &error))?;
            links.push((rank, link(stream, decoder, opened.map(|segment| (segment, false)))?));
        } else {
            offered.push((rank, stream, decoder, made));
        }
    }
    for (rank, mut stream, mut decoder, made) in offered {
        let mut segment = None;
        if is_near(rank) {
            let taken = read_frame(&mut stream, &mut decoder, &deadline)
                .and_then(|payload| from_bytes::<Taken>(&payload).map_err(std::io::Error::other))
                .map_err(|error| local_error(&format!("shared memory with {rank}"), &error))?;
            segment = made.filter(|_| taken.0);
        }
        links.push((rank, link(stream, decoder, segment.map(|segment| (segment, true)))?));
    }
    Ok(links)
}

fn offer(stream: &mut TcpStream, shape: RingShape, deadline: &Deadline) -> std::io::Result<Option<Segment>> {
    let token = random_bytes().map_err(std::io::Error::other)?;
    let segment = Segment::create(shape, token);
    if let Err(error) = &segment {
        tracing::warn!(%error, "no shared memory, using TCP");
    }
    let segment = segment.ok();
    let offer = Offer { path: segment.as_ref().map(Segment::path), token };
    let frame = message_frame(&offer, HANDSHAKE_LIMIT).map_err(std::io::Error::other)?;
    write_within(stream, &frame, deadline)?;
    Ok(segment)
}

fn answer(
    stream: &mut TcpStream,
    decoder: &mut FrameDecoder,
    shape: RingShape,
    deadline: &Deadline,
) -> std::io::Result<Option<Segment>> {
    let offer: Offer = from_bytes(&read_frame(stream, decoder, deadline)?).map_err(std::io::Error::other)?;
    let opened = offer.path.map(|path| Segment::open(&path, shape, offer.token));
    if let Some(Err(error)) = &opened {
        tracing::warn!(%error, "cannot open shared memory, using TCP");
    }
    let opened = opened.and_then(Result::ok);
    let frame = message_frame(&Taken(opened.is_some()), HANDSHAKE_LIMIT).map_err(std::io::Error::other)?;
    write_within(stream, &frame, deadline)?;
    Ok(opened)
}

fn link(
    stream: TcpStream,
    decoder: FrameDecoder,
    segment: Option<(Segment, bool)>,
) -> Result<Link, RendezvousError> {
    if let Some((segment, is_maker)) = segment {
        let (out, into) = segment.rings(is_maker);
        return Ok(Link::Shm { out, into, _stream: stream });
    }
    Ok(Link::Tcp(TcpLink::new(stream, decoder).map_err(|error| local_error("link", &error))?))
}
