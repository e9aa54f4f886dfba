//! How the bytes of a call travel: the algorithms, each a straight line of pushes and pulls. Every rank runs the same
//! line, and never more than a few packets ahead of the slowest, so that rings of a few slots cannot lock up.

use std::time::Instant;

use dist_core::shape::{div_ceil, split_even};

use super::Tcp;
use super::link::Link;
use super::packet::{Label, PACKET_BYTES};
use crate::call::Call;
use crate::error::CommError;
use crate::tree;

impl Tcp {
    /// Everyone sends everything to everyone and adds for itself: one hop, for what fits in a packet.
    pub(super) fn reduce_one_shot(&mut self, call: &Call, bytes: &mut [u8]) -> Result<(), CommError> {
        let (label, others) = (Label::of(call), self.others());
        for &peer in &others {
            self.push(call, peer, label, bytes)?;
        }
        self.add_fronts(call, label, bytes)?;
        self.end(call)
    }

    /// Each rank adds one part of each segment and hands it round: reduce-scatter and all-gather in one. The parts of
    /// the next segment are already on their way while those of the last one are added, and each piece is copied,
    /// added and copied again while it is still in the cache.
    pub(super) fn reduce_direct(&mut self, call: &Call, bytes: &mut [u8]) -> Result<(), CommError> {
        let (n, others) = (self.world_size(), self.others());
        let segment_bytes = n * PACKET_BYTES;
        let n_segments = div_ceil(bytes.len(), segment_bytes);
        // Where part `idx` of segment `k` lies, in whole `f32`.
        let total = bytes.len();
        let part = |k: usize, idx: usize| {
            let start = k * segment_bytes;
            let len = segment_bytes.min(total - start);
            let (at, count) = split_even(len / 4, n, idx);
            start + 4 * at..start + 4 * (at + count)
        };
        let first = Label::of(call);
        let label = |piece: usize| first.at(piece);
        for k in 0..n_segments + 2 {
            if k < n_segments {
                for &peer in &others {
                    self.push(call, peer, label(2 * k), &bytes[part(k, peer)])?;
                }
            }
            if (1..=n_segments).contains(&k) {
                let mine = part(k - 1, self.me);
                self.add_fronts(call, label(2 * (k - 1)), &mut bytes[mine.clone()])?;
                for &peer in &others {
                    self.push(call, peer, label(2 * (k - 1) + 1), &bytes[mine.clone()])?;
                }
            }
            if k >= 2 {
                for &peer in &others {
                    let theirs = part(k - 2, peer);
                    self.pull(call, peer, label(2 * (k - 2) + 1), &mut bytes[theirs])?;
                }
            }
        }
        self.end(call)
    }

    /// The end of a call in which all members were heard.
    fn end(&mut self, call: &Call) -> Result<(), CommError> {
        self.met = Some((*call, Instant::now()));
        self.flush_all(call)
    }

    /// Waits for one packet from every peer and replaces `own` by the sum of all in rank order.
    fn add_fronts(&mut self, call: &Call, label: Label, own: &mut [u8]) -> Result<(), CommError> {
        for peer in self.others() {
            self.arrive(call, peer, label, own.len())?;
        }
        let fronts = self.links.iter().map(|link| {
            let front = link.as_ref().and_then(Link::front);
            front.map_or(&[][..], |(_, payload)| payload)
        });
        tree::sum_in_place(own, self.me, &fronts.collect::<Vec<_>>(), &mut self.scratch);
        for link in self.links.iter_mut().flatten() {
            link.pop();
        }
        Ok(())
    }

    /// Everyone's `src` to everyone, in rank order; an empty one is a barrier.
    pub(super) fn gather(&mut self, call: &Call, src: &[u8], dst: &mut [u8]) -> Result<(), CommError> {
        let (first, others) = (Label::of(call), self.others());
        let len = src.len();
        dst[self.me * len..][..len].copy_from_slice(src);
        let n_pieces = div_ceil(len, PACKET_BYTES).max(1);
        let piece_of = |piece: usize| piece * PACKET_BYTES..len.min((piece + 1) * PACKET_BYTES);
        for piece in 0..=n_pieces {
            if piece < n_pieces {
                for &peer in &others {
                    self.push(call, peer, first.at(piece), &src[piece_of(piece)])?;
                }
            }
            if piece > 0 {
                for &peer in &others {
                    let range = piece_of(piece - 1);
                    let theirs = &mut dst[peer * len..][..len][range];
                    self.pull(call, peer, first.at(piece - 1), theirs)?;
                }
            }
        }
        self.end(call)
    }

    /// `bytes` to some peers.
    pub(super) fn give(&mut self, call: &Call, peers: &[usize], bytes: &[u8]) -> Result<(), CommError> {
        let first = Label::of(call);
        for (piece, bytes) in pieces(bytes.len()).map(|range| &bytes[range]).enumerate() {
            for &peer in peers {
                self.push(call, peer, first.at(piece), bytes)?;
            }
        }
        self.flush_all(call)
    }

    /// `bytes` from one peer.
    pub(super) fn take(&mut self, call: &Call, peer: usize, bytes: &mut [u8]) -> Result<(), CommError> {
        let first = Label::of(call);
        for (piece, range) in pieces(bytes.len()).enumerate() {
            self.pull(call, peer, first.at(piece), &mut bytes[range])?;
        }
        Ok(())
    }

    /// Waits for a packet and copies it out.
    fn pull(&mut self, call: &Call, peer: usize, label: Label, bytes: &mut [u8]) -> Result<(), CommError> {
        self.arrive(call, peer, label, bytes.len())?;
        if let Some(link) = &mut self.links[peer] {
            if let Some((_, payload)) = link.front() {
                bytes.copy_from_slice(payload);
            }
            link.pop();
        }
        Ok(())
    }
}

/// The packets of a buffer; an empty one still has one, so that the other side knows that we came.
fn pieces(len: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..div_ceil(len, PACKET_BYTES).max(1)).map(move |piece| {
        let start = piece * PACKET_BYTES;
        start..len.min(start + PACKET_BYTES)
    })
}
