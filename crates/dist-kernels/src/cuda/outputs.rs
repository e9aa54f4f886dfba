//! What steps give, on its way to the host: pinned memory that the GPU writes by itself, one piece a fetch, and the event
//! that says it is there. Steps that are asked for meanwhile do not wait for the host to look.

use super::args::{COPY_PIECES, CopyPiece};
use super::buf::CudaBuf;
use super::driver::{Context, Event, PinnedMemory, Result};
use super::inputs::{Way, copy_pieces};
use crate::weight::Buffer;

/// A piece at least holds so much: the ids and log-probabilities of any decode step.
const SMALLEST: usize = 16 << 10;

/// Pieces of pinned memory, taken when a fetch finds none that is free and large enough.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    memory: PinnedMemory,
    written: Event,
    is_free: bool,
}

/// A fetch under way.
#[derive(Debug)]
pub struct CudaFetch {
    slot: usize,
    n_bytes: usize,
}

impl Outputs {
    /// Asks for the first elements of each buffer, which are whole words.
    pub(super) fn fetch(
        &mut self,
        context: &Context,
        way: Way<'_>,
        pieces: &[(&CudaBuf, usize)],
    ) -> Result<CudaFetch> {
        assert!(pieces.len() <= COPY_PIECES, "{} pieces", pieces.len());
        let bytes_of = |&(buf, len): &(&CudaBuf, usize)| len * buf.dtype().bytes();
        let n_bytes = pieces.iter().map(bytes_of).sum();
        let slot = self.free_slot(context, n_bytes)?;
        let Slot { memory, written, is_free } = &mut self.slots[slot];
        let (mut copies, mut to) = (Vec::with_capacity(pieces.len()), memory.address());
        for piece in pieces {
            let (buf, n_piece) = (piece.0, bytes_of(piece));
            assert!(n_piece.is_multiple_of(4) && n_piece <= buf.memory.n_bytes(), "{n_piece} bytes");
            if n_piece > 0 {
                copies.push(CopyPiece { from: buf.address(), to, n_words: n_piece as u64 / 4 });
                to += n_piece as u64;
            }
        }
        if !copies.is_empty() {
            copy_pieces(way, &copies)?;
        }
        way.stream.record(written)?;
        *is_free = false;
        Ok(CudaFetch { slot, n_bytes })
    }

    /// Waits for it.
    pub(super) fn finish(&mut self, fetch: &CudaFetch, dst: &mut [u8]) -> Result<()> {
        let slot = &mut self.slots[fetch.slot];
        slot.written.synchronize()?;
        slot.is_free = true;
        dst.copy_from_slice(&slot.memory.bytes()[..fetch.n_bytes]);
        Ok(())
    }

    fn free_slot(&mut self, context: &Context, n_bytes: usize) -> Result<usize> {
        let fits = |slot: &Slot| slot.is_free && slot.memory.n_bytes() >= n_bytes;
        if let Some(at) = self.slots.iter().position(fits) {
            return Ok(at);
        }
        let memory = context.alloc_pinned("outputs of a step", n_bytes.next_power_of_two().max(SMALLEST))?;
        let slot = Slot { memory, written: context.event()?, is_free: true };
        // One that is free was too small.
        let at = self.slots.iter().position(|slot| slot.is_free).unwrap_or(self.slots.len());
        if at < self.slots.len() {
            self.slots[at] = slot;
        } else {
            self.slots.push(slot);
        }
        Ok(at)
    }
}
