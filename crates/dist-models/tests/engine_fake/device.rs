//! A device that computes nothing, draws the number of the draw, records steps, and fails when it is told to: in the
//! call that is asked for, so many of its kind after the start.

use std::cell::Cell;
use std::rc::Rc;

use dist_core::DType;
use dist_core::raw::{PeerHandle, PeerWindow, RawBuf};
use dist_kernels::args::{
    AddBiasArgs, AddBiasNormArgs, AttentionArgs, EmbedArgs, GatherRowsArgs, LinearArgs, LogitsArgs,
    SampleArgs, SampleRow,
};
use dist_kernels::cuda::driver::CudaError;
use dist_kernels::weight::{Buffer, HostWeight, Weight, WeightPart};
use dist_kernels::{Backend, KernelError, Result};

/// The calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Upload,
    Embed,
    Sample,
    Fetch,
    Finish,
    Replay,
}

/// Which call fails, and how many of its kind go well before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fault(Rc<Cell<Option<(Call, usize)>>>);

impl Fault {
    /// From now on.
    pub(crate) fn arm(&self, call: Call, after: usize) {
        self.0.set(Some((call, after)));
    }

    fn at(&self, call: Call) -> Result<()> {
        match self.0.get() {
            Some((armed, 0)) if armed == call => Err(KernelError::Cuda(CudaError::Call {
                call: "cuEventSynchronize",
                what: "what was asked before".to_owned(),
                name: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned(),
                meaning: format!("{call:?} was told to fail"),
                status: 700,
            })),
            Some((armed, after)) if armed == call => {
                self.0.set(Some((call, after - 1)));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The device.
#[derive(Debug, Default)]
pub(crate) struct FakeGpu {
    pub(crate) fault: Fault,
    n_drawn: u32,
}

/// Memory that is only counted.
#[derive(Debug)]
pub(crate) struct FakeBuf {
    dtype: DType,
    len: usize,
}

impl Buffer for FakeBuf {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Backend for FakeGpu {
    type Buf = FakeBuf;
    type Graph = ();
    type Fetch = u32;

    const STEPS_AHEAD: usize = 1;

    fn alloc(&mut self, _what: &str, dtype: DType, len: usize) -> Result<FakeBuf> {
        Ok(FakeBuf { dtype, len })
    }

    fn prepare(&mut self, weight: HostWeight) -> Result<Weight<FakeBuf>> {
        let (n, k, dtype, layout) = (weight.n(), weight.k, weight.dtype, weight.layout);
        let parts = vec![WeightPart { data: FakeBuf { dtype, len: n * k }, n, ld: k }];
        Ok(Weight { parts, dtype, layout, n, k })
    }

    fn upload(&mut self, _dst: &mut FakeBuf, _at: usize, _src: &[u8]) -> Result<()> {
        self.fault.at(Call::Upload)
    }

    fn download(&mut self, _src: &FakeBuf, _at: usize, dst: &mut [u8]) -> Result<()> {
        dst.fill(0);
        Ok(())
    }

    fn fetch(&mut self, _pieces: &[(&FakeBuf, usize)]) -> Result<u32> {
        self.fault.at(Call::Fetch)?;
        self.n_drawn += 1;
        Ok(self.n_drawn)
    }

    /// Every row of a step draws the step's number.
    fn finish(&mut self, fetch: u32, dst: &mut [u8]) -> Result<()> {
        self.fault.at(Call::Finish)?;
        for word in dst.chunks_mut(4) {
            word.copy_from_slice(&fetch.to_le_bytes()[..word.len()]);
        }
        Ok(())
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    fn raw<'a>(&mut self, buf: &'a mut FakeBuf, len: usize) -> RawBuf<'a> {
        RawBuf::Device { ptr: 0, bytes: len * buf.dtype.bytes(), dtype: buf.dtype }
    }

    fn embed(&mut self, _args: EmbedArgs<'_, Self>) -> Result<()> {
        self.fault.at(Call::Embed)
    }

    fn linear(&mut self, _args: LinearArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn attention(&mut self, _args: AttentionArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn add_bias_norm(&mut self, _args: AddBiasNormArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn add_bias(&mut self, _args: AddBiasArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn gather_rows(&mut self, _args: GatherRowsArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn logits(&mut self, _args: LogitsArgs<'_, Self>) -> Result<()> {
        Ok(())
    }

    fn sample(&mut self, _args: SampleArgs<'_, Self>) -> Result<()> {
        self.fault.at(Call::Sample)
    }

    fn capture(&mut self, run: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<Option<()>> {
        run(self).map(Some)
    }

    fn replay(&mut self, _graph: &(), _rows: &[SampleRow]) -> Result<()> {
        self.fault.at(Call::Replay)
    }

    fn share(&mut self, _buf: &FakeBuf) -> Result<PeerHandle> {
        Err(KernelError::Unsupported { backend: "fake", what: "share memory with peers" })
    }

    fn open(&mut self, _me: usize, _handles: &[PeerHandle], _bytes: usize) -> Result<PeerWindow> {
        Err(KernelError::Unsupported { backend: "fake", what: "open the memory of peers" })
    }
}
