//! Memory that two processes of one machine share: a segment behind an anonymous file, with a ring of packets in each
//! direction. All `unsafe` of shared memory is here; callers see slices.
//!
//! A ring has one producer and one consumer. `head` counts packets written, `tail` packets given back; a slot belongs
//! to the consumer from the moment that `head` passes it until `tail` does, and to the producer otherwise.

#![allow(unsafe_code)]

mod pace;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use pace::{Pace, Way};

/// Bytes before a packet's payload in its slot; the first four are the payload's length.
const SLOT_HEADER_BYTES: usize = 64;

/// Bytes that a caller may put beside a payload.
pub(crate) const LABEL_BYTES: usize = SLOT_HEADER_BYTES - 8;

/// Where a ring's `tail` lies: two cache lines behind `head`, so that neighbours are not fetched together.
const TAIL_AT: usize = 128;

/// Bytes of a ring before its slots.
const RING_HEADER_BYTES: usize = 4096;

/// Size of a ring; both sides have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingShape {
    /// Packets that may be ahead.
    pub(crate) n_slots: usize,
    /// Largest payload of a packet, a multiple of 64.
    pub(crate) payload_bytes: usize,
}

impl RingShape {
    const fn slot_bytes(self) -> usize {
        SLOT_HEADER_BYTES + self.payload_bytes
    }

    const fn ring_bytes(self) -> usize {
        (RING_HEADER_BYTES + self.n_slots * self.slot_bytes()).next_multiple_of(4096)
    }

    /// A page with the token, then both rings.
    const fn segment_bytes(self) -> usize {
        4096 + 2 * self.ring_bytes()
    }
}

/// One side's mapping of a segment.
#[derive(Debug)]
pub(crate) struct Segment {
    map: MmapRaw,
    shape: RingShape,
    /// Kept open so that the peer can find it.
    file: File,
}

impl Segment {
    /// Makes a segment; `token` names it and stands in its first bytes.
    pub(crate) fn create(shape: RingShape, token: [u8; 16]) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create(name(token), flags)?);
        file.set_len(shape.segment_bytes() as u64)?;
        // Neither side can cut the memory from under the other.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        let segment = Self::map(file, shape)?;
        // SAFETY: the mapping is at least a page long and nobody else has it yet.
        unsafe { std::ptr::copy_nonoverlapping(token.as_ptr(), segment.map.as_mut_ptr(), token.len()) };
        Ok(segment)
    }

    /// Where the peer finds the segment while this process holds it.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()))
    }

    /// Opens the segment that the peer made; anything else behind the path is an error and is not touched.
    pub(crate) fn open(path: &std::path::Path, shape: RingShape, token: [u8; 16]) -> io::Result<Self> {
        let foreign = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let target = std::fs::read_link(path)?;
        if !target.to_string_lossy().starts_with(&format!("/memfd:{}", name(token))) {
            return Err(foreign("the path is not the peer's segment"));
        }
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() != shape.segment_bytes() as u64 {
            return Err(foreign("the segment has another size"));
        }
        let segment = Self::map(file, shape)?;
        let mut found = [0; 16];
        // SAFETY: the mapping is at least a page long, and its first page is written by its maker before it is shared.
        unsafe { std::ptr::copy_nonoverlapping(segment.map.as_ptr(), found.as_mut_ptr(), found.len()) };
        if found != token {
            return Err(foreign("the segment has another token"));
        }
        Ok(segment)
    }

    /// With its pages in place, so that the first lap costs as much as any other.
    fn map(file: File, shape: RingShape) -> io::Result<Self> {
        let map = MmapOptions::new().len(shape.segment_bytes()).populate().map_raw(&file)?;
        Ok(Self { map, shape, file })
    }

    /// The ring to the peer and the ring from it; the maker writes the first one.
    pub(crate) fn rings(self, is_maker: bool) -> (Producer, Consumer) {
        let shape = self.shape;
        let segment = Arc::new(self);
        let ring = |idx: usize| Ring { segment: Arc::clone(&segment), at: 4096 + idx * shape.ring_bytes() };
        let (out, into) = if is_maker { (0, 1) } else { (1, 0) };
        let producer = Producer { ring: ring(out), head: 0, tail: 0, pace: Pace::default() };
        (producer, Consumer { ring: ring(into), head: 0, tail: 0 })
    }
}

fn name(token: [u8; 16]) -> String {
    format!("dist-comm-{:032x}", u128::from_le_bytes(token))
}

#[derive(Debug)]
struct Ring {
    segment: Arc<Segment>,
    /// Where it begins in the segment.
    at: usize,
}

impl Ring {
    fn head(&self) -> &AtomicU64 {
        self.counter(0)
    }

    fn tail(&self) -> &AtomicU64 {
        self.counter(TAIL_AT)
    }

    fn counter(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: rings begin at multiples of 4096 in a page-aligned mapping and `offset` is a multiple of 8, so the
        // counter is aligned; it lies in the ring's header, which both sides only touch through atomics, and the
        // mapping lives as long as the `Arc` behind `self`.
        unsafe { AtomicU64::from_ptr(self.segment.map.as_mut_ptr().add(self.at + offset).cast()) }
    }

    /// Where the slot of packet `idx` begins.
    fn slot(&self, idx: u64) -> *mut u8 {
        let shape = self.segment.shape;
        let slot = (idx % shape.n_slots as u64) as usize;
        let offset = self.at + RING_HEADER_BYTES + slot * shape.slot_bytes();
        // SAFETY: `slot < n_slots`, so the whole slot lies inside the ring and the mapping (see `segment_bytes`).
        unsafe { self.segment.map.as_mut_ptr().add(offset) }
    }
}

/// Payloads below this are written through the caches, where nothing is to be gained.
const PAST_BYTES_MIN: usize = 1 << 10;

/// Payloads below this are written past the caches: the slots hold so few bytes in all that the peer still has the lines
/// in its own cache since it read them last, and taking them back costs ten times as much as the copy itself.
const PACED_BYTES_MIN: usize = 24 << 10;

/// Copies `payload` to `to` without first fetching the lines that lie there.
///
/// # Safety
/// `to` is a multiple of 16, `payload.len()` bytes are writable there, and nobody else touches them until a release
/// store that follows.
#[cfg(target_arch = "x86_64")]
// The loads may be unaligned, and for the stores the caller vouches.
#[allow(clippy::cast_ptr_alignment)]
unsafe fn write_past_caches(to: *mut u8, payload: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    let whole = payload.len() / 16 * 16;
    // SAFETY: loads stay in `payload` and stores in the bytes that the caller vouches for, aligned because `to` is and
    // `at` counts by 16. The fence orders streaming stores before the caller's release store, which alone would not.
    unsafe {
        for at in (0..whole).step_by(16) {
            let bytes = _mm_loadu_si128(payload.as_ptr().add(at).cast::<__m128i>());
            _mm_stream_si128(to.add(at).cast::<__m128i>(), bytes);
        }
        _mm_sfence();
        std::ptr::copy_nonoverlapping(payload.as_ptr().add(whole), to.add(whole), payload.len() - whole);
    }
}

/// Copies `payload` to `to`.
///
/// # Safety
/// As on other processors.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn write_past_caches(to: *mut u8, payload: &[u8]) {
    // SAFETY: the caller vouches for the bytes.
    unsafe { std::ptr::copy_nonoverlapping(payload.as_ptr(), to, payload.len()) };
}

/// Copies `payload` to `to` by the way that suits its size and the place of the two cores.
///
/// # Safety
/// As [`write_past_caches`].
unsafe fn write(to: *mut u8, payload: &[u8], pace: &mut Pace) {
    let len = payload.len();
    let paced = (len >= PACED_BYTES_MIN).then(|| (pace.choose(), Instant::now()));
    let way = match paced {
        Some((way, _)) => way,
        None if len < PAST_BYTES_MIN => Way::Through,
        None => Way::Past,
    };
    // SAFETY: the caller vouches for the bytes.
    unsafe {
        match way {
            Way::Through => std::ptr::copy_nonoverlapping(payload.as_ptr(), to, len),
            Way::Past => write_past_caches(to, payload),
        }
    }
    if let Some((way, start)) = paced {
        pace.took(way, len, start.elapsed().as_nanos() as f32);
    }
}

/// The writing end of a ring.
#[derive(Debug)]
pub(crate) struct Producer {
    ring: Ring,
    head: u64,
    /// The peer's `tail` as last read.
    tail: u64,
    pace: Pace,
}

impl Producer {
    /// Writes a packet; `false` if the ring is full.
    pub(crate) fn try_push(&mut self, label: &[u8; LABEL_BYTES], payload: &[u8]) -> bool {
        let shape = self.ring.segment.shape;
        assert!(payload.len() <= shape.payload_bytes, "a packet of {} bytes", payload.len());
        if self.head.wrapping_sub(self.tail) >= shape.n_slots as u64 {
            self.tail = self.ring.tail().load(Ordering::Acquire);
            if self.head.wrapping_sub(self.tail) >= shape.n_slots as u64 {
                return false;
            }
        }
        let slot = self.ring.slot(self.head);
        let len = (payload.len() as u64).to_le_bytes();
        // SAFETY: `tail` has passed this slot (or it was never used), so it is ours until `head` passes it; the peer
        // keeps to that because it too is this code and has proved the secret. Length, label and payload fit in the
        // slot by the assertion above and the constants.
        unsafe {
            std::ptr::copy_nonoverlapping(len.as_ptr(), slot, len.len());
            std::ptr::copy_nonoverlapping(label.as_ptr(), slot.add(8), LABEL_BYTES);
            write(slot.add(SLOT_HEADER_BYTES), payload, &mut self.pace);
        }
        self.head = self.head.wrapping_add(1);
        self.ring.head().store(self.head, Ordering::Release);
        true
    }
}

/// The reading end of a ring.
#[derive(Debug)]
pub(crate) struct Consumer {
    ring: Ring,
    /// The peer's `head` as last read.
    head: u64,
    tail: u64,
}

impl Consumer {
    /// Whether a packet is there.
    pub(crate) fn is_ready(&mut self) -> bool {
        if self.head == self.tail {
            self.head = self.ring.head().load(Ordering::Acquire);
        }
        self.head != self.tail
    }

    /// The oldest packet, if [`is_ready`](Self::is_ready) has seen one: its label and its payload.
    pub(crate) fn peek(&self) -> Option<(&[u8], &[u8])> {
        if self.head == self.tail {
            return None;
        }
        let slot = self.ring.slot(self.tail);
        let mut len = [0; 8];
        // SAFETY: `head` has passed this slot, so it is ours until `tail` passes it, which takes `&mut self` in `pop`:
        // the slices cannot outlive that. The release store of `head` made its bytes visible. The length is bounded
        // here, so that even a broken peer cannot lead us outside the slot.
        unsafe {
            std::ptr::copy_nonoverlapping(slot, len.as_mut_ptr(), len.len());
            let len = usize::try_from(u64::from_le_bytes(len)).unwrap_or(usize::MAX);
            let len = len.min(self.ring.segment.shape.payload_bytes);
            let label = std::slice::from_raw_parts(slot.add(8), LABEL_BYTES);
            let payload = std::slice::from_raw_parts(slot.add(SLOT_HEADER_BYTES), len);
            Some((label, payload))
        }
    }

    /// Gives the oldest packet's slot back.
    pub(crate) fn pop(&mut self) {
        if self.head != self.tail {
            self.tail = self.tail.wrapping_add(1);
            self.ring.tail().store(self.tail, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: RingShape = RingShape { n_slots: 4, payload_bytes: 64 };

    #[test]
    fn packets_come_out_as_they_went_in_and_a_full_ring_refuses() {
        let maker = Segment::create(SHAPE, [7; 16]).unwrap();
        let peer = Segment::open(&maker.path(), SHAPE, [7; 16]).unwrap();
        let (mut out, _) = maker.rings(true);
        let (_, mut into) = peer.rings(false);
        for lap in 0..3_u8 {
            for packet in 0..4 {
                assert!(out.try_push(&[packet; LABEL_BYTES], &[lap; 64][..usize::from(packet) * 16]));
            }
            assert!(!out.try_push(&[9; LABEL_BYTES], &[]), "full");
            for packet in 0..4 {
                assert!(into.is_ready());
                let (label, payload) = into.peek().unwrap();
                assert_eq!((label[0], payload), (packet, &[lap; 64][..usize::from(packet) * 16]));
                into.pop();
            }
            assert!(!into.is_ready());
        }
    }

    #[test]
    fn a_foreign_path_or_token_is_refused() {
        let maker = Segment::create(SHAPE, [7; 16]).unwrap();
        assert!(Segment::open(&maker.path(), SHAPE, [8; 16]).is_err());
        let other = RingShape { n_slots: 400, ..SHAPE };
        assert!(Segment::open(&maker.path(), other, [7; 16]).is_err());
        assert!(Segment::open(std::path::Path::new("/proc/self/exe"), SHAPE, [7; 16]).is_err());
    }

    #[test]
    fn two_threads_pass_a_million_bytes_in_order() {
        let maker = Segment::create(SHAPE, [1; 16]).unwrap();
        let peer = Segment::open(&maker.path(), SHAPE, [1; 16]).unwrap();
        let (mut out, _) = maker.rings(true);
        let (_, mut into) = peer.rings(false);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for packet in 0..20_000_u32 {
                    while !out.try_push(&[0; LABEL_BYTES], &packet.to_le_bytes()) {
                        std::thread::yield_now();
                    }
                }
            });
            for packet in 0..20_000_u32 {
                while !into.is_ready() {
                    std::thread::yield_now();
                }
                assert_eq!(into.peek().unwrap().1, packet.to_le_bytes());
                into.pop();
            }
        });
    }
}
