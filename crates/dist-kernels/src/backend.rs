//! The one trait between the model and the hardware: about ten fused steps at the grain of a transformer's own
//! sentence, plus memory, graphs and peers. It knows no rank, no plan, no sequence.

use dist_core::DType;
use dist_core::raw::{PeerHandle, PeerWindow, RawBuf};

use crate::args::{
    AddBiasArgs, AddBiasNormArgs, AttentionArgs, EmbedArgs, GatherRowsArgs, LinearArgs, LogitsArgs, Product,
    SampleArgs, SampleRow,
};
use crate::error::Result;
use crate::weight::{Buffer, HostWeight, Weight};

/// A device that runs the steps of a decoder, each in order of the calls.
///
/// Every args struct has a `check` that each backend calls first: shapes that do not fit are our own bugs and panic.
/// No method but `alloc`, `prepare` and `capture` takes memory.
pub trait Backend: Sized {
    /// Memory of this backend.
    type Buf: Buffer;
    /// A captured sequence of steps.
    type Graph;
    /// What a [`fetch`](Self::fetch) brings.
    type Fetch: std::fmt::Debug;

    /// Steps of the engine that may be asked for before the one before them is done: more than none where asking and
    /// doing are two things.
    const STEPS_AHEAD: usize;

    /// Takes `len` elements, zeroed. `what` names the purpose in an out-of-memory error.
    fn alloc(&mut self, what: &str, dtype: DType, len: usize) -> Result<Self::Buf>;

    /// Takes a weight in, after slicing: views it, copies it or reorders it as the kernels like it best.
    fn prepare(&mut self, weight: HostWeight) -> Result<Weight<Self::Buf>>;

    /// Finds out how to make each of these products fastest for up to `rows_max` rows, where there is a choice. It may take
    /// memory, and gives it back.
    fn tune(&mut self, products: &[Product<'_, Self>], rows_max: usize) -> Result<()> {
        let _ = (products, rows_max);
        Ok(())
    }

    /// Copies `src`, elements of the buffer's type as bytes, to the elements from `at` on.
    fn upload(&mut self, dst: &mut Self::Buf, at: usize, src: &[u8]) -> Result<()>;

    /// Copies the elements from `at` on to `dst`, as bytes; waits for the steps before it.
    fn download(&mut self, src: &Self::Buf, at: usize, dst: &mut [u8]) -> Result<()>;

    /// Asks for the first elements of several buffers as they are after the steps before; steps that are asked for later
    /// do not touch what it brings.
    fn fetch(&mut self, pieces: &[(&Self::Buf, usize)]) -> Result<Self::Fetch>;

    /// Waits for a fetch: its pieces as bytes, one behind the other.
    fn finish(&mut self, fetch: Self::Fetch, dst: &mut [u8]) -> Result<()>;

    /// Waits until all steps are done.
    fn synchronize(&mut self) -> Result<()>;

    /// The memory of the first `len` elements for a collective.
    fn raw<'a>(&mut self, buf: &'a mut Self::Buf, len: usize) -> RawBuf<'a>;

    /// `out = tokens[ids] + positions[ids]`.
    fn embed(&mut self, args: EmbedArgs<'_, Self>) -> Result<()>;

    /// `out = epilogue(x · weightᵀ)`.
    fn linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()>;

    /// Causal attention of the step's rows over the paged KV cache.
    fn attention(&mut self, args: AttentionArgs<'_, Self>) -> Result<()>;

    /// `residual += delta + bias`, then `normed = norm(residual)`.
    fn add_bias_norm(&mut self, args: AddBiasNormArgs<'_, Self>) -> Result<()>;

    /// `x += bias`, row by row.
    fn add_bias(&mut self, args: AddBiasArgs<'_, Self>) -> Result<()>;

    /// `out[i] = x[indices[i]]`, row by row.
    fn gather_rows(&mut self, args: GatherRowsArgs<'_, Self>) -> Result<()>;

    /// `out = x · headᵀ`, always in `f32`.
    fn logits(&mut self, args: LogitsArgs<'_, Self>) -> Result<()>;

    /// Picks a token a row and its log-probability.
    fn sample(&mut self, args: SampleArgs<'_, Self>) -> Result<()>;

    /// Runs the steps of `run`, and records them; `None` where a backend has no graphs and `run` was not called.
    fn capture(&mut self, run: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<Self::Graph>>;

    /// Runs a recorded sequence again. Its `sample` draws as `rows` say; they are as many as when it was recorded.
    fn replay(&mut self, graph: &Self::Graph, rows: &[SampleRow]) -> Result<()>;

    /// A handle by which a peer can open `buf`.
    fn share(&mut self, buf: &Self::Buf) -> Result<PeerHandle>;

    /// Opens the peers' memory behind `handles`; `me` is our own place among them.
    fn open(&mut self, me: usize, handles: &[PeerHandle], bytes: usize) -> Result<PeerWindow>;
}
