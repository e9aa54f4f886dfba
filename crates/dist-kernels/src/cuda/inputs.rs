//! Pinned memory through which the arrays of a step go to the GPU: two halves in turn, so that one is filled while the
//! other one is under way. Small arrays wait for each other and go with one launch, in which the GPU fetches them itself.

use super::args::{COPY_PIECES, CopyParams, CopyPiece};
use super::driver::{Context, DeviceMemory, Event, Launch, PinnedMemory, Result, Stream};
use super::loaded::Kernel;
use bytemuck::Zeroable;

/// Pieces begin at multiples of this, as fast copies like it.
const ALIGNMENT: usize = 64;
/// Arrays up to so many bytes go together.
const SMALL: usize = 64 << 10;
/// Threads of `copy_pieces`, and how many words one of them takes.
const THREADS: usize = 256;
const WORDS_A_THREAD: usize = 4;

/// Two halves of pinned memory.
#[derive(Debug)]
pub(super) struct Inputs {
    halves: [Half; 2],
    current: usize,
    /// Bytes of the current half that are taken.
    used: usize,
    /// Pieces of the current half that have not been asked for.
    waiting: Vec<CopyPiece>,
}

#[derive(Debug)]
struct Half {
    memory: PinnedMemory,
    /// Set after the last copy out of it.
    sent: Event,
    is_pending: bool,
}

/// What an upload needs beside its memory.
#[derive(Clone, Copy)]
pub(super) struct Way<'a> {
    pub(super) stream: &'a Stream,
    /// `copy_pieces`.
    pub(super) copy: &'a Kernel,
}

impl Inputs {
    /// Takes two halves of `n_bytes`.
    pub(super) fn new(context: &Context, n_bytes: usize) -> Result<Self> {
        let half = || -> Result<Half> {
            let memory = context.alloc_pinned("inputs of a step", n_bytes)?;
            Ok(Half { memory, sent: context.event()?, is_pending: false })
        };
        Ok(Self { halves: [half()?, half()?], current: 0, used: 0, waiting: Vec::with_capacity(COPY_PIECES) })
    }

    /// Copies `src` to the bytes of `dst` from `at` on, after what was asked of the stream before and, where it is small,
    /// with the next [`flush`](Self::flush). `src` is free at once.
    pub(super) fn upload(&mut self, way: Way<'_>, dst: &DeviceMemory, at: usize, src: &[u8]) -> Result<()> {
        let mut at = at;
        for piece in src.chunks(self.halves[0].memory.n_bytes()) {
            self.piece(way, dst, at, piece)?;
            at += piece.len();
        }
        Ok(())
    }

    fn piece(&mut self, way: Way<'_>, dst: &DeviceMemory, at: usize, src: &[u8]) -> Result<()> {
        if self.used + src.len() > self.halves[self.current].memory.n_bytes() {
            self.turn(way)?;
        }
        let from = self.used;
        self.used = (from + src.len()).next_multiple_of(ALIGNMENT);
        self.halves[self.current].memory.bytes_mut()[from..from + src.len()].copy_from_slice(src);
        let are_words = at.is_multiple_of(4) && src.len().is_multiple_of(4);
        if src.len() > SMALL || !are_words {
            self.flush(way)?;
            let half = &mut self.halves[self.current];
            half.is_pending = true;
            return way.stream.copy_in(dst, at, &half.memory, from, src.len());
        }
        assert!(at + src.len() <= dst.n_bytes(), "bytes {at}.. (+{}) of {}", src.len(), dst.n_bytes());
        let from = self.halves[self.current].memory.address() + from as u64;
        let piece = CopyPiece { from, to: dst.address() + at as u64, n_words: src.len() as u64 / 4 };
        self.waiting.push(piece);
        if self.waiting.len() == COPY_PIECES { self.flush(way) } else { Ok(()) }
    }

    /// Asks for what waits.
    pub(super) fn flush(&mut self, way: Way<'_>) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        copy_pieces(way, &self.waiting)?;
        self.waiting.clear();
        self.halves[self.current].is_pending = true;
        Ok(())
    }

    /// Goes on in the other half, as soon as its copies are done.
    fn turn(&mut self, way: Way<'_>) -> Result<()> {
        self.flush(way)?;
        way.stream.record(&self.halves[self.current].sent)?;
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

/// Copies words between the GPU's memory and pinned memory, up to [`COPY_PIECES`] pieces in one launch. What is asked for
/// next does not start before they are there.
pub(super) fn copy_pieces(way: Way<'_>, pieces: &[CopyPiece]) -> Result<()> {
    let most = pieces.iter().map(|piece| piece.n_words as usize).max().unwrap_or(0);
    let mut params = CopyParams::zeroed();
    params.pieces[..pieces.len()].copy_from_slice(pieces);
    let blocks = most.div_ceil(THREADS * WORDS_A_THREAD).max(1);
    let launch = Launch {
        overlaps: false,
        ..way.copy.function.over([blocks as u32, pieces.len() as u32, 1], THREADS as u32)
    };
    way.copy.function.launch(way.stream, &launch, &params, &[])
}
