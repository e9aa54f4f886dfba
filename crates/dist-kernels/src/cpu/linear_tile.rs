//! The inner loops of `linear`: a few rows by a few outputs, lanes along `k`.

use std::marker::PhantomData;

use super::linear_order::{LEVELS, Segments};
use super::simd::{Kernel, LANES, Simd, Stored};

/// Steps between two looks at what lies ahead.
const UNROLL: usize = 4;
const LINE_BYTES: usize = 64;

/// Sums of at most sixteen pairs of row and output, row by row.
pub(super) type Sums<V> = [V; 2];

/// Where a tile reads: `R` rows of packed `x` and `N` outputs of weights. An address for each, not a first one and a
/// distance: the inner loop then has one instruction for each load and none that computes where from.
#[derive(Clone, Copy)]
pub(super) struct Operands<const R: usize, const N: usize> {
    x: [*const f32; R],
    w: [*const u8; N],
    /// Inputs.
    len: usize,
}

impl<const R: usize, const N: usize> Operands<R, N> {
    /// Row 0 of `x` and the elements from one row to the next, output 0 of the weights and the bytes from one output to
    /// the next, inputs.
    #[inline(always)]
    pub(super) fn new(x: (*const f32, usize), w: (*const u8, usize), len: usize) -> Self {
        Self {
            x: std::array::from_fn(|r| x.0.wrapping_add(r * x.1)),
            w: std::array::from_fn(|n| w.0.wrapping_add(n * w.1)),
            len,
        }
    }
}

/// Weights that will be needed next, asked for line by line while others are multiplied.
///
/// The order is that of memory, whatever the order of use: the processor's own prefetcher then recognises a stream and
/// runs ahead, which it does with more requests in flight than a core can make by itself.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    line: *const u8,
    /// Lines left of this stored row, and of every row.
    left: usize,
    row_lines: usize,
    /// Bytes from the end of a row's last line to the next row.
    skip: usize,
    /// Lines left in all.
    total: usize,
    /// Lines for every four steps of a tile.
    rate: usize,
}

impl Ahead {
    /// Lines that four steps of one output read.
    pub(super) const fn lines_per_group<E: Stored>() -> usize {
        UNROLL * LANES * E::BYTES / LINE_BYTES
    }

    /// Asks for `rows` stored rows of `row_bytes`, `stride` bytes apart, `rate` lines for every four steps.
    pub(super) fn new(w: *const u8, rows: usize, row_bytes: usize, stride: usize, rate: usize) -> Self {
        let row_lines = row_bytes.div_ceil(LINE_BYTES).max(1);
        let skip = stride.wrapping_sub(row_lines * LINE_BYTES);
        Self { line: w, left: row_lines, row_lines, skip, total: rows * row_lines, rate }
    }

    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        let n = self.rate.min(self.total);
        self.total -= n;
        for _ in 0..n {
            s.prefetch(self.line);
            self.line = self.line.wrapping_add(LINE_BYTES);
            self.left -= 1;
            if self.left == 0 {
                self.line = self.line.wrapping_add(self.skip);
                self.left = self.row_lines;
            }
        }
    }
}

/// Adds the products of all inputs to the lanes. With `WIDEN` the weights are also written to the `N` outputs of `tile`,
/// in `f32`.
///
/// # Safety
/// `len` elements are readable from every output of `w`, and `len` rounded up to eight from every row of `x`; as many
/// are writable in every output of `tile`, if `WIDEN`.
#[inline(always)]
pub(super) unsafe fn dot<S: Simd, E: Stored, const R: usize, const N: usize, const WIDEN: bool>(
    s: S,
    mut from: Operands<R, N>,
    mut acc: [[S::V; N]; R],
    mut tile: [*mut f32; N],
    ahead: &mut Ahead,
) -> [[S::V; N]; R] {
    let (steps, rest) = (from.len / LANES, from.len % LANES);
    for _ in 0..steps / UNROLL {
        ahead.step(s);
        if R == 1 && !WIDEN {
            // SAFETY: four steps are left.
            acc[0] = unsafe { dot_lines::<S, E, R, N>(s, &from, acc[0]) };
            from.x = from.x.map(|x| x.wrapping_add(UNROLL * LANES));
            from.w = from.w.map(|w| w.wrapping_add(UNROLL * LANES * E::BYTES));
            continue;
        }
        for step in 0..UNROLL {
            // SAFETY: four steps are left.
            acc = unsafe { dot_step::<S, E, R, N, WIDEN, false>(s, &from, step, acc, tile) };
        }
        from.x = from.x.map(|x| x.wrapping_add(UNROLL * LANES));
        from.w = from.w.map(|w| w.wrapping_add(UNROLL * LANES * E::BYTES));
        if WIDEN {
            tile = tile.map(|tile| tile.wrapping_add(UNROLL * LANES));
        }
    }
    for step in 0..steps % UNROLL {
        // SAFETY: as many steps are left.
        acc = unsafe { dot_step::<S, E, R, N, WIDEN, false>(s, &from, step, acc, tile) };
    }
    if rest > 0 {
        // SAFETY: `rest` elements are left of the weights, and a whole step of `x` and of the tile.
        acc = unsafe { dot_step::<S, E, R, N, WIDEN, true>(s, &from, steps % UNROLL, acc, tile) };
    }
    acc
}

/// Adds four steps to the lanes of the only row, output by output: a line of weights is used up before the next one is
/// touched. Outputs lie a power of two apart in most models, so that their lines share one set of the first cache.
///
/// # Safety
/// As [`dot`] for these steps.
#[inline(always)]
unsafe fn dot_lines<S: Simd, E: Stored, const R: usize, const N: usize>(
    s: S,
    from: &Operands<R, N>,
    mut acc: [S::V; N],
) -> [S::V; N] {
    // SAFETY: four steps of the row, by the caller's promise.
    let x: [S::V; UNROLL] = std::array::from_fn(|step| unsafe { s.load_ptr(from.x[0].add(step * LANES)) });
    for (acc, w) in acc.iter_mut().zip(from.w) {
        for (step, &x) in x.iter().enumerate() {
            // SAFETY: four steps of this output, by the caller's promise.
            *acc = s.fma(x, unsafe { E::load(s, w.add(step * LANES * E::BYTES)) }, *acc);
        }
    }
    acc
}

/// Adds the step that is `step` steps on to the lanes; the `LAST` one has `len % 8` inputs.
///
/// # Safety
/// As [`dot`] for this step.
#[inline(always)]
unsafe fn dot_step<
    S: Simd,
    E: Stored,
    const R: usize,
    const N: usize,
    const WIDEN: bool,
    const LAST: bool,
>(
    s: S,
    from: &Operands<R, N>,
    step: usize,
    mut acc: [[S::V; N]; R],
    tile: [*mut f32; N],
) -> [[S::V; N]; R] {
    let mut w = [s.zero(); N];
    for (n, w) in w.iter_mut().enumerate() {
        // SAFETY: this step of output `n`, by the caller's promise.
        unsafe {
            let p = from.w[n].add(step * LANES * E::BYTES);
            *w = if LAST { E::load_partial(s, p, from.len % LANES) } else { E::load(s, p) };
            if WIDEN {
                s.store_ptr(*w, tile[n].add(step * LANES));
            }
        }
    }
    for (acc, x) in acc.iter_mut().zip(from.x) {
        // SAFETY: this step of this row, by the caller's promise.
        let x = unsafe { s.load_ptr(x.add(step * LANES)) };
        for (acc, &w) in acc.iter_mut().zip(&w) {
            *acc = s.fma(x, w, *acc);
        }
    }
    acc
}

/// A chunk of a segment for `R` rows and several times `N` outputs, run as a function of its own: its inner loop needs
/// every register.
pub(super) struct Strip<'a, E, const R: usize, const N: usize, const WIDEN: bool> {
    from: Operands<R, N>,
    /// Bytes from one output to the next.
    w_stride: usize,
    /// First element and elements from one output to the next.
    widened: (*mut f32, usize),
    /// `[outputs / N][R][N][8]`.
    lanes: &'a mut [[f32; LANES]],
    part: Part,
    ahead: &'a mut Ahead,
    /// One for each `N` outputs.
    sums: &'a mut [[[f32; LANES]; 2]],
    stored: PhantomData<E>,
}

/// Which part of a segment a chunk is.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Lanes start from zero, not from where the chunk before left them.
    pub(super) is_first: bool,
    /// Lanes are added to sums, not left for the chunk behind.
    pub(super) is_last: bool,
}

impl<'a, E, const R: usize, const N: usize, const WIDEN: bool> Strip<'a, E, R, N, WIDEN> {
    /// A strip of `N · sums.len()` outputs.
    ///
    /// # Safety
    /// As [`dot`] for all these outputs, until the strip is run.
    #[inline(always)]
    pub(super) unsafe fn new(
        (from, w_stride): (Operands<R, N>, usize),
        widened: (*mut f32, usize),
        lanes: &'a mut [[f32; LANES]],
        (part, ahead): (Part, &'a mut Ahead),
        sums: &'a mut [[[f32; LANES]; 2]],
    ) -> Self {
        assert!(lanes.len() >= R * N * sums.len(), "lanes of a strip");
        Self { from, w_stride, widened, lanes, part, ahead, sums, stored: PhantomData }
    }
}

impl<E: Stored, const R: usize, const N: usize, const WIDEN: bool> Kernel for Strip<'_, E, R, N, WIDEN> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut from = self.from;
        let mut tile = std::array::from_fn(|n| self.widened.0.wrapping_add(n * self.widened.1));
        let mut ahead = *self.ahead;
        for (lanes, sums) in self.lanes.chunks_exact_mut(R * N).zip(self.sums) {
            let mut acc = [[s.zero(); N]; R];
            if !self.part.is_first {
                for r in 0..R {
                    for n in 0..N {
                        acc[r][n] = s.lanes(lanes[r * N + n]);
                    }
                }
            }
            // SAFETY: these outputs, by the promise made to `new`.
            let acc = unsafe { dot::<S, E, R, N, WIDEN>(s, from, acc, tile, &mut ahead) };
            if self.part.is_last {
                let [low, high] = sum_lanes(s, acc);
                *sums = [s.to_array(low), s.to_array(high)];
            } else {
                for r in 0..R {
                    for n in 0..N {
                        lanes[r * N + n] = s.to_array(acc[r][n]);
                    }
                }
            }
            from.w = from.w.map(|w| w.wrapping_add(N * self.w_stride));
            tile = tile.map(|tile| tile.wrapping_add(N * self.widened.1));
        }
        *self.ahead = ahead;
    }
}

/// Adds the lanes of each of the at most sixteen accumulators.
#[inline(always)]
pub(super) fn sum_lanes<S: Simd, const R: usize, const N: usize>(s: S, acc: [[S::V; N]; R]) -> Sums<S::V> {
    const { assert!(R * N <= 2 * LANES, "sums of a tile fill two vectors") };
    let mut flat = [[s.zero(); LANES]; 2];
    for r in 0..R {
        for n in 0..N {
            flat[(r * N + n) / LANES][(r * N + n) % LANES] = acc[r][n];
        }
    }
    let high = if R * N > LANES { s.sum_each(flat[1]) } else { s.zero() };
    [s.sum_each(flat[0]), high]
}

/// Partial sums of segments that wait for their other half.
#[derive(Clone, Copy)]
pub(super) struct Waiting<V> {
    sums: [V; LEVELS],
    depth: usize,
}

impl<V: Copy> Waiting<V> {
    /// Nothing waits.
    #[inline(always)]
    pub(super) fn new<S: Simd<V = V>>(s: S) -> Self {
        Self { sums: [s.zero(); LEVELS], depth: 0 }
    }

    /// Adds the next segment; after the last one the result is the whole sum.
    #[inline(always)]
    pub(super) fn push<S: Simd<V = V>>(&mut self, s: S, segments: Segments, idx: usize, mut sum: V) -> V {
        for _ in 0..segments.merges(idx) {
            self.depth -= 1;
            sum = s.add(self.sums[self.depth], sum);
        }
        self.sums[self.depth] = sum;
        self.depth += 1;
        sum
    }
}
