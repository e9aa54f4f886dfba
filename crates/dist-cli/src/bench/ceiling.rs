//! What the machine can do at best, with the backend's own threads: reading memory and multiplying.

use std::time::Instant;

use dist_kernels::cpu::CpuBackend;

use crate::machine;

/// Bytes that are read in one pass: far beyond the caches.
const READ_BYTES: u64 = 1 << 30;
const PASSES: usize = 5;
const STEPS: usize = 2_000_000;

/// The best that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Reading memory.
    pub read_bytes_per_s: f64,
    /// Multiplying and adding in registers.
    pub flops_per_s: f64,
    /// Bytes of one reading pass.
    pub pass_bytes: u64,
}

impl Ceilings {
    /// Measures both.
    pub fn measure(backend: &CpuBackend) -> Self {
        let (read_bytes_per_s, pass_bytes) = read_rate(backend);
        let flops = (0..PASSES).map(|_| {
            let start = Instant::now();
            backend.multiply_add(STEPS) / start.elapsed().as_secs_f64()
        });
        Self { read_bytes_per_s, flops_per_s: flops.fold(0.0, f64::max), pass_bytes }
    }

    /// Of `n` machines alike.
    pub fn times(self, n: f64) -> Self {
        let Self { read_bytes_per_s, flops_per_s, .. } = self;
        Self { read_bytes_per_s: read_bytes_per_s * n, flops_per_s: flops_per_s * n, ..self }
    }
}

/// The best of a few passes over memory of at most a quarter of what is free, and the bytes of a pass.
pub fn read_rate(backend: &CpuBackend) -> (f64, u64) {
    let bytes = machine::available_bytes().map_or(READ_BYTES, |free| READ_BYTES.min(free / 4));
    // Written, so that every page is one of its own.
    let memory = vec![1_u8; bytes as usize];
    let passes = (0..PASSES).map(|_| {
        let start = Instant::now();
        std::hint::black_box(backend.read_all(&memory));
        bytes as f64 / start.elapsed().as_secs_f64()
    });
    (passes.fold(0.0, f64::max), bytes)
}
