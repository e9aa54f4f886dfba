//! GEMM, attention and sampling kernels behind one [`Backend`] trait: the steps of a transformer as a transformer says
//! them. The crate knows no ranks, plans, sequences or checkpoints.
//!
//! [`cpu::CpuBackend`] computes: weights in f32, f16 or bf16 as they are stored, activations in f32, every sum in one
//! canonical order, so that a result is a function of its inputs alone. [`trace::TraceBackend`] writes down what it was
//! asked, which shows a lost fusion without a device. `KERNELS.md` lists every kernel with what bounds it.
//!
//! ```
//! use dist_kernels::args::{Epilogue, K_SEGMENTS, LinearArgs, Prologue, Then};
//! use dist_kernels::cpu::{CpuBackend, CpuOptions, CpuPath};
//! use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};
//! use dist_kernels::{Backend, Result};
//! use dist_core::DType;
//!
//! # fn main() -> Result<()> {
//! let spin = std::time::Duration::from_micros(50);
//! let mut cpu = CpuBackend::new(CpuOptions { threads: 2, path: CpuPath::Auto, spin })?;
//! // Two outputs of three inputs each, `[n, k]`, as a checkpoint may hold them.
//! let bytes: Vec<u8> = [1.0_f32, 2.0, 3.0, -1.0, 0.0, 1.0].iter().flat_map(|w| w.to_le_bytes()).collect();
//! let part = HostPart { bytes: HostBytes::new(bytes), offset: 0, n: 2, ld: 3 };
//! let weight = cpu.prepare(HostWeight { parts: vec![part], dtype: DType::F32, layout: Layout::Nk, k: 3 })?;
//! let mut x = cpu.alloc("x", DType::F32, 3)?;
//! let mut out = cpu.alloc("out", DType::F32, 2)?;
//! cpu.upload(&mut x, 0, bytemuck::cast_slice(&[1.0_f32, 1.0, 2.0]))?;
//! cpu.linear(LinearArgs {
//!     out: &mut out,
//!     x: &x,
//!     weight: &weight,
//!     rows: 1,
//!     k_segments: K_SEGMENTS,
//!     prologue: Prologue::None,
//!     epilogue: Epilogue { bias: None, then: Then::Store },
//! })?;
//! let mut y = [0.0_f32; 2];
//! cpu.download(&out, 0, bytemuck::cast_slice_mut(&mut y))?;
//! assert_eq!(y, [9.0, 1.0]);
//! # Ok(())
//! # }
//! ```

pub mod args;
pub mod backend;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod trace;
pub mod weight;

pub use args::Activation;
pub use backend::Backend;
pub use error::{KernelError, Result};
