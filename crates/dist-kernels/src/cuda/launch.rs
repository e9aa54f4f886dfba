//! Each step as a launch: the kernel that its shapes choose, its arguments, its grid.

mod attention;
mod linear;

use bytemuck::Zeroable;
use dist_core::DType;

use super::args::{AddBiasParams, Address, EmbedParams, EmbedTable, GatherParams, NormParams, SampleParams};
use super::backend::{CudaBackend, NAME, grown};
use super::buf::CudaBuf;
use super::choice;
use super::sample::{CHUNK, Change, MAX_TOP, MAX_VOCAB, PARTIAL_BYTES, RowParams};
use crate::args::{
    AddBiasArgs, AddBiasNormArgs, EmbedArgs, GatherRowsArgs, Lookup, Norm, Residual, SampleArgs,
};
use crate::error::{KernelError, Result};
use crate::weight::Buffer;

/// Threads of the kernels that pass over rows once.
const ROW_THREADS: u32 = 256;
/// Threads of `sample`.
const SAMPLE_THREADS: u32 = 1024;

/// How kernels' names end.
fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => panic!("no kernel takes {dtype}"),
    }
}

/// Asserts that activations, weights and vectors of a step have one type: kernels read them as such.
fn expect_type(what: &str, found: DType, dtype: DType) {
    assert!(found == dtype, "{what} is {found}, the step is {dtype}");
}

fn address_or_none(buf: Option<&CudaBuf>, what: &str, dtype: DType) -> Address {
    buf.map_or(0, |buf| {
        expect_type(what, buf.dtype, dtype);
        buf.address()
    })
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(KernelError::Unsupported { backend: NAME, what })
}

/// Blocks of a pass over rows of `d` elements, eight a thread where rows are aligned, and how its name goes on.
fn row_blocks(d: usize) -> (u32, &'static str) {
    let is_aligned = d.is_multiple_of(8);
    let per_block = ROW_THREADS as usize * if is_aligned { 8 } else { 1 };
    (d.div_ceil(per_block) as u32, if is_aligned { "" } else { "_odd" })
}

impl CudaBackend {
    /// Launches a kernel of `unit`: `A` is its struct of arguments.
    fn start<A: Copy>(
        &mut self,
        (unit, symbol): (&'static str, &str),
        grid: [u32; 3],
        threads: u32,
        args: &A,
    ) -> Result<()> {
        let kernel = self.kernels.get(unit, symbol)?;
        let launch = kernel.function.over(grid, threads);
        Ok(kernel.function.launch(&self.stream, &launch, args, &[])?)
    }

    pub(super) fn launch_embed(&mut self, args: &EmbedArgs<'_, Self>) -> Result<()> {
        let EmbedArgs { out, rows, d, tokens, positions } = args;
        if *rows == 0 {
            return Ok(());
        }
        let (blocks, odd) = row_blocks(*d);
        let params = EmbedParams {
            out: out.address(),
            tokens: table_of(tokens.as_ref(), out.dtype),
            positions: table_of(positions.as_ref(), out.dtype),
            d: *d as i32,
            padding: 0,
        };
        let symbol = format!("embed{odd}_{}", suffix(out.dtype));
        self.start(("rows", &symbol), [blocks, *rows as u32, 1], ROW_THREADS, &params)
    }

    pub(super) fn launch_norm(&mut self, args: &AddBiasNormArgs<'_, Self>) -> Result<()> {
        let dtype = args.residual.dtype;
        expect_type("add_bias_norm: normed", args.normed.dtype, dtype);
        let out = args.normed.address();
        let keep_normed = args.keep == Residual::Normed;
        let delta = address_or_none(args.delta, "add_bias_norm: delta", dtype);
        let bias = address_or_none(args.bias, "add_bias_norm: bias", dtype);
        let io = (out, args.residual.address(), delta, bias);
        self.norm(io, &args.norm, keep_normed, (args.rows, args.d), dtype)
    }

    /// `(normed, residual, delta, bias)`; a residual without delta and bias is only read.
    fn norm(
        &mut self,
        (normed, residual, delta, bias): (Address, Address, Address, Address),
        norm: &Norm<'_, Self>,
        keep_normed: bool,
        (rows, d): (usize, usize),
        dtype: DType,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let (weight, norm_bias, eps) = match norm {
            Norm::None => (None, None, 0.0),
            Norm::Layer { weight, bias, eps } => (Some(*weight), Some(*bias), *eps),
            Norm::Rms { weight, eps } => (Some(*weight), None, *eps),
        };
        let params = NormParams {
            normed,
            residual,
            delta,
            bias,
            weight: address_or_none(weight, "norm weight", dtype),
            norm_bias: address_or_none(norm_bias, "norm bias", dtype),
            d: d as i32,
            keep_normed: i32::from(keep_normed),
            eps,
            padding: 0,
        };
        let Some((symbol, threads)) = choice::norm(d) else {
            return unsupported("normalise rows of more than 16,384 elements");
        };
        let symbol = format!("{symbol}_{}", suffix(dtype));
        self.start(("norm", &symbol), [rows as u32, 1, 1], threads, &params)
    }

    pub(super) fn launch_add_bias(&mut self, args: &AddBiasArgs<'_, Self>) -> Result<()> {
        if args.rows == 0 {
            return Ok(());
        }
        let dtype = args.x.dtype;
        expect_type("add_bias: bias", args.bias.dtype, dtype);
        let (blocks, odd) = row_blocks(args.n);
        let (x, bias) = (args.x.address(), args.bias.address());
        let params = AddBiasParams { x, bias, n: args.n as i32, padding: 0 };
        let symbol = format!("add_bias{odd}_{}", suffix(dtype));
        self.start(("rows", &symbol), [blocks, args.rows as u32, 1], ROW_THREADS, &params)
    }

    pub(super) fn launch_gather(&mut self, args: &GatherRowsArgs<'_, Self>) -> Result<()> {
        if args.n_out == 0 {
            return Ok(());
        }
        expect_type("gather_rows: x", args.x.dtype, args.out.dtype);
        // The kernel moves 16-bit halves and does not ask what they mean.
        let d = args.d * args.x.dtype.bytes() / 2;
        let (blocks, odd) = row_blocks(d);
        let params = GatherParams {
            out: args.out.address(),
            x: args.x.address(),
            indices: args.indices.address(),
            d: d as i32,
            padding: 0,
        };
        let symbol = format!("gather_rows{odd}_16");
        self.start(("rows", &symbol), [blocks, args.n_out as u32, 1], ROW_THREADS, &params)
    }

    pub(super) fn launch_sample(&mut self, args: &SampleArgs<'_, Self>) -> Result<()> {
        let (n, n_vocab) = (args.rows.len(), args.n_vocab);
        if n == 0 {
            return Ok(());
        }
        if n_vocab > MAX_VOCAB || args.n_top > MAX_TOP {
            return unsupported("sample from more than 524,288 tokens, or report more than 1,024 of them");
        }
        self.packed.fill(args.rows, n_vocab);
        let chunks = n_vocab.div_ceil(CHUNK);
        let (scratch, context, stream) = (&mut self.scratch, &self.context, &self.stream);
        let n_changes = self.packed.changes.len();
        let rows = grown(&mut scratch.rows, context, "rows to sample", n * size_of::<RowParams>())?;
        let changes = grown(
            &mut scratch.changes,
            context,
            "penalties and biases",
            n_changes.next_power_of_two() * size_of::<Change>(),
        )?;
        let partials =
            grown(&mut scratch.sample, context, "scratch of sampling", n * chunks * PARTIAL_BYTES)?;
        let tickets = grown(&mut scratch.tickets, context, "scratch of sampling", n * 4)?;
        self.inputs.upload(stream, rows, 0, bytemuck::cast_slice(&self.packed.rows))?;
        self.inputs.upload(stream, changes, 0, bytemuck::cast_slice(&self.packed.changes))?;
        let params = SampleParams {
            logits: args.logits.address(),
            ld: args.ld as i64,
            rows: rows.address(),
            changes: changes.address(),
            partials: partials.address(),
            tickets: tickets.address(),
            ids: args.ids.address(),
            logprobs: args.logprobs.address(),
            top_ids: args.top_ids.address(),
            top_logprobs: args.top_logprobs.address(),
            n_vocab: n_vocab as i32,
            n_top: args.n_top as i32,
        };
        self.start(("sample", "sample_f32"), [chunks as u32, n as u32, 1], SAMPLE_THREADS, &params)
    }
}

/// No ids: there is no table.
fn table_of(lookup: Option<&Lookup<'_, CudaBackend>>, dtype: DType) -> EmbedTable {
    let Some(lookup) = lookup else { return EmbedTable::zeroed() };
    let part = &lookup.table.parts[0];
    expect_type("embed: table", part.data.dtype(), dtype);
    EmbedTable {
        ids: lookup.ids.address(),
        table: part.data.address(),
        offset: lookup.offset,
        first: lookup.first,
        n: part.n as u32,
        ld: part.ld as i32,
    }
}
