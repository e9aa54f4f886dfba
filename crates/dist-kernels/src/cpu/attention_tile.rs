//! One tile of attention: entries (row, head) that share a KV head, so that keys and values are read once for all.
//!
//! A score is one chain of multiply-adds along `d_head`; scores are summed in lanes by absolute position modulo eight;
//! an output element is one chain along increasing position. What an entry does not see is not touched.

use std::marker::PhantomData;

use dist_core::KvLayout;
use dist_core::shape::align_up;

use super::attention_values::{Values, load, prefetch};
use super::math::exp;
use super::simd::{Kernel, LANES, Simd, Stored};

/// Positions that are worked on together.
pub(super) const CHUNK: usize = 32;
/// Entries of a tile.
pub(super) const MAX_ENTRIES: usize = 36;
/// Positions of one entry between two requests for memory.
const FEW: usize = 4;
/// Entries that share the registers: 6 · 2 sums, two keys or values and one broadcast.
const STRIP: usize = 6;

/// Where the keys and values of one (sequence, head) are.
#[derive(Clone, Copy)]
pub(super) struct Pages<'a> {
    pub(super) layout: KvLayout,
    pub(super) head: usize,
    /// Block numbers of the sequence.
    pub(super) table: &'a [u32],
}

/// The positions `start .. end` that an entry sees.
#[derive(Clone, Copy, Default)]
struct Seen {
    start: usize,
    end: usize,
}

/// Memory of one thread, reused from tile to tile.
#[derive(Default)]
pub(super) struct TileScratch {
    seen: Vec<Seen>,
    /// What any entry sees.
    all: Seen,
    d_head: usize,
    /// Elements of one row of `scores`.
    span: usize,
    /// Strips of `[d_head][STRIP]`, then `[d_head]` for each entry of the rest.
    queries: Vec<f32>,
    /// `[d_head][CHUNK]`.
    keys: Vec<f32>,
    /// `[entries][span]`; column 0 is the position [`TileScratch::base`].
    scores: Vec<f32>,
    /// `[entries][d_head]`, rows padded to whole vectors.
    sums: Vec<f32>,
}

impl TileScratch {
    /// Takes memory for tiles that see at most `span` positions.
    pub(super) fn reserve(&mut self, d_head: usize, span: usize) {
        let grow = |memory: &mut Vec<f32>, len: usize| {
            if memory.len() < len {
                memory.resize(len, 0.0);
            }
        };
        (self.d_head, self.span) = (d_head, span);
        self.seen.reserve(MAX_ENTRIES);
        grow(&mut self.queries, MAX_ENTRIES * d_head);
        grow(&mut self.keys, d_head * CHUNK);
        grow(&mut self.scores, MAX_ENTRIES * span);
        grow(&mut self.sums, MAX_ENTRIES * align_up(d_head, LANES));
    }

    /// Starts a tile of `n` entries; `entry` tells first and last visible position and the query.
    pub(super) fn begin<'q>(
        &mut self,
        n: usize,
        scale: f32,
        entry: impl Fn(usize) -> (usize, usize, &'q [f32]),
    ) {
        assert!((1..=MAX_ENTRIES).contains(&n), "a tile of {n} entries");
        let d = self.d_head;
        self.seen.clear();
        for idx in 0..n {
            let (start, last, query) = entry(idx);
            let seen = Seen { start, end: last + 1 };
            let all = if idx == 0 { seen } else { self.all };
            self.all = Seen { start: all.start.min(start), end: all.end.max(seen.end) };
            self.seen.push(seen);
            let whole = idx < n - n % STRIP;
            let (first, stride) = if whole { (idx - idx % STRIP, STRIP) } else { (idx, 1) };
            let queries = &mut self.queries[first * d + (idx - first)..];
            for (to, &from) in queries.iter_mut().step_by(stride).zip(query) {
                *to = from * scale;
            }
        }
        self.sums[..n * align_up(d, LANES)].fill(0.0);
        assert!(self.all.end - self.base() <= self.span, "attention: the tile sees too much");
    }

    /// The output of an entry.
    pub(super) fn result(&self, entry: usize) -> &[f32] {
        &self.sums[entry * align_up(self.d_head, LANES)..][..self.d_head]
    }

    /// The first position of the first chunk.
    fn base(&self) -> usize {
        self.all.start / CHUNK * CHUNK
    }
}

/// The work on one tile, with a cache of elements `T`.
pub(super) struct Tile<'a, T> {
    k: &'a [u8],
    v: &'a [u8],
    pages: Pages<'a>,
    scratch: &'a mut TileScratch,
    dtype: PhantomData<T>,
}

impl<T: Stored> Kernel for Tile<'_, T> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (n, base, end) = (self.scratch.seen.len(), self.scratch.base(), self.scratch.all.end);
        let n_whole = n - n % STRIP;
        let mut next = self.locate(base);
        for chunk in (base..end).step_by(CHUNK) {
            let offsets = next;
            // What comes after the last keys are the first values.
            let (after, memory) = if chunk + CHUNK < end { (chunk + CHUNK, self.k) } else { (base, self.v) };
            next = self.locate(after);
            self.pack_keys(s, &offsets, memory, &next);
            for strip in (0..n_whole).step_by(STRIP) {
                if !self.sees(strip, STRIP, chunk) {
                    continue;
                }
                let at = strip * self.scratch.span + chunk - base;
                self.score::<S, STRIP, 2, 0>(s, strip, at);
                self.score::<S, STRIP, 2, 16>(s, strip, at);
            }
            for entry in n_whole..n {
                if !self.sees(entry, 1, chunk) {
                    continue;
                }
                let at = entry * self.scratch.span + chunk - base;
                self.score::<S, 1, 4, 0>(s, entry, at);
            }
        }
        let mut totals = [0.0; MAX_ENTRIES];
        for (entry, total) in totals.iter_mut().enumerate().take(n) {
            *total = self.soften(s, entry, base);
        }
        for chunk in (base..end).step_by(CHUNK) {
            let offsets = next;
            if chunk + CHUNK < end {
                next = self.locate(chunk + CHUNK);
            }
            for strip in (0..n_whole).step_by(STRIP) {
                self.weigh_strip(s, strip, chunk, base, &offsets);
            }
            // Requests for the next chunk are spread over the work on this one, which they would hold up in a row.
            for few in (0..CHUNK).step_by(FEW) {
                prefetch::<S, T>(s, self.v, &next[few..few + FEW], 0..self.scratch.d_head);
                for entry in n_whole..n {
                    let Seen { start, end } = self.scratch.seen[entry];
                    let positions = start.max(chunk + few)..end.min(chunk + few + FEW);
                    self.weigh::<S, 1>(s, entry, positions, base, &offsets);
                }
            }
        }
        let width = align_up(self.scratch.d_head, LANES);
        for (sums, &total) in self.scratch.sums.chunks_exact_mut(width).zip(&totals[..n]) {
            for sum in sums.as_chunks_mut::<LANES>().0 {
                *sum = s.to_array(s.div(s.lanes(*sum), s.splat(total)));
            }
        }
    }
}

impl<'a, T: Stored> Tile<'a, T> {
    pub(super) fn new(k: &'a [u8], v: &'a [u8], pages: Pages<'a>, scratch: &'a mut TileScratch) -> Self {
        assert_eq!(k.len(), v.len(), "attention: keys and values");
        Self { k, v, pages, scratch, dtype: PhantomData }
    }

    /// Whether any of `n` entries sees any position of the chunk.
    fn sees(&self, first: usize, n: usize, chunk: usize) -> bool {
        self.scratch.seen[first..first + n].iter().any(|seen| seen.start < chunk + CHUNK && seen.end > chunk)
    }

    /// First element of each position of the chunk. Positions that no entry sees stand in as their nearest neighbour:
    /// their blocks may have been given away.
    #[inline(always)]
    fn locate(&self, chunk: usize) -> [usize; CHUNK] {
        let KvLayout { block_size, d_head, .. } = self.pages.layout;
        let (all, n_elements) = (self.scratch.all, self.k.len() / T::BYTES);
        let (start, end) = (all.start.max(chunk), all.end.min(chunk + CHUNK));
        let mut offsets = [0; CHUNK];
        let mut position = start;
        while position < end {
            let (block, first) = (self.pages.table[position / block_size] as usize, position % block_size);
            let offset = self.pages.layout.at(block * block_size + first, self.pages.head);
            let n = (block_size - first).min(end - position);
            assert!(offset + n * d_head <= n_elements, "attention: block {block} is not in the cache");
            for idx in 0..n {
                offsets[position - chunk + idx] = offset + idx * d_head;
            }
            position += n;
        }
        let (first, last) = (offsets[start - chunk], offsets[end - chunk - 1]);
        offsets[..start - chunk].fill(first);
        offsets[end - chunk..].fill(last);
        offsets
    }

    /// Turns the keys of a chunk: lanes along positions. On the way it asks for what comes `next` in `ahead`.
    #[inline(always)]
    fn pack_keys<S: Simd>(&mut self, s: S, offsets: &[usize; CHUNK], ahead: &[u8], next: &[usize; CHUNK]) {
        let whole = self.scratch.d_head / LANES * LANES;
        let (keys, rest) = self.scratch.keys.split_at_mut(whole * CHUNK);
        for (group, offsets) in offsets.as_chunks::<LANES>().0.iter().enumerate() {
            let next = &next[group * LANES..][..LANES];
            for (idx, keys) in keys.as_chunks_mut::<{ LANES * CHUNK }>().0.iter_mut().enumerate() {
                let mut rows = [s.zero(); LANES];
                for (row, &offset) in rows.iter_mut().zip(offsets) {
                    // SAFETY: `locate` saw that the `d_head` elements from `offset` on are in the cache.
                    *row = unsafe { load::<S, T>(s, self.k, offset + idx * LANES, LANES) };
                }
                prefetch::<S, T>(s, ahead, next, idx * LANES..(idx + 1) * LANES);
                let columns = s.transpose(rows);
                for (idx, &column) in columns.iter().enumerate() {
                    s.store(column, &mut keys[idx * CHUNK + group * LANES..]);
                }
            }
            let n = self.scratch.d_head - whole;
            if n > 0 {
                let mut rows = [s.zero(); LANES];
                for (row, &offset) in rows.iter_mut().zip(offsets) {
                    // SAFETY: as above.
                    *row = unsafe { load::<S, T>(s, self.k, offset + whole, n) };
                }
                for (idx, &column) in s.transpose(rows).iter().take(n).enumerate() {
                    s.store(column, &mut rest[idx * CHUNK + group * LANES..]);
                }
            }
        }
    }

    /// Scores of `R` entries at the positions `FIRST .. FIRST + 8 · N` of the chunk; `at` is their place in `scores`.
    #[inline(always)]
    fn score<S: Simd, const R: usize, const N: usize, const FIRST: usize>(
        &mut self,
        s: S,
        entry: usize,
        at: usize,
    ) {
        let TileScratch { d_head, span, queries, keys, scores, .. } = &mut *self.scratch;
        let queries = queries[entry * *d_head..].as_chunks::<R>().0;
        let keys = keys[..*d_head * CHUNK].as_chunks::<CHUNK>().0;
        let mut sums = [[s.zero(); N]; R];
        for (query, keys) in queries.iter().zip(keys) {
            let mut key = [s.zero(); N];
            for (n, key) in key.iter_mut().enumerate() {
                *key = s.load(&keys[FIRST + n * LANES..]);
            }
            for (sums, &query) in sums.iter_mut().zip(query) {
                let query = s.splat(query);
                for (sum, &key) in sums.iter_mut().zip(&key) {
                    *sum = s.fma(query, key, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (n, &sum) in sums.iter().enumerate() {
                s.store(sum, &mut scores[at + r * *span + FIRST + n * LANES..]);
            }
        }
    }

    /// Replaces scores by `exp(score − greatest)` and returns their sum; zeros fill the vectors at both ends.
    #[inline(always)]
    fn soften<S: Simd>(&mut self, s: S, entry: usize, base: usize) -> f32 {
        let Seen { start, end } = self.scratch.seen[entry];
        let (start, end) = (start - base, end - base);
        let first = start / LANES * LANES;
        let scores = &mut self.scratch.scores[entry * self.scratch.span..][..align_up(end, LANES)];
        scores[first..start].fill(f32::NEG_INFINITY);
        scores[end..].fill(f32::NEG_INFINITY);
        let scores = scores[first..].as_chunks_mut::<LANES>().0;
        let mut greatest = s.splat(f32::NEG_INFINITY);
        for score in scores.iter() {
            greatest = s.max(greatest, s.lanes(*score));
        }
        let greatest = s.splat(s.max_lane(greatest));
        let mut sum = s.zero();
        for score in scores {
            let weight = exp(s, s.sub(s.lanes(*score), greatest));
            sum = s.add(sum, weight);
            *score = s.to_array(weight);
        }
        s.sum(sum)
    }

    /// Adds the values of a chunk to a strip: together where all entries see the position, else one by one.
    #[inline(always)]
    fn weigh_strip<S: Simd>(
        &mut self,
        s: S,
        strip: usize,
        chunk: usize,
        base: usize,
        offsets: &[usize; CHUNK],
    ) {
        let mut seen = [Seen { start: 0, end: 0 }; STRIP];
        for (to, from) in seen.iter_mut().zip(&self.scratch.seen[strip..]) {
            *to = Seen { start: from.start.max(chunk), end: from.end.min(chunk + CHUNK) };
        }
        let start = seen.iter().fold(chunk, |start, seen| start.max(seen.start));
        let end = seen.iter().fold(chunk + CHUNK, |end, seen| end.min(seen.end)).max(start);
        // Where nothing is common, the part before `start` is all of an entry's range or the two parts make it up.
        for (idx, seen) in seen.iter().enumerate() {
            self.weigh::<S, 1>(s, strip + idx, seen.start..seen.end.min(start), base, offsets);
        }
        self.weigh::<S, STRIP>(s, strip, start..end, base, offsets);
        for (idx, seen) in seen.iter().enumerate() {
            self.weigh::<S, 1>(s, strip + idx, seen.start.max(end)..seen.end, base, offsets);
        }
    }

    /// Adds the values at `positions`, all within one chunk, to `R` entries that see them.
    #[inline(always)]
    fn weigh<S: Simd, const R: usize>(
        &mut self,
        s: S,
        entry: usize,
        positions: std::ops::Range<usize>,
        base: usize,
        offsets: &[usize; CHUNK],
    ) {
        if positions.is_empty() {
            return;
        }
        let TileScratch { d_head, span, scores, sums, .. } = &mut *self.scratch;
        let width = align_up(*d_head, LANES);
        let offsets = &offsets[positions.start % CHUNK..][..positions.len()];
        let values = Values::<T, R> {
            v: self.v,
            offsets,
            weights: std::array::from_fn(|r| {
                &scores[(entry + r) * *span + positions.start - base..][..offsets.len()]
            }),
            width,
            dtype: PhantomData,
        };
        let sums = &mut sums[entry * width..][..R * width];
        let (mut column, whole) = (0, *d_head / LANES * LANES);
        if R == 1 {
            while whole - column >= 8 * LANES {
                values.add::<S, 8>(s, sums, column, LANES);
                column += 8 * LANES;
            }
            if whole - column >= 4 * LANES {
                values.add::<S, 4>(s, sums, column, LANES);
                column += 4 * LANES;
            }
        }
        while whole - column >= 2 * LANES {
            values.add::<S, 2>(s, sums, column, LANES);
            column += 2 * LANES;
        }
        while column < *d_head {
            values.add::<S, 1>(s, sums, column, LANES.min(*d_head - column));
            column += LANES;
        }
    }
}
