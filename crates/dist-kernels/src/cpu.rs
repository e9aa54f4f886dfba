//! The CPU backend: activations in f32, weights as stored, one canonical order of summation.
//!
//! Results are a function of the inputs alone: not of the number of rows in a step, of threads, of the weight's layout
//! or of the instructions used. This makes the CPU the oracle of every other backend.

#![allow(
    clippy::inline_always,
    reason = "a kernel is one function under one target_feature: what it calls must be inlined"
)]

mod attention;
mod attention_tile;
mod attention_values;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod backend;
mod buf;
mod ceiling;
mod embed;
mod gather;
mod linear;
mod linear_block;
mod linear_column;
mod linear_finish;
mod linear_order;
mod linear_row;
mod linear_tile;
mod math;
mod norm;
mod pack;
mod pool;
mod portable;
mod sample;
mod sample_order;
mod simd;

pub use backend::{CpuBackend, CpuDescription, CpuOptions};
pub use buf::{CpuBuf, Element};
pub use simd::CpuPath;
