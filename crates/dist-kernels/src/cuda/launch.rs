//! Each step as a launch: the kernel that its shapes choose, its arguments, its grid.

mod attention;
mod linear;

use std::rc::Rc;

use bytemuck::Zeroable;
use dist_core::DType;

use super::args::{AddBiasParams, Address, EmbedParams, EmbedTable, GatherParams, NormParams, SampleParams};
use super::backend::{CudaBackend, NAME, grown};
use super::buf::CudaBuf;
use super::choice;
use super::driver::{DeviceMemory, Launch, TensorMap};
use super::inputs::Way;
use super::loaded::Kernel;
use super::sample::{CHUNK, Change, MAX_TOP, MAX_VOCAB, PARTIAL_BYTES, RowParams};
use crate::args::{
    AddBiasArgs, AddBiasNormArgs, EmbedArgs, GatherRowsArgs, Lookup, Norm, Residual, SampleArgs, SampleRow,
};
use crate::error::{KernelError, Result};
use crate::weight::Buffer;

/// Threads of the kernels that pass over rows once.
const ROW_THREADS: u32 = 256;
/// Threads of `sample`.
const SAMPLE_THREADS: u32 = 1024;

/// Memory that rows to sample and their changes have at first: enough for any step of a graph, and for most others.
pub(super) const ROWS_BYTES: usize = 256 << 10;
const CHANGES_BYTES: usize = 1 << 20;

/// Who reads what rows ask of sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// The next launch.
    Launch,
    /// Every graph.
    Graph,
}

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
        self.launch(kernel, &launch, args, &[])
    }

    /// Launches a kernel, and remembers which.
    fn launch<A: Copy>(
        &mut self,
        kernel: Rc<Kernel>,
        launch: &Launch,
        args: &A,
        maps: &[&TensorMap],
    ) -> Result<()> {
        kernel.function.launch(&self.stream, launch, args, maps)?;
        self.last = Some(kernel);
        Ok(())
    }

    pub(super) fn launch_embed(&mut self, args: &EmbedArgs<'_, Self>) -> Result<()> {
        let EmbedArgs { out, rows, d, tokens, positions, drawn } = args;
        if *rows == 0 {
            return Ok(());
        }
        let (blocks, odd) = row_blocks(*d);
        let params = EmbedParams {
            out: out.address(),
            tokens: table_of(tokens.as_ref(), out.dtype),
            positions: table_of(positions.as_ref(), out.dtype),
            drawn: drawn.map_or(0, CudaBuf::address),
            d: *d as i32,
            padding: 0,
        };
        let symbol = format!("embed{odd}_{}", suffix(out.dtype));
        let kernel = self.kernels.get("rows", &symbol)?;
        // Kernels further on read the step's arrays before they wait for the kernel before them: nothing may start
        // before the arrays are there, and this is the first to read them.
        let launch =
            Launch { overlaps: false, ..kernel.function.over([blocks, *rows as u32, 1], ROW_THREADS) };
        self.launch(kernel, &launch, &params, &[])
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

    /// Brings what the rows ask of sampling to where the kernel reads it.
    pub(super) fn tell_sampling(&mut self, rows: &[SampleRow], reader: Reader) -> Result<Address> {
        self.packed.fill(rows);
        let (scratch, context) = (&mut self.scratch, &self.context);
        let outgrown = &mut scratch.outgrown;
        let n_bytes = (self.packed.changes.len() * size_of::<Change>()).next_power_of_two();
        let what = "penalties and biases";
        let changes = grown((&mut scratch.changes, outgrown), context, what, n_bytes.max(CHANGES_BYTES))?;
        self.packed.changes_are_at(changes.address());
        let n_bytes = (rows.len() * size_of::<RowParams>()).next_power_of_two().max(ROWS_BYTES);
        let slot = match reader {
            Reader::Launch => &mut scratch.rows,
            Reader::Graph if n_bytes > ROWS_BYTES => return unsupported("draw so many rows in a graph"),
            Reader::Graph => &mut scratch.rows_of_graphs,
        };
        if self.is_recording {
            return Ok(slot.as_ref().map_or(0, DeviceMemory::address));
        }
        let rows = grown((slot, outgrown), context, "rows to sample", n_bytes)?;
        let way = Way { stream: &self.stream, copy: &self.copy };
        self.inputs.upload(way, rows, 0, bytemuck::cast_slice(&self.packed.rows))?;
        self.inputs.upload(way, changes, 0, bytemuck::cast_slice(&self.packed.changes))?;
        Ok(rows.address())
    }

    pub(super) fn launch_sample(&mut self, args: &SampleArgs<'_, Self>) -> Result<()> {
        let (n, n_vocab) = (args.rows.len(), args.n_vocab);
        if n == 0 {
            return Ok(());
        }
        if n_vocab > MAX_VOCAB || args.n_top > MAX_TOP {
            return unsupported("sample from more than 524,288 tokens, or report more than 1,024 of them");
        }
        let reader = if self.is_recording { Reader::Graph } else { Reader::Launch };
        let rows = self.tell_sampling(args.rows, reader)?;
        self.ready()?;
        let chunks = n_vocab.div_ceil(CHUNK);
        let (scratch, context, what) = (&mut self.scratch, &self.context, "scratch of sampling");
        let outgrown = &mut scratch.outgrown;
        let n_bytes = n * chunks * PARTIAL_BYTES;
        let partials = grown((&mut scratch.sample, outgrown), context, what, n_bytes)?.address();
        let tickets = grown((&mut scratch.tickets, outgrown), context, what, n * 4)?.address();
        let params = SampleParams {
            logits: args.logits.address(),
            ld: args.ld as i64,
            rows,
            partials,
            tickets,
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
