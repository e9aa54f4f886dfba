//! Pinned memory through which the arrays of a step go to the GPU: two halves in turn, so that one is filled while the
//! other one is under way.

use super::driver::{Context, DeviceMemory, Event, PinnedMemory, Result, Stream};

/// Pieces begin at multiples of this, as fast copies like it.
const ALIGNMENT: usize = 64;

/// Two halves of pinned memory.
#[derive(Debug)]
pub(super) struct Inputs {
    halves: [Half; 2],
    current: usize,
    /// Bytes of the current half that are taken.
    used: usize,
}

#[derive(Debug)]
struct Half {
    memory: PinnedMemory,
    /// Set after the last copy out of it.
    sent: Event,
    is_pending: bool,
}

impl Inputs {
    /// Takes two halves of `n_bytes`.
    pub(super) fn new(context: &Context, n_bytes: usize) -> Result<Self> {
        let half = || -> Result<Half> {
            let memory = context.alloc_pinned("inputs of a step", n_bytes)?;
            Ok(Half { memory, sent: context.event()?, is_pending: false })
        };
        Ok(Self { halves: [half()?, half()?], current: 0, used: 0 })
    }

    /// Copies `src` to the bytes of `dst` from `at` on, after what was asked of the stream before. `src` is free at once.
    pub(super) fn upload(
        &mut self,
        stream: &Stream,
        dst: &DeviceMemory,
        at: usize,
        src: &[u8],
    ) -> Result<()> {
        let mut at = at;
        for piece in src.chunks(self.halves[0].memory.n_bytes()) {
            self.piece(stream, dst, at, piece)?;
            at += piece.len();
        }
        Ok(())
    }

    fn piece(&mut self, stream: &Stream, dst: &DeviceMemory, at: usize, src: &[u8]) -> Result<()> {
        if self.used + src.len() > self.halves[self.current].memory.n_bytes() {
            self.turn(stream)?;
        }
        let (half, from) = (&mut self.halves[self.current], self.used);
        half.memory.bytes_mut()[from..from + src.len()].copy_from_slice(src);
        stream.copy_in(dst, at, &half.memory, from, src.len())?;
        half.is_pending = true;
        self.used = (from + src.len()).next_multiple_of(ALIGNMENT);
        Ok(())
    }

    /// Goes on in the other half, as soon as its copies are done.
    fn turn(&mut self, stream: &Stream) -> Result<()> {
        stream.record(&self.halves[self.current].sent)?;
        self.current = 1 - self.current;
        self.used = 0;
        let half = &mut self.halves[self.current];
        if half.is_pending {
            half.sent.synchronize()?;
            half.is_pending = false;
        }
        Ok(())
    }
}
