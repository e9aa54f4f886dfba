//! What this machine can do at best, measured with a backend's own threads and instructions: reading memory and
//! multiplying. Benchmarks print their results beside it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::backend::CpuBackend;
use super::simd::{Kernel, LANES, Simd};

/// Bytes that one task reads.
const TASK_BYTES: usize = 1 << 21;
/// Independent chains: enough to hide the latency of a multiply-add on every core so far.
const CHAINS: usize = 12;

impl CpuBackend {
    /// Reads all of `bytes` once with all threads and returns their sum, so that nothing can be left out.
    pub fn read_all(&self, bytes: &[u8]) -> u64 {
        let sum = AtomicU64::new(0);
        let (kernels, pool) = self.cores();
        let n_tasks = bytes.len().div_ceil(TASK_BYTES);
        pool.run(n_tasks, &|idx| {
            let end = bytes.len().min((idx + 1) * TASK_BYTES);
            sum.fetch_add(kernels.run(Read(&bytes[idx * TASK_BYTES..end])), Ordering::Relaxed);
        });
        sum.into_inner()
    }

    /// Multiplies and adds in registers with all threads; returns the floating-point operations done, two for each
    /// multiply-add.
    pub fn multiply_add(&self, steps: usize) -> f64 {
        let (kernels, pool) = self.cores();
        let n = pool.n_threads();
        pool.run(n, &|_| {
            std::hint::black_box(kernels.run(MultiplyAdd(steps)));
        });
        (2 * LANES * CHAINS * steps * n) as f64
    }
}

struct Read<'a>(&'a [u8]);

impl Kernel for Read<'_> {
    type Out = u64;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> u64 {
        const VECTORS: usize = 8;
        const VECTOR_BYTES: usize = LANES * size_of::<f32>();
        let (blocks, rest) = self.0.as_chunks::<{ VECTORS * VECTOR_BYTES }>();
        let mut sums = [s.splat_int(0); VECTORS];
        for block in blocks {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the block has eight vectors of 32 bytes.
                let v = unsafe { s.load_ptr(block.as_ptr().add(i * VECTOR_BYTES).cast()) };
                *sum = s.add_int(*sum, s.to_bits(v));
            }
        }
        let mut total = rest.iter().map(|&byte| u64::from(byte)).sum();
        for sum in sums {
            for lane in s.to_array(s.float_of(sum)) {
                total += u64::from(lane.to_bits());
            }
        }
        total
    }
}

struct MultiplyAdd(usize);

impl Kernel for MultiplyAdd {
    type Out = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (x, y) = (s.splat(std::hint::black_box(0.999)), s.splat(std::hint::black_box(1e-3)));
        let mut chains = [s.zero(); CHAINS];
        for _ in 0..self.0 {
            for chain in &mut chains {
                *chain = s.fma(*chain, x, y);
            }
        }
        let mut total = 0.0;
        for chain in chains {
            total += s.sum(chain);
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{CpuOptions, CpuPath};

    #[test]
    fn every_byte_is_read() {
        let options = |path| CpuOptions { threads: 2, path, spin: std::time::Duration::ZERO };
        for path in [CpuPath::Auto, CpuPath::Portable] {
            let backend = CpuBackend::new(options(path)).unwrap();
            let mut bytes = vec![0_u8; 3 * TASK_BYTES + 77];
            for at in [0, 255, 256, TASK_BYTES - 1, TASK_BYTES, 3 * TASK_BYTES + 76] {
                let before = backend.read_all(&bytes);
                bytes[at] = 1;
                assert_ne!(backend.read_all(&bytes), before, "{} byte {at}", backend.describe().path);
            }
            assert!(backend.multiply_add(10) > 0.0);
        }
    }
}
