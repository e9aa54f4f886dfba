//! `linear` and `logits`: few rows stream the weight, more rows are taken in pieces.

use dist_core::{Activation, DType};

use super::{address_or_none, expect_type, suffix, unsupported};
use crate::args::{Epilogue, LinearArgs, LogitsArgs, Norm, Prologue, Then};
use crate::cuda::args::{Address, LinearParams};
use crate::cuda::backend::{CudaBackend, grown};
use crate::cuda::buf::CudaBuf;
use crate::cuda::choice;
use crate::error::Result;
use crate::weight::Weight;

/// Threads of the streaming kernels.
const THREADS: u32 = 256;

/// A product, its addresses being those of the first row.
#[derive(Clone, Copy)]
struct Product {
    params: LinearParams,
    dtype: DType,
    out_bytes: usize,
}

fn activation(then: &Then<'_, CudaBackend>) -> i32 {
    match then {
        Then::Store | Then::AppendKv(_) => 0,
        Then::Activate(Activation::GeluTanh) => 1,
        Then::Activate(Activation::GeluErf) => 2,
        Then::Activate(Activation::Relu) => 3,
    }
}

impl Product {
    fn new((out, x): (&CudaBuf, Address), weight: &Weight<CudaBuf>, rows: usize) -> Self {
        let part = &weight.parts[0];
        let out_f32 = out.dtype == DType::F32;
        let params = LinearParams {
            out: out.address(),
            x,
            weight: part.data.address(),
            rows: rows as i32,
            n: weight.n as i32,
            k: weight.k as i32,
            ld_weight: part.ld as i32,
            out_f32: i32::from(out_f32),
            // Divisors, where nothing is appended.
            n_kv_heads: 0,
            block_size: 1,
            d_head: 1,
            ..bytemuck::Zeroable::zeroed()
        };
        Self { params, dtype: weight.dtype, out_bytes: out.dtype.bytes() }
    }

    fn then(mut self, epilogue: &Epilogue<'_, CudaBackend>) -> Self {
        let params = &mut self.params;
        params.bias = address_or_none(epilogue.bias, "linear: bias", self.dtype);
        params.activation = activation(&epilogue.then);
        if let Then::AppendKv(append) = &epilogue.then {
            expect_type("linear: cache", append.layout.dtype, self.dtype);
            params.k_cache = append.kv.k.address();
            params.v_cache = append.kv.v.address();
            params.slots = append.slots.address();
            params.n_kv_heads = append.layout.n_kv_heads_local as i32;
            params.block_size = append.layout.block_size as i32;
            params.d_head = append.layout.d_head as i32;
        }
        self
    }

    /// Rows from `first` on.
    fn rows(&self, first: usize, n: usize) -> LinearParams {
        let mut params = self.params;
        let elements = |width: i32| (first * width as usize) as u64;
        params.out += elements(params.n) * self.out_bytes as u64;
        params.x += elements(params.k) * self.dtype.bytes() as u64;
        if params.slots != 0 {
            params.slots += first as u64 * 4;
        }
        params.rows = n as i32;
        params
    }
}

impl CudaBackend {
    pub(in crate::cuda) fn launch_linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()> {
        let LinearArgs { out, x, weight, rows, prologue, epilogue, .. } = args;
        expect_type("linear: x", x.dtype, weight.dtype);
        expect_type("linear: out", out.dtype, weight.dtype);
        let x = match &prologue {
            Prologue::None | Prologue::Norm(Norm::None) => x.address(),
            Prologue::Norm(norm) => self.norm_rows(x, norm, rows, weight.k)?,
        };
        self.multiply(&Product::new((out, x), weight, rows).then(&epilogue))
    }

    pub(in crate::cuda) fn launch_logits(&mut self, args: &LogitsArgs<'_, Self>) -> Result<()> {
        expect_type("logits: x", args.x.dtype, args.head.dtype);
        self.multiply(&Product::new((args.out, args.x.address()), args.head, args.rows))
    }

    /// Normalised rows in memory of our own.
    fn norm_rows(&mut self, x: &CudaBuf, norm: &Norm<'_, Self>, rows: usize, k: usize) -> Result<Address> {
        let n_bytes = rows * k * x.dtype.bytes();
        let normed = grown(&mut self.scratch.normed, &self.context, "normed rows", n_bytes)?.address();
        self.norm((normed, x.address(), 0, 0), norm, false, (rows, k), x.dtype)?;
        Ok(normed)
    }

    fn multiply(&mut self, product: &Product) -> Result<()> {
        let LinearParams { rows, n, k, .. } = product.params;
        let (rows, n) = (rows as usize, n as usize);
        if k % 8 != 0 {
            return unsupported("multiply rows of a length that is no multiple of 8");
        }
        let info = self.context.info();
        let (n_sms, is_hopper) = (info.n_sms, info.capability == (9, 0));
        let most = choice::streaming_rows_max(is_hopper);
        for first in (0..rows).step_by(most) {
            let n_rows = most.min(rows - first);
            // Pieces of many rows are of one kind, so that what a row gives does not depend on its place.
            let choice = choice::streaming(if rows > most { most } else { n_rows }, n, n_sms, is_hopper);
            let params = LinearParams { units: choice.units as i32, ..product.rows(first, n_rows) };
            let symbol = format!("{}_{}", choice.symbol, suffix(product.dtype));
            let kernel = self.kernels.get(choice.unit, &symbol)?;
            let blocks = (choice.clusters * choice.cluster) as u32;
            let mut launch = kernel.function.over([blocks, 1, 1], THREADS);
            launch.cluster = choice.cluster as u32;
            kernel.function.launch(&self.stream, &launch, &params, &[])?;
        }
        Ok(())
    }
}
