//! The CPU behind the [`Backend`] trait: options, memory, and each step handed to its kernel.

use std::sync::Mutex;
use std::time::Duration;

use dist_core::DType;
use dist_core::raw::{PeerHandle, PeerWindow, RawBuf};

use super::attention::{AttentionScratch, attention};
use super::buf::CpuBuf;
use super::embed::embed;
use super::gather::gather_rows;
use super::linear::{
    Finish, Product, Runner, SCRATCH_FLOATS, ThreadScratch, linear, pack, packed_len, sums_len,
};
use super::linear_finish::append_kv;
use super::linear_order::Segments;
use super::norm::{Floats, add_bias, add_bias_norm, norm_rows};
use super::pool::{Disjoint, Pool};
use super::sample::{SampleScratch, sample};
use super::simd::{CpuKernels, CpuPath};
use crate::args::{
    AddBiasArgs, AddBiasNormArgs, AttentionArgs, EmbedArgs, Epilogue, GatherRowsArgs, K_SEGMENTS, LinearArgs,
    LogitsArgs, Norm, Prologue, SampleArgs, SampleRow, Then,
};
use crate::backend::Backend;
use crate::error::{KernelError, Result};
use crate::weight::{Buffer, HostWeight, Layout, Weight, WeightPart};

const NAME: &str = "cpu";

/// How a [`CpuBackend`] shall run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that work, the caller included; zero counts as one.
    pub threads: usize,
    /// Which instructions.
    pub path: CpuPath,
    /// How long idle threads spin before they sleep. Long enough to reach the next step of a layer, short enough not
    /// to take a core from another rank: some tens of microseconds.
    pub spin: Duration,
}

/// How a [`CpuBackend`] runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuDescription {
    /// The instructions it uses: `avx2` or `portable`.
    pub path: &'static str,
    /// Threads that work, the caller included.
    pub threads: usize,
}

/// The backend that needs nothing but this machine's processor.
pub struct CpuBackend {
    kernels: CpuKernels,
    pool: Pool,
    /// Packed `x`, grown to the largest product that was asked for.
    packed: CpuBuf,
    /// The output of a norm on its way into `linear`, grown alike.
    normed: CpuBuf,
    tiles: Vec<ThreadScratch>,
    attention: AttentionScratch,
    sample: SampleScratch,
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.describe().fmt(f)
    }
}

impl CpuBackend {
    /// Starts the threads and takes their memory; an error if the machine lacks the instructions asked for.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let kernels = CpuKernels::new(options.path)?;
        let threads = options.threads.max(1);
        Ok(Self {
            kernels,
            pool: Pool::new(threads, options.spin)?,
            packed: CpuBuf::zeroed("packed rows", DType::F32, 0)?,
            normed: CpuBuf::zeroed("normed rows", DType::F32, 0)?,
            tiles: (0..threads).map(|_| Mutex::new(vec![0.0; SCRATCH_FLOATS])).collect(),
            attention: AttentionScratch::new(threads),
            sample: SampleScratch::new(threads),
        })
    }

    /// How it runs: tests and reports name it.
    pub fn describe(&self) -> CpuDescription {
        CpuDescription { path: self.kernels.name(), threads: self.pool.n_threads() }
    }

    /// What kernels run on.
    pub(super) fn cores(&self) -> (CpuKernels, &Pool) {
        (self.kernels, &self.pool)
    }

    /// Packs `x` and multiplies.
    fn multiply(&mut self, job: Multiply<'_>) -> Result<()> {
        let Multiply { out, x, weight, rows, k_segments, finish } = job;
        let segments = Segments { k: weight.k, count: k_segments };
        let (len, sums) = (packed_len(rows, segments), sums_len(weight, rows, segments));
        grow(&mut self.packed, "packed rows", len + sums)?;
        let (packed, sums) = self.packed.f32s_mut()[..len + sums].split_at_mut(len);
        let x = match x {
            Input::Given(x) => x,
            Input::Normed => self.normed.f32s(),
        };
        pack(&self.pool, &x[..rows * weight.k], rows, segments, packed);
        let out = Disjoint::new(&mut out[..rows * weight.n]);
        let runner = Runner { kernels: self.kernels, pool: &self.pool, scratch: &self.tiles };
        linear(
            runner,
            &Product { x: packed, out, sums: Disjoint::new(sums), weight, rows, segments, finish },
        );
        Ok(())
    }

    /// Normalises the rows of `x` into our own memory.
    fn norm(&mut self, x: &[f32], norm: &Norm<'_, Self>, d: usize) -> Result<()> {
        grow(&mut self.normed, "normed rows", x.len())?;
        let out = &mut self.normed.f32s_mut()[..x.len()];
        norm_rows(self.kernels, &self.pool, out, x, norm, d);
        Ok(())
    }
}

/// What a product multiplies.
enum Input<'a> {
    /// Rows of the caller.
    Given(&'a [f32]),
    /// Rows that [`CpuBackend::norm`] wrote.
    Normed,
}

struct Multiply<'a> {
    out: &'a mut [f32],
    x: Input<'a>,
    weight: &'a Weight<CpuBuf>,
    rows: usize,
    k_segments: usize,
    finish: Finish<'a>,
}

/// Makes `buf` hold at least `len` elements; what it held is lost.
fn grow(buf: &mut CpuBuf, what: &str, len: usize) -> Result<()> {
    if buf.len() < len {
        *buf = CpuBuf::zeroed(what, buf.dtype(), len)?;
    }
    Ok(())
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(KernelError::Unsupported { backend: NAME, what })
}

impl Backend for CpuBackend {
    type Buf = CpuBuf;
    /// There are none.
    type Graph = std::convert::Infallible;
    /// It is there at once.
    type Fetch = Vec<u8>;

    const STEPS_AHEAD: usize = 0;

    fn alloc(&mut self, what: &str, dtype: DType, len: usize) -> Result<CpuBuf> {
        CpuBuf::zeroed(what, dtype, len)
    }

    fn prepare(&mut self, weight: HostWeight) -> Result<Weight<CpuBuf>> {
        if !weight.dtype.is_float() {
            return Err(KernelError::WeightType { backend: NAME, dtype: weight.dtype });
        }
        weight.check()?;
        let (dtype, layout, k, n) = (weight.dtype, weight.layout, weight.k, weight.n());
        let view = |part: crate::weight::HostPart| {
            let (height, width) = match layout {
                Layout::Nk => (part.n, k),
                Layout::Kn => (k, part.n),
            };
            let len = height.checked_sub(1).map_or(0, |last| last * part.ld + width);
            let data = CpuBuf::view(part.bytes, part.offset, dtype, len)?;
            Ok(WeightPart { data, n: part.n, ld: part.ld })
        };
        let parts = weight.parts.into_iter().map(view).collect::<Result<_>>()?;
        Ok(Weight { parts, dtype, layout, n, k })
    }

    fn upload(&mut self, dst: &mut CpuBuf, at: usize, src: &[u8]) -> Result<()> {
        let start = at * dst.dtype().bytes();
        dst.bytes_mut()[start..start + src.len()].copy_from_slice(src);
        Ok(())
    }

    fn download(&mut self, src: &CpuBuf, at: usize, dst: &mut [u8]) -> Result<()> {
        let start = at * src.dtype().bytes();
        dst.copy_from_slice(&src.bytes()[start..start + dst.len()]);
        Ok(())
    }

    fn fetch(&mut self, pieces: &[(&CpuBuf, usize)]) -> Result<Vec<u8>> {
        let bytes = |&(buf, len): &(&CpuBuf, usize)| buf.bytes()[..len * buf.dtype().bytes()].to_vec();
        Ok(pieces.iter().flat_map(bytes).collect())
    }

    fn finish(&mut self, fetch: Vec<u8>, dst: &mut [u8]) -> Result<()> {
        dst.copy_from_slice(&fetch);
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn raw<'a>(&mut self, buf: &'a mut CpuBuf, len: usize) -> RawBuf<'a> {
        let dtype = buf.dtype();
        RawBuf::Host { bytes: &mut buf.bytes_mut()[..len * dtype.bytes()], dtype }
    }

    fn embed(&mut self, args: EmbedArgs<'_, Self>) -> Result<()> {
        args.check();
        embed(self.kernels, &self.pool, args);
        Ok(())
    }

    fn linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()> {
        args.check();
        let LinearArgs { out, x, weight, rows, k_segments, prologue, epilogue } = args;
        let Epilogue { bias, then } = epilogue;
        let x = &x.f32s()[..rows * weight.k];
        let x = match &prologue {
            Prologue::None => Input::Given(x),
            Prologue::Norm(norm) => {
                self.norm(x, norm, weight.k)?;
                Input::Normed
            }
        };
        let activation = if let Then::Activate(activation) = then { Some(activation) } else { None };
        let finish = Finish { bias: bias.map(Floats::new), activation };
        let out = &mut out.f32s_mut()[..rows * weight.n];
        self.multiply(Multiply { out, x, weight, rows, k_segments, finish })?;
        if let Then::AppendKv(append) = then {
            append_kv(&self.pool, out, weight.n, append);
        }
        Ok(())
    }

    fn attention(&mut self, args: AttentionArgs<'_, Self>) -> Result<()> {
        args.check();
        attention(self.kernels, &self.pool, &mut self.attention, args);
        Ok(())
    }

    fn add_bias_norm(&mut self, args: AddBiasNormArgs<'_, Self>) -> Result<()> {
        args.check();
        add_bias_norm(self.kernels, &self.pool, args);
        Ok(())
    }

    fn add_bias(&mut self, args: AddBiasArgs<'_, Self>) -> Result<()> {
        args.check();
        add_bias(self.kernels, &self.pool, args);
        Ok(())
    }

    fn gather_rows(&mut self, args: GatherRowsArgs<'_, Self>) -> Result<()> {
        args.check();
        gather_rows(&self.pool, args);
        Ok(())
    }

    fn logits(&mut self, args: LogitsArgs<'_, Self>) -> Result<()> {
        args.check();
        let LogitsArgs { out, x, head, rows } = args;
        self.multiply(Multiply {
            out: out.f32s_mut(),
            x: Input::Given(x.f32s()),
            weight: head,
            rows,
            k_segments: K_SEGMENTS,
            finish: Finish { bias: None, activation: None },
        })
    }

    fn sample(&mut self, args: SampleArgs<'_, Self>) -> Result<()> {
        args.check();
        sample(self.kernels, &self.pool, &mut self.sample, args);
        Ok(())
    }

    fn capture(&mut self, _run: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<Self::Graph>> {
        Ok(None)
    }

    fn replay(&mut self, graph: &Self::Graph, _rows: &[SampleRow]) -> Result<()> {
        match *graph {}
    }

    fn share(&mut self, _buf: &CpuBuf) -> Result<PeerHandle> {
        unsupported("share memory with peers")
    }

    fn open(&mut self, _me: usize, _handles: &[PeerHandle], _bytes: usize) -> Result<PeerWindow> {
        unsupported("open the memory of peers")
    }
}
