//! What this GPU can do at best: moving memory, and multiplying with the kernels that there are.

use dist_core::DType;

use super::args::ReadParams;
use super::backend::CudaBackend;
use super::buf::CudaBuf;
use super::driver::{Event, Graph};
use crate::args::{Epilogue, K_SEGMENTS, LinearArgs, Prologue, SampleRow, Then};
use crate::backend::Backend;
use crate::error::Result;
use crate::weight::{Buffer, Layout, Weight, WeightPart};

/// Bytes of a copy: far beyond the L2 cache.
const COPY_BYTES: usize = 1 << 30;
/// Side of a product: what is larger is no faster.
const SIDE: usize = 8192;
const PASSES: usize = 5;
/// Bytes of a pass that only reads: enough that its beginning and end do not count.
const READ_BYTES: usize = 4 << 30;
/// Threads of `read_all`, its blocks on a multiprocessor, and bytes that a block takes at a time.
const READ_THREADS: u32 = 512;
const READ_BLOCKS: u32 = 4;
const READ_CHUNK: usize = 64 << 10;

impl CudaBackend {
    /// Bytes a second that a copy on the GPU reads and writes, and the bytes of a pass. It takes as much memory for
    /// itself, less where less is free.
    pub fn copy_rate(&mut self) -> Result<(f64, u64)> {
        let (free, _) = self.memory()?;
        let n_bytes = COPY_BYTES.min(free / 4);
        let src = self.context.alloc("a copy to measure", n_bytes)?;
        let mut dst = self.context.alloc("a copy to measure", n_bytes)?;
        let ms = self.least_ms(|backend| Ok(backend.stream.copy(&mut dst, 0, &src, 0, n_bytes)?))?;
        Ok((2.0 * n_bytes as f64 / (f64::from(ms) / 1e3), 2 * n_bytes as u64))
    }

    /// Bytes a second that a kernel reads that does nothing else, and the bytes of a pass. It takes as much memory for
    /// itself, less where less is free.
    pub fn read_rate(&mut self) -> Result<(f64, u64)> {
        let (free, _) = self.memory()?;
        let blocks = READ_BLOCKS * self.context.info().n_sms as u32;
        // As much for each block.
        let round = blocks as usize * READ_CHUNK;
        let n_bytes = READ_BYTES.min(free / 2) / round * round;
        let memory = self.context.alloc("memory to read", n_bytes)?;
        let found = self.context.alloc("memory to read", size_of::<u32>())?;
        let (from, n, found) = (memory.address(), n_bytes as u64 / 16, found.address());
        // All that is there are zeros.
        let params = ReadParams { from, n, found, never: 1, padding: 0 };
        let kernel = self.kernels.get("read", "read_all")?;
        let launch = kernel.function.over([blocks, 1, 1], READ_THREADS);
        let ms =
            self.least_ms(|backend| Ok(kernel.function.launch(&backend.stream, &launch, &params, &[])?))?;
        Ok((n_bytes as f64 / (f64::from(ms) / 1e3), n_bytes as u64))
    }

    /// Milliseconds that each of `n` replays takes on the GPU, after one that does not count and tells the graph how to
    /// draw.
    pub fn time_replays(&mut self, graph: &Graph, rows: &[SampleRow], n: usize) -> Result<Vec<f32>> {
        self.replay(graph, rows)?;
        (0..n).map(|_| self.time(|backend| backend.replay(graph, &[]))).collect()
    }

    /// Fills `dst` with `pattern` over and over, beginning with its element `from`: a cheap way to numbers by the
    /// gigabyte.
    pub fn fill_from(&mut self, dst: &mut CudaBuf, pattern: &CudaBuf, from: usize) -> Result<()> {
        assert!(dst.dtype == pattern.dtype && !pattern.is_empty(), "{} from {}", dst.dtype, pattern.dtype);
        let size = dst.dtype.bytes();
        let (mut at, mut from) = (0, from % pattern.len);
        while at < dst.len {
            let n = (dst.len - at).min(pattern.len - from);
            self.stream.copy(&mut dst.memory, at * size, &pattern.memory, from * size, n * size)?;
            (at, from) = (at + n, 0);
        }
        Ok(())
    }

    /// Multiplications and additions a second of a large product of `dtype`.
    pub fn multiply_rate(&mut self, dtype: DType) -> Result<f64> {
        let len = SIDE * SIDE;
        // Numbers as models have them: zeros would be multiplied faster.
        let values: Vec<u16> =
            (0..len as u32).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 20) as u16 | 0x3800).collect();
        let mut x = self.alloc("a product to measure", dtype, len)?;
        self.upload(&mut x, 0, bytemuck::cast_slice(&values))?;
        let mut data = self.alloc("a product to measure", dtype, len)?;
        self.upload(&mut data, 0, bytemuck::cast_slice(&values))?;
        let mut out = self.alloc("a product to measure", dtype, len)?;
        let parts = vec![WeightPart { data, n: SIDE, ld: SIDE }];
        let weight = Weight { parts, dtype, layout: Layout::Nk, n: SIDE, k: SIDE };
        let ms = self.least_ms(|backend| {
            backend.linear(LinearArgs {
                out: &mut out,
                x: &x,
                weight: &weight,
                rows: SIDE,
                k_segments: K_SEGMENTS,
                prologue: Prologue::None,
                epilogue: Epilogue { bias: None, then: Then::Store },
            })
        })?;
        Ok(2.0 * (SIDE as f64).powi(3) / (f64::from(ms) / 1e3))
    }

    /// The least of a few times that `work` takes, after one that does not count and tells the graph how to
    /// draw.
    fn least_ms(&mut self, mut work: impl FnMut(&mut Self) -> Result<()>) -> Result<f32> {
        work(self)?;
        let mut least = f32::INFINITY;
        for _ in 0..PASSES {
            least = least.min(self.time(&mut work)?);
        }
        Ok(least)
    }

    /// Milliseconds that the GPU takes for `work`.
    fn time(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<f32> {
        let [start, end]: [Event; 2] = [self.context.timed_event()?, self.context.timed_event()?];
        self.stream.record(&start)?;
        work(self)?;
        self.stream.record(&end)?;
        end.synchronize()?;
        Ok(end.ms_since(&start)?)
    }
}
