//! `linear` and `logits`: few rows stream the weight, more rows are multiplied tile by tile.

#[cfg(test)]
mod tests;

use dist_core::{Activation, DType};

use super::{address_or_none, expect_type, suffix, unsupported};
use crate::args::{Epilogue, LinearArgs, LogitsArgs, Norm, Prologue, Then};
use crate::cuda::args::{Address, GemmParams, LinearParams};
use crate::cuda::backend::{CudaBackend, grown};
use crate::cuda::buf::CudaBuf;
use crate::cuda::choice::{self, Chip, Gemm};
use crate::cuda::driver::{EpilogueKind, Operands, ProductShape, TensorMap, TensorMapSpec};
use crate::cuda::plans::{PlanKey, bucket};
use crate::error::Result;
use crate::weight::Weight;

/// Threads of the streaming kernels.
const THREADS: u32 = 256;
/// Threads of `gemm_hopper`.
const GEMM_THREADS: u32 = 384;
/// Rows that a warp of it stores at once.
const GEMM_BOX_ROWS: usize = 16;

/// A product.
#[derive(Clone, Copy)]
struct Product {
    params: LinearParams,
    dtype: DType,
    function: Option<Activation>,
}

fn activation_of(function: Option<Activation>) -> i32 {
    match function {
        None => 0,
        Some(Activation::GeluTanh) => 1,
        Some(Activation::GeluErf) => 2,
        Some(Activation::Relu) => 3,
    }
}

impl Product {
    fn new((out, x): (&CudaBuf, Address), weight: &Weight<CudaBuf>, rows: usize) -> Self {
        let shape = ProductShape::of(weight, out.dtype == DType::F32, EpilogueKind::None);
        let operands = Operands { out: out.address(), x, weight: weight.parts[0].data.address(), bias: 0 };
        Self::of(&shape, &operands, rows)
    }

    fn of(shape: &ProductShape, operands: &Operands, rows: usize) -> Self {
        let params = LinearParams {
            out: operands.out,
            x: operands.x,
            weight: operands.weight,
            bias: operands.bias,
            rows: rows as i32,
            n: shape.n as i32,
            k: shape.k as i32,
            ld_weight: shape.ld as i32,
            activation: activation_of(shape.epilogue.function()),
            out_f32: i32::from(shape.out_f32),
            // Divisors, where nothing is appended.
            n_kv_heads: 0,
            block_size: 1,
            d_head: 1,
            ..bytemuck::Zeroable::zeroed()
        };
        Self { params, dtype: shape.dtype, function: shape.epilogue.function() }
    }

    fn then(mut self, epilogue: &Epilogue<'_, CudaBackend>) -> Self {
        let params = &mut self.params;
        params.bias = address_or_none(epilogue.bias, "linear: bias", self.dtype);
        if let Then::Activate(function) = epilogue.then {
            self.function = Some(function);
        }
        params.activation = activation_of(self.function);
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

    /// The plan that it may run by; `None` for few rows, unless the library is to have those too, and for what only own
    /// kernels do.
    fn plan_key(&self, wants_library: bool) -> Option<PlanKey> {
        let params = &self.params;
        let rows = params.rows as usize;
        let rows = bucket(rows).or((wants_library && rows > 0).then_some(rows))?;
        if params.k_cache != 0 {
            return None;
        }
        let shape = ProductShape {
            n: params.n as usize,
            k: params.k as usize,
            ld: params.ld_weight as usize,
            dtype: self.dtype,
            out_f32: params.out_f32 != 0,
            epilogue: EpilogueKind::of(params.bias != 0, self.function)?,
        };
        shape.is_for_library().then_some(PlanKey { rows, shape })
    }

    fn operands(&self) -> Operands {
        let LinearParams { out, x, weight, bias, .. } = self.params;
        Operands { out, x, weight, bias }
    }
}

impl CudaBackend {
    pub(in crate::cuda) fn launch_linear(&mut self, args: LinearArgs<'_, Self>) -> Result<()> {
        let LinearArgs { out, x, weight, rows, prologue, epilogue, .. } = args;
        expect_type("linear: x", x.dtype, weight.dtype);
        expect_type("linear: out", out.dtype, weight.dtype);
        // Four elements are appended at once.
        if matches!(&epilogue.then, Then::AppendKv(append) if !append.layout.d_head.is_multiple_of(4)) {
            return unsupported("append keys and values of heads whose size is no multiple of 4");
        }
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
        let normed = {
            let scratch = &mut self.scratch;
            let memory = (&mut scratch.normed, &mut scratch.outgrown);
            grown(memory, &self.context, "normed rows", n_bytes)?.address()
        };
        self.norm((normed, x.address(), 0, 0), norm, false, (rows, k), x.dtype)?;
        Ok(normed)
    }

    fn multiply(&mut self, product: &Product) -> Result<()> {
        let (operands, rows) = (product.operands(), product.params.rows as usize);
        if let Some(key) = product.plan_key(self.gemms.wants_library()).filter(|_| operands.are_aligned())
            && self.gemms.multiply(&self.stream, &key, &operands, rows)?
        {
            return Ok(());
        }
        self.multiply_by_kernel(product)
    }

    /// The product by a kernel of our own, whatever plans say.
    pub(in crate::cuda) fn multiply_own(
        &mut self,
        shape: &ProductShape,
        operands: &Operands,
        rows: usize,
    ) -> Result<()> {
        self.multiply_by_kernel(&Product::of(shape, operands, rows))
    }

    fn multiply_by_kernel(&mut self, product: &Product) -> Result<()> {
        let LinearParams { rows, k, .. } = product.params;
        let info = self.context.info();
        let is_hopper = info.capability == (9, 0);
        if rows == 0 {
            Ok(())
        } else if k % 8 != 0 {
            self.multiply_tiles(product)
        } else if rows as usize <= choice::streaming_rows_max(is_hopper) {
            self.stream_weight(product)
        } else if is_hopper && choice::gemm_takes(rows as usize, product.params.n as usize) {
            self.multiply_tiles_hopper(product)
        } else {
            self.multiply_tiles(product)
        }
    }

    /// Few rows: as fast as the weight can be read.
    fn stream_weight(&mut self, product: &Product) -> Result<()> {
        let params = product.params;
        let (rows, n, k) = (params.rows as usize, params.n as usize, params.k as usize);
        let choice = choice::streaming((rows, n, k), Chip::of(self.context.info()));
        let params = LinearParams { units: choice.units as i32, ..params };
        let symbol = format!("{}_{}", choice.symbol, suffix(product.dtype));
        let kernel = self.kernels.get(choice.unit, &symbol)?;
        let blocks = (choice.clusters * choice.cluster) as u32;
        let threads = if kernel.threads > 0 { kernel.threads } else { THREADS };
        let mut launch = kernel.function.over([blocks, 1, 1], threads);
        launch.cluster = choice.cluster as u32;
        let Some(boxes) = choice.boxes else {
            return self.launch(kernel, &launch, &params, &[]);
        };
        launch.shared_bytes = boxes.shared_bytes.next_multiple_of(16).min(launch.shared_bytes);
        let x = self.map(params.x, (rows, k, k), (boxes.x, 64), false)?;
        let weight = self.map(params.weight, (n, k, params.ld_weight as usize), (boxes.weight, 64), false)?;
        self.launch(kernel, &launch, &params, &[&x, &weight])
    }

    /// How the copy engine finds boxes of a matrix: its rows, columns and row length; rows and columns of a box; whether it
    /// is read more than once.
    fn map(
        &self,
        address: Address,
        (rows, columns, ld): (usize, usize, usize),
        (box_rows, box_columns): (usize, u32),
        reads_ahead: bool,
    ) -> Result<TensorMap> {
        let box_rows = box_rows as u32;
        let spec = TensorMapSpec { address, rows, columns, ld, box_rows, box_columns, reads_ahead };
        Ok(self.context.tensor_map(&spec)?)
    }

    /// Many rows, or rows that are not aligned.
    fn multiply_tiles(&mut self, product: &Product) -> Result<()> {
        let params = product.params;
        let (rows, n, k) = (params.rows as usize, params.n as usize, params.k as usize);
        let (symbol, side, threads) = choice::gemm_general(rows, n, k, self.context.info().n_sms);
        let blocks = rows.div_ceil(side) * n.div_ceil(side);
        let symbol = format!("{symbol}_{}", suffix(product.dtype));
        self.start(("gemm", &symbol), [blocks as u32, 1, 1], threads, &params)
    }

    /// Many rows on Hopper.
    fn multiply_tiles_hopper(&mut self, product: &Product) -> Result<()> {
        let linear = &product.params;
        let (rows, n, k) = (linear.rows as usize, linear.n as usize, linear.k as usize);
        let choice = self.gemms.own.get(rows, n, k, Chip::of(self.context.info()));
        self.multiply_tiles_as(product, &choice)
    }

    /// Many rows on Hopper by the launch `choice`.
    fn multiply_tiles_as(&mut self, product: &Product, choice: &Gemm) -> Result<()> {
        let linear = product.params;
        let (rows, n, k) = (linear.rows as usize, linear.n as usize, linear.k as usize);
        let ((below, beside), (bm, bn)) = (choice.cluster, choice.tile);
        let symbol = format!("{}_{}", choice.symbol, suffix(product.dtype));
        let kernel = self.kernels.get(choice.unit(), &symbol)?;
        let x = self.map(linear.x, (rows, k, k), (bm / beside, 64), true)?;
        let weight = self.map(linear.weight, (n, k, linear.ld_weight as usize), (bn / below, 64), true)?;
        // Not read where the copy engine does not store.
        let stores = linear.out_f32 == 0 && n % 8 == 0;
        let out =
            if stores { self.map(linear.out, (rows, n, n), (GEMM_BOX_ROWS, kernel.part), true)? } else { x };
        let params = GemmParams {
            linear,
            rows_of_cluster: below as i32,
            columns_of_cluster: beside as i32,
            splits: choice.splits as i32,
            group: choice.group as i32,
            spread: i32::from(choice.spread),
            padding: 0,
        };
        let size = below * beside * choice.splits;
        let mut launch = kernel.function.over([(choice.clusters * size) as u32, 1, 1], GEMM_THREADS);
        launch.cluster = size as u32;
        self.launch(kernel, &launch, &params, &[&x, &weight, &out])
    }
}
