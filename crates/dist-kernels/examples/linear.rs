//! The crate alone: a weight in host memory, one product on the CPU, and how fast the weight was read.
//!
//! `cargo run --release -p dist-kernels --example linear`

#![allow(clippy::print_stdout, reason = "an example shows what it did")]

use std::time::{Duration, Instant};

use dist_core::DType;
use dist_kernels::args::{Activation, Epilogue, K_SEGMENTS, LinearArgs, Prologue, Then};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};
use half::bf16;

fn main() -> dist_kernels::Result<()> {
    let (n, k, rounds) = (8192, 2048, 20);
    let threads = std::thread::available_parallelism().map_or(1, Into::into);
    let spin = Duration::from_micros(50);
    let mut backend = CpuBackend::new(CpuOptions { threads, path: CpuPath::Auto, spin })?;

    // A checkpoint would be mapped; any bytes with an owner will do. Nothing is copied.
    let bytes: Vec<u8> = (0..n * k)
        .flat_map(|i| bf16::from_f32(((i * 37 % 101) as f32 - 50.0) / 2500.0).to_le_bytes())
        .collect();
    let part = HostPart { bytes: HostBytes::new(bytes), offset: 0, n, ld: k };
    let weight =
        backend.prepare(HostWeight { parts: vec![part], dtype: DType::BF16, layout: Layout::Nk, k })?;

    let x: Vec<f32> = (0..k).map(|i| (i as f32 / 100.0).sin()).collect();
    let x = CpuBuf::from_slice("x", &x)?;
    let bias = CpuBuf::from_slice("bias", &vec![0.5_f32; n])?;
    let mut out = backend.alloc("out", DType::F32, n)?;

    let start = Instant::now();
    for _ in 0..rounds {
        backend.linear(LinearArgs {
            out: &mut out,
            x: &x,
            weight: &weight,
            rows: 1,
            k_segments: K_SEGMENTS,
            prologue: Prologue::None,
            epilogue: Epilogue { bias: Some(&bias), then: Then::Activate(Activation::GeluTanh) },
        })?;
    }
    let seconds = start.elapsed().as_secs_f64() / f64::from(rounds);

    println!("gelu(x · wᵀ + b) begins {:?}", &out.slice::<f32>()[..4]);
    println!(
        "{:?}: {n}x{k} bf16 in {:.3} ms, {:.1} GB/s of weights",
        backend.describe(),
        1e3 * seconds,
        (n * k * 2) as f64 / seconds / 1e9
    );
    Ok(())
}
