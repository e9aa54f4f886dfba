//! A backend that computes nothing and writes down what it was asked: the sequence of steps and all memory taken.
//!
//! It shows without a device that a fusion was lost or that memory was taken inside a step.

use dist_core::raw::{PeerHandle, PeerWindow, RawBuf};
use dist_core::{Activation, DType};

use crate::args::{
    AddBiasArgs, AddBiasNormArgs, AttentionArgs, EmbedArgs, Epilogue, GatherRowsArgs, LinearArgs, LogitsArgs,
    Norm, Prologue, Residual, SampleArgs, SampleRow, Then,
};
use crate::backend::Backend;
use crate::error::{KernelError, Result};
use crate::weight::{Buffer, HostWeight, Weight, WeightPart};

/// Records steps as one word each, with what is fused into them behind `+`.
#[derive(Debug, Default)]
pub struct TraceBackend {
    steps: Vec<String>,
    n_allocs: usize,
    alloc_bytes: usize,
}

/// Memory that is only counted.
#[derive(Debug)]
pub struct TraceBuf {
    dtype: DType,
    len: usize,
    /// Backing for collectives, which want real bytes; grows to the largest that was asked for.
    bytes: Vec<u8>,
}

impl Buffer for TraceBuf {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl TraceBackend {
    /// The steps since the last call.
    pub fn take_steps(&mut self) -> Vec<String> {
        std::mem::take(&mut self.steps)
    }

    /// How often memory was taken, and how many bytes in all.
    pub fn allocations(&self) -> (usize, usize) {
        (self.n_allocs, self.alloc_bytes)
    }

    fn record(&mut self, step: impl Into<String>) {
        self.steps.push(step.into());
    }
}

fn norm_name<B: Backend>(norm: &Norm<'_, B>) -> &'static str {
    match norm {
        Norm::None => "",
        Norm::Layer { .. } => "layer_norm",
        Norm::Rms { .. } => "rms_norm",
    }
}

fn epilogue_name<B: Backend>(epilogue: &Epilogue<'_, B>) -> String {
    let bias = if epilogue.bias.is_some() { "+bias" } else { "" };
    let then = match epilogue.then {
        Then::Store => "",
        Then::Activate(Activation::GeluTanh) => "+gelu_tanh",
        Then::Activate(Activation::GeluErf) => "+gelu_erf",
        Then::Activate(Activation::Relu) => "+relu",
        Then::AppendKv(_) => "+append_kv",
    };
    format!("{bias}{then}")
}

impl Backend for TraceBackend {
    type Buf = TraceBuf;
    type Graph = ();
    type Fetch = ();

    const STEPS_AHEAD: usize = 0;

    fn alloc(&mut self, _what: &str, dtype: DType, len: usize) -> Result<TraceBuf> {
        self.n_allocs += 1;
        self.alloc_bytes += len * dtype.bytes();
        Ok(TraceBuf { dtype, len, bytes: Vec::new() })
    }

    fn prepare(&mut self, weight: HostWeight) -> Result<Weight<TraceBuf>> {
        weight.check()?;
        let (n, k, dtype, layout) = (weight.n(), weight.k, weight.dtype, weight.layout);
        let part = |n| WeightPart { data: TraceBuf { dtype, len: n * k, bytes: Vec::new() }, n, ld: k };
        let parts = weight.parts.iter().map(|host| part(host.n)).collect();
        Ok(Weight { parts, dtype, layout, n, k })
    }

    fn upload(&mut self, dst: &mut TraceBuf, at: usize, src: &[u8]) -> Result<()> {
        assert!(at + src.len() / dst.dtype.bytes() <= dst.len, "upload ends within the buffer");
        Ok(())
    }

    fn download(&mut self, src: &TraceBuf, at: usize, dst: &mut [u8]) -> Result<()> {
        assert!(at + dst.len() / src.dtype.bytes() <= src.len, "download ends within the buffer");
        dst.fill(0);
        Ok(())
    }

    fn fetch(&mut self, pieces: &[(&TraceBuf, usize)]) -> Result<()> {
        assert!(pieces.iter().all(|(buf, len)| *len <= buf.len), "a fetch ends within the buffer");
        Ok(())
    }

    fn finish(&mut self, _fetch: (), dst: &mut [u8]) -> Result<()> {
        dst.fill(0);
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn raw<'a>(&mut self, buf: &'a mut TraceBuf, len: usize) -> RawBuf<'a> {
        self.record("reduce");
        let n_bytes = len * buf.dtype.bytes();
        if buf.bytes.len() < n_bytes {
            buf.bytes.resize(n_bytes, 0);
        }
        RawBuf::Host { bytes: &mut buf.bytes[..n_bytes], dtype: buf.dtype }
    }

    fn embed(&mut self, args: EmbedArgs<'_, Self>) -> Result<()> {
        args.check();
        let tokens = if args.tokens.is_some() { "+tokens" } else { "" };
        let positions = if args.positions.is_some() { "+positions" } else { "" };
        self.record(format!("embed{tokens}{positions}"));
        Ok(())
    }

    fn linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()> {
        args.check();
        let prologue = match &args.prologue {
            Prologue::None => String::new(),
            Prologue::Norm(norm) => format!("{}+", norm_name(norm)),
        };
        self.record(format!("{prologue}linear{}", epilogue_name(&args.epilogue)));
        Ok(())
    }

    fn attention(&mut self, args: AttentionArgs<'_, Self>) -> Result<()> {
        args.check();
        self.record(if args.window.is_some() { "attention+window" } else { "attention" });
        Ok(())
    }

    fn add_bias_norm(&mut self, args: AddBiasNormArgs<'_, Self>) -> Result<()> {
        args.check();
        let delta = if args.delta.is_some() { "add_" } else { "" };
        let bias = if args.bias.is_some() { "bias_" } else { "" };
        let keep = if args.keep == Residual::Normed { "+keep_normed" } else { "" };
        self.record(format!("{delta}{bias}{}{keep}", norm_name(&args.norm)));
        Ok(())
    }

    fn add_bias(&mut self, args: AddBiasArgs<'_, Self>) -> Result<()> {
        args.check();
        self.record("add_bias");
        Ok(())
    }

    fn gather_rows(&mut self, args: GatherRowsArgs<'_, Self>) -> Result<()> {
        args.check();
        self.record("gather_rows");
        Ok(())
    }

    fn logits(&mut self, args: LogitsArgs<'_, Self>) -> Result<()> {
        args.check();
        self.record("logits");
        Ok(())
    }

    fn sample(&mut self, args: SampleArgs<'_, Self>) -> Result<()> {
        args.check();
        self.record("sample");
        Ok(())
    }

    fn capture(&mut self, _run: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<()>> {
        Ok(None)
    }

    fn replay(&mut self, _graph: &(), _rows: &[SampleRow]) -> Result<()> {
        Err(KernelError::Unsupported { backend: "trace", what: "replay a graph" })
    }

    fn share(&mut self, _buf: &TraceBuf) -> Result<PeerHandle> {
        Err(KernelError::Unsupported { backend: "trace", what: "share memory with peers" })
    }

    fn open(&mut self, _me: usize, _handles: &[PeerHandle], _bytes: usize) -> Result<PeerWindow> {
        Err(KernelError::Unsupported { backend: "trace", what: "open peers' memory" })
    }
}
