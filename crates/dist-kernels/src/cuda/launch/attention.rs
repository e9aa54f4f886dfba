//! `attention`: the kernel for few rows a sequence, the one for many, or the one for any shape.

use super::{expect_type, suffix, unsupported};
use crate::args::AttentionArgs;
use crate::cuda::args::{AttentionAnyParams, AttentionParams, PrefillParams};
use crate::cuda::backend::{CudaBackend, grown};
use crate::cuda::choice::{self, Decode, DecodeShape};
use crate::cuda::driver::{CacheMapSpec, TensorMapSpec};
use crate::error::Result;
use crate::weight::Buffer;

/// Threads of `attention_prefill`.
const PREFILL_THREADS: u32 = 128;
/// Positions that `attention_decode` divides are below this.
const DECODE_BELOW: usize = 1 << 21;
/// Warps of a block of `attention_any`, a head each.
const ANY_WARPS: usize = 4;
/// The widest head that `attention_any` takes.
const ANY_HEAD_MAX: usize = 256;

fn window_of(args: &AttentionArgs<'_, CudaBackend>) -> i32 {
    args.window.map_or(i32::MAX, |window| window.min(i32::MAX as usize) as i32)
}

fn qkv_width(args: &AttentionArgs<'_, CudaBackend>) -> i32 {
    ((args.n_heads_local + 2 * args.layout.n_kv_heads_local) * args.layout.d_head) as i32
}

impl CudaBackend {
    pub(in crate::cuda) fn launch_attention(&mut self, args: &AttentionArgs<'_, Self>) -> Result<()> {
        let dtype = args.qkv.dtype;
        expect_type("attention: out", args.out.dtype, dtype);
        expect_type("attention: cache", args.layout.dtype, dtype);
        if args.seqs.rows == 0 {
            return Ok(());
        }
        let shape = DecodeShape {
            n_seqs: args.seqs.n_seqs,
            max_rows: args.seqs.max_rows,
            n_heads: args.n_heads_local,
            n_kv_heads: args.layout.n_kv_heads_local,
            d_head: args.layout.d_head,
            block_size: args.layout.block_size,
        };
        match choice::decode(shape, self.context.info().n_sms) {
            Some(_) if choice::is_prefill(shape) => self.attention_prefill(args),
            Some(decode) if args.seqs.max_blocks * args.layout.block_size < DECODE_BELOW => {
                self.attention_decode(args, decode)
            }
            _ => self.attention_any(args),
        }
    }

    fn attention_decode(&mut self, args: &AttentionArgs<'_, Self>, decode: Decode) -> Result<()> {
        let Decode { symbol, splits, tiles, part_floats } = decode;
        let (n_seqs, n_kv_heads) = (args.seqs.n_seqs, args.layout.n_kv_heads_local);
        let all_tiles = n_seqs * n_kv_heads * tiles;
        let (mut partials, mut counters) = (0, 0);
        if splits > 1 {
            let (scratch, context, what) = (&mut self.scratch, &self.context, "parts of attention");
            let n_bytes = all_tiles * splits * part_floats * 4;
            let outgrown = &mut scratch.outgrown;
            partials = grown((&mut scratch.attention, outgrown), context, what, n_bytes)?.address();
            counters = grown((&mut scratch.counters, outgrown), context, what, all_tiles * 4)?.address();
        }
        let params = AttentionParams {
            out: args.out.address(),
            qkv: args.qkv.address(),
            k: args.kv.k.address(),
            v: args.kv.v.address(),
            q_offsets: args.seqs.q_offsets.address(),
            context_lens: args.seqs.context_lens.address(),
            block_tables: args.seqs.block_tables.address(),
            max_blocks: args.seqs.max_blocks as i32,
            ld_qkv: qkv_width(args),
            n_heads: args.n_heads_local as i32,
            n_kv_heads: n_kv_heads as i32,
            block_size: args.layout.block_size as i32,
            window: window_of(args),
            scale: args.scale,
            padding: 0,
            partials,
            counters,
        };
        let symbol = format!("{symbol}_{}", suffix(args.qkv.dtype));
        let threads = self.kernels.get("attention_decode", &symbol)?.threads;
        let grid = [splits as u32, (n_kv_heads * tiles) as u32, n_seqs as u32];
        self.start(("attention_decode", &symbol), grid, threads, &params)
    }

    fn attention_prefill(&mut self, args: &AttentionArgs<'_, Self>) -> Result<()> {
        let n_seqs = args.seqs.n_seqs;
        let is_hopper = self.context.info().capability == (9, 0);
        let what = "order of attention's work";
        let (scratch, n_bytes) = (&mut self.scratch, size_of::<u32>());
        let memory = (&mut scratch.next, &mut scratch.outgrown);
        let next = grown(memory, &self.context, what, n_bytes)?.address();
        let box_rows = 1 << args.layout.block_size.trailing_zeros().min(7);
        let params = PrefillParams {
            out: args.out.address(),
            qkv: args.qkv.address(),
            k: args.kv.k.address(),
            v: args.kv.v.address(),
            q_offsets: args.seqs.q_offsets.address(),
            context_lens: args.seqs.context_lens.address(),
            block_tables: args.seqs.block_tables.address(),
            max_blocks: args.seqs.max_blocks as i32,
            ld_qkv: qkv_width(args),
            n_heads: args.n_heads_local as i32,
            n_kv_heads: args.layout.n_kv_heads_local as i32,
            block_size: args.layout.block_size as i32,
            window: window_of(args),
            scale: args.scale,
            n_seqs: n_seqs as i32,
            next,
            box_rows,
            padding: 0,
        };
        if is_hopper {
            return self.attention_prefill_hopper(args, &params);
        }
        let symbol = format!("attention_prefill_d{}_{}", args.layout.d_head, suffix(args.qkv.dtype));
        let tile_rows = self.kernels.get("attention_prefill", &symbol)?.rows as usize;
        // Every sequence may end in a tile that is not full.
        let tiles = (args.seqs.rows / tile_rows + n_seqs) * args.n_heads_local;
        self.start(("attention_prefill", &symbol), [tiles as u32, 1, 1], PREFILL_THREADS, &params)
    }

    fn attention_prefill_hopper(
        &mut self,
        args: &AttentionArgs<'_, Self>,
        params: &PrefillParams,
    ) -> Result<()> {
        let (d_head, seqs) = (args.layout.d_head, &args.seqs);
        let symbol = format!("attention_prefill_hopper_d{d_head}_{}", suffix(args.qkv.dtype));
        let kernel = self.kernels.get("attention_prefill_hopper", &symbol)?;
        let columns = params.ld_qkv as usize;
        let queries = self.context.tensor_map(&TensorMapSpec {
            address: params.qkv,
            rows: seqs.rows,
            columns,
            ld: columns,
            box_rows: kernel.rows,
            box_columns: 64,
            reads_ahead: true,
        })?;
        let rows = args.kv.k.len() / d_head;
        let cache = |address| {
            let (atom, box_rows) = (kernel.atom, params.box_rows as u32);
            self.context.cache_map(&CacheMapSpec { address, rows, d_head, atom, box_rows })
        };
        let (keys, values) = (cache(params.k)?, cache(params.v)?);
        let tiles = (seqs.rows / kernel.rows as usize + seqs.n_seqs) * args.n_heads_local;
        let blocks = tiles.min(self.context.info().n_sms) as u32;
        // A group of four warps has 64 rows, and four more warps ask.
        let launch = kernel.function.over([blocks, 1, 1], 128 * (kernel.rows / 64 + 1));
        self.launch(kernel, &launch, params, &[&queries, &keys, &values])
    }

    fn attention_any(&mut self, args: &AttentionArgs<'_, Self>) -> Result<()> {
        if args.layout.d_head > ANY_HEAD_MAX {
            return unsupported("attend with heads of more than 256 elements");
        }
        let params = AttentionAnyParams {
            out: args.out.address(),
            qkv: args.qkv.address(),
            k: args.kv.k.address(),
            v: args.kv.v.address(),
            q_offsets: args.seqs.q_offsets.address(),
            context_lens: args.seqs.context_lens.address(),
            block_tables: args.seqs.block_tables.address(),
            n_seqs: args.seqs.n_seqs as i32,
            max_blocks: args.seqs.max_blocks as i32,
            ld_qkv: qkv_width(args),
            n_heads: args.n_heads_local as i32,
            n_kv_heads: args.layout.n_kv_heads_local as i32,
            d_head: args.layout.d_head as i32,
            block_size: args.layout.block_size as i32,
            window: window_of(args),
            scale: args.scale,
            padding: 0,
        };
        let grid = [args.seqs.rows as u32, args.n_heads_local.div_ceil(ANY_WARPS) as u32, 1];
        let symbol = format!("attention_any_{}", suffix(args.qkv.dtype));
        self.start(("attention_any", &symbol), grid, 32 * ANY_WARPS as u32, &params)
    }
}
