//! What 16 bits cost by themselves: the CPU backend with every vector, weight and result rounded to bf16, sums in f32.
//! A GPU that computes in bf16 can hardly do better; its tests take their bounds from here.

use dist_core::DType;
use dist_core::raw::{PeerHandle, PeerWindow, RawBuf};
use dist_kernels::args::{
    AddBiasArgs, AddBiasNormArgs, AppendKv, AttentionArgs, EmbedArgs, Epilogue, GatherRowsArgs, LinearArgs,
    LogitsArgs, Lookup, Norm, Prologue, Ragged, SampleArgs, SampleRow, Then,
};
use dist_kernels::cpu::{CpuBackend, CpuBuf};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout, Weight};
use dist_kernels::{Backend, Result};
use half::bf16;

/// Rounds what comes out of a [`CpuBackend`].
pub(crate) struct Rounding(pub(crate) CpuBackend);

fn rounded(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn round(buf: &mut CpuBuf, len: usize) {
    buf.slice_mut::<f32>()[..len].iter_mut().for_each(|x| *x = rounded(*x));
}

fn norm<'a>(norm: &Norm<'a, Rounding>) -> Norm<'a, CpuBackend> {
    match *norm {
        Norm::None => Norm::None,
        Norm::Layer { weight, bias, eps } => Norm::Layer { weight, bias, eps },
        Norm::Rms { weight, eps } => Norm::Rms { weight, eps },
    }
}

fn lookup<'a>(lookup: &Lookup<'a, Rounding>) -> Lookup<'a, CpuBackend> {
    let Lookup { ids, table, offset, first } = *lookup;
    Lookup { ids, table, offset, first }
}

fn then(then: Then<'_, Rounding>) -> Then<'_, CpuBackend> {
    match then {
        Then::Store => Then::Store,
        Then::Activate(activation) => Then::Activate(activation),
        Then::AppendKv(AppendKv { kv, layout, slots }) => Then::AppendKv(AppendKv { kv, layout, slots }),
    }
}

/// The parts of a weight in f32, as bf16.
fn cast(part: &HostPart, layout: Layout, k: usize) -> HostPart {
    let (height, width) = if layout == Layout::Nk { (part.n, k) } else { (k, part.n) };
    let len = (height - 1) * part.ld + width;
    let stored = &part.bytes.as_slice()[part.offset..][..len * 4];
    let value = |bytes: &[u8; 4]| bf16::from_f32(f32::from_le_bytes(*bytes)).to_le_bytes();
    let bytes: Vec<u8> = stored.as_chunks::<4>().0.iter().flat_map(value).collect();
    HostPart { bytes: HostBytes::new(bytes), offset: 0, n: part.n, ld: part.ld }
}

impl Backend for Rounding {
    type Buf = CpuBuf;
    type Graph = std::convert::Infallible;
    type Fetch = Vec<u8>;

    const STEPS_AHEAD: usize = 0;

    fn alloc(&mut self, what: &str, dtype: DType, len: usize) -> Result<CpuBuf> {
        self.0.alloc(what, dtype, len)
    }

    fn prepare(&mut self, mut weight: HostWeight) -> Result<Weight<CpuBuf>> {
        if weight.dtype == DType::F32 {
            weight.parts = weight.parts.iter().map(|part| cast(part, weight.layout, weight.k)).collect();
            weight.dtype = DType::BF16;
        }
        self.0.prepare(weight)
    }

    /// Floats that are uploaded are vectors of the model.
    fn upload(&mut self, dst: &mut CpuBuf, at: usize, src: &[u8]) -> Result<()> {
        use dist_kernels::weight::Buffer;
        self.0.upload(dst, at, src)?;
        if dst.dtype() == DType::F32 {
            let len = dst.len();
            round(dst, len);
        }
        Ok(())
    }

    fn download(&mut self, src: &CpuBuf, at: usize, dst: &mut [u8]) -> Result<()> {
        self.0.download(src, at, dst)
    }

    fn fetch(&mut self, pieces: &[(&CpuBuf, usize)]) -> Result<Vec<u8>> {
        self.0.fetch(pieces)
    }

    fn finish(&mut self, fetch: Vec<u8>, dst: &mut [u8]) -> Result<()> {
        self.0.finish(fetch, dst)
    }

    fn synchronize(&mut self) -> Result<()> {
        self.0.synchronize()
    }

    fn raw<'a>(&mut self, buf: &'a mut CpuBuf, len: usize) -> RawBuf<'a> {
        self.0.raw(buf, len)
    }

    fn embed(&mut self, args: EmbedArgs<'_, Self>) -> Result<()> {
        let EmbedArgs { out, rows, d, tokens, positions, drawn } = args;
        let (tokens, positions) = (tokens.as_ref().map(lookup), positions.as_ref().map(lookup));
        self.0.embed(EmbedArgs { out: &mut *out, rows, d, tokens, positions, drawn })?;
        round(out, rows * d);
        Ok(())
    }

    fn linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()> {
        let LinearArgs { out, x, weight, rows, k_segments, prologue, epilogue } = args;
        let prologue = match prologue {
            Prologue::None => Prologue::None,
            Prologue::Norm(of) => Prologue::Norm(norm(&of)),
        };
        let epilogue = Epilogue { bias: epilogue.bias, then: then(epilogue.then) };
        self.0.linear(LinearArgs { out: &mut *out, x, weight, rows, k_segments, prologue, epilogue })?;
        round(out, rows * weight.n);
        Ok(())
    }

    fn attention(&mut self, args: AttentionArgs<'_, Self>) -> Result<()> {
        let AttentionArgs { out, qkv, kv, layout, n_heads_local, scale, window, seqs } = args;
        let Ragged { n_seqs, rows, max_rows, q_offsets, context_lens, block_tables, max_blocks } = seqs;
        let seqs = Ragged { n_seqs, rows, max_rows, q_offsets, context_lens, block_tables, max_blocks };
        self.0.attention(AttentionArgs {
            out: &mut *out,
            qkv,
            kv,
            layout,
            n_heads_local,
            scale,
            window,
            seqs,
        })?;
        round(out, rows * n_heads_local * layout.d_head);
        Ok(())
    }

    fn add_bias_norm(&mut self, args: AddBiasNormArgs<'_, Self>) -> Result<()> {
        let AddBiasNormArgs { normed, residual, delta, bias, norm: of, keep, rows, d } = args;
        self.0.add_bias_norm(AddBiasNormArgs {
            normed: &mut *normed,
            residual: &mut *residual,
            delta,
            bias,
            norm: norm(&of),
            keep,
            rows,
            d,
        })?;
        round(normed, rows * d);
        round(residual, rows * d);
        Ok(())
    }

    fn add_bias(&mut self, args: AddBiasArgs<'_, Self>) -> Result<()> {
        let AddBiasArgs { x, bias, rows, n } = args;
        self.0.add_bias(AddBiasArgs { x: &mut *x, bias, rows, n })?;
        round(x, rows * n);
        Ok(())
    }

    fn gather_rows(&mut self, args: GatherRowsArgs<'_, Self>) -> Result<()> {
        let GatherRowsArgs { out, x, indices, n_out, rows, d } = args;
        self.0.gather_rows(GatherRowsArgs { out, x, indices, n_out, rows, d })
    }

    fn logits(&mut self, args: LogitsArgs<'_, Self>) -> Result<()> {
        let LogitsArgs { out, x, head, rows } = args;
        self.0.logits(LogitsArgs { out, x, head, rows })
    }

    fn sample(&mut self, args: SampleArgs<'_, Self>) -> Result<()> {
        let SampleArgs { logits, n_vocab, ld, rows, ids, logprobs, n_top, top_ids, top_logprobs } = args;
        self.0.sample(SampleArgs { logits, n_vocab, ld, rows, ids, logprobs, n_top, top_ids, top_logprobs })
    }

    fn capture(&mut self, _run: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<Self::Graph>> {
        Ok(None)
    }

    fn replay(&mut self, graph: &Self::Graph, _rows: &[SampleRow]) -> Result<()> {
        match *graph {}
    }

    fn share(&mut self, buf: &CpuBuf) -> Result<PeerHandle> {
        self.0.share(buf)
    }

    fn open(&mut self, me: usize, handles: &[PeerHandle], bytes: usize) -> Result<PeerWindow> {
        self.0.open(me, handles, bytes)
    }
}
