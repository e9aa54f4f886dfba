//! The decoder, written once: a straight line of steps over any [`Backend`], one rank's part of any split.
//!
//! GPT-3 and its published relatives differ in values ([`BlockSpec`](dist_core::BlockSpec)), never in the path taken
//! through this file.

mod load;
mod products;

use std::time::Duration;

use dist_comm::{CallName, Comm};
use dist_core::{Activation, KvLayout, ModelConfig, NormPosition, Rank};
use dist_kernels::Backend;
use dist_kernels::args::{
    AddBiasNormArgs, AppendKv, AttentionArgs, EmbedArgs, Epilogue, GatherRowsArgs, K_SEGMENTS, KvLayer,
    LinearArgs, LogitsArgs, Lookup, Norm, Prologue, Ragged, Residual, Then,
};
use dist_kernels::weight::Weight;

use crate::runner::{RunError, timed};
use crate::workspace::{StepShape, Workspace};

pub use load::{LoadError, LoadProgress, OnProgress};

/// A layer norm's vectors.
#[derive(Debug)]
struct NormWeights<B: Backend> {
    weight: B::Buf,
    bias: B::Buf,
    eps: f32,
}

impl<B: Backend> NormWeights<B> {
    fn as_norm(&self) -> Norm<'_, B> {
        Norm::Layer { weight: &self.weight, bias: &self.bias, eps: self.eps }
    }
}

/// A linear layer; the bias may be added elsewhere than the product is made.
#[derive(Debug)]
struct Projection<B: Backend> {
    weight: Weight<B::Buf>,
    bias: Option<B::Buf>,
}

/// One layer of this rank.
#[derive(Debug)]
struct Block<B: Backend> {
    norm1: NormWeights<B>,
    qkv: Projection<B>,
    proj: Projection<B>,
    norm2: NormWeights<B>,
    fc1: Projection<B>,
    fc2: Projection<B>,
    scale: f32,
    window: Option<usize>,
    /// Number of the layer in the whole model.
    idx: usize,
}

/// What comes before the first block, on the first stage.
#[derive(Debug)]
struct Tables<B: Backend> {
    positions: Weight<B::Buf>,
    project_in: Option<Weight<B::Buf>>,
}

/// What follows the last block, on the last stage.
#[derive(Debug)]
struct Head<B: Backend> {
    final_norm: Option<NormWeights<B>>,
    project_out: Option<Weight<B::Buf>>,
    /// `None`: tied to the token table.
    weight: Option<Weight<B::Buf>>,
}

/// What the blocks need to know about the model and this rank.
#[derive(Clone, Debug)]
struct Shape {
    d_model: usize,
    d_embed: usize,
    n_heads_local: usize,
    position_offset: u32,
    /// First token of this rank's part of the vocabulary.
    vocab_first: u32,
    /// Segments of the canonical order in a row-parallel part.
    k_segments: usize,
    norm_position: NormPosition,
    activation: Activation,
    kv: KvLayout,
}

/// One rank's part of a decoder.
#[derive(Debug)]
pub struct Decoder<B: Backend> {
    shape: Shape,
    /// The token table: on the first stage, and on the last one where it is the head as well.
    tokens: Option<Weight<B::Buf>>,
    tables: Option<Tables<B>>,
    blocks: Vec<Block<B>>,
    head: Option<Head<B>>,
}

/// What the forward pass works with beside the weights.
pub(crate) struct Context<'a, B: Backend> {
    /// The device.
    pub(crate) backend: &'a mut B,
    /// The ranks that share each layer.
    pub(crate) tp: &'a mut Comm,
    /// The stages, in order of their layers.
    pub(crate) pp: &'a mut Comm,
    /// The rows of the step.
    pub(crate) step: StepShape,
    /// Time that went into waiting for other ranks.
    pub(crate) waited: &'a mut Duration,
}

impl<B: Backend> Context<'_, B> {
    /// Adds the ranks' partial sums, `[rows, width]`.
    fn reduce(
        &mut self,
        partial: &mut B::Buf,
        width: usize,
        op: &'static str,
        layer: usize,
    ) -> Result<(), RunError> {
        if self.tp.world_size() == 1 {
            return Ok(());
        }
        let name = CallName::new(op).layer(layer).step(self.step.number);
        let raw = self.backend.raw(partial, self.step.rows * width);
        Ok(timed(self.waited, || self.tp.all_reduce_sum(raw, name))?)
    }
}

/// A linear layer without prologue.
fn linear<'a, B: Backend>(
    out: &'a mut B::Buf,
    x: &'a B::Buf,
    weight: &'a Weight<B::Buf>,
    (rows, k_segments): (usize, usize),
    epilogue: Epilogue<'a, B>,
) -> LinearArgs<'a, B> {
    LinearArgs { out, x, weight, rows, k_segments, prologue: Prologue::None, epilogue }
}

impl<B: Backend> Decoder<B> {
    /// Whether this rank's stage ends in the head, and so has logits.
    pub(crate) fn has_head(&self) -> bool {
        self.head.is_some()
    }

    /// Runs the step's rows through this stage: from tokens or from what the stage before sends, to logits
    /// `[n_logits, vocabulary part]` in the workspace or to the stage after.
    pub(crate) fn forward(
        &self,
        ctx: &mut Context<'_, B>,
        ws: &mut Workspace<B>,
        kv: &mut [KvLayer<B::Buf>],
    ) -> Result<(), RunError> {
        match &self.tables {
            Some(tables) => self.embed(ctx, ws, tables)?,
            None => self.receive(ctx, ws)?,
        }
        self.first_norm(ctx, ws)?;
        for (i, (block, kv)) in self.blocks.iter().zip(kv).enumerate() {
            self.attention_half(ctx, ws, block, kv)?;
            // The stages that wait for this one know that a long chunk is no standstill.
            ctx.pp.get_on();
            self.mlp_half(ctx, ws, block, self.norm_after(i))?;
            ctx.pp.get_on();
        }
        match &self.head {
            Some(head) => self.logits(ctx, ws, head),
            None => self.send(ctx, ws),
        }
    }

    /// The residual stream of the stage before.
    fn receive(&self, ctx: &mut Context<'_, B>, ws: &mut Workspace<B>) -> Result<(), RunError> {
        let (name, from) =
            (CallName::new("residual stream").step(ctx.step.number), Rank(ctx.pp.rank().0 - 1));
        let raw = ctx.backend.raw(&mut ws.hidden, ctx.step.rows * self.shape.d_model);
        Ok(timed(ctx.waited, || ctx.pp.recv(raw, from, name))?)
    }

    /// The residual stream for the stage after; it normalises for itself.
    fn send(&self, ctx: &mut Context<'_, B>, ws: &mut Workspace<B>) -> Result<(), RunError> {
        let (name, to) = (CallName::new("residual stream").step(ctx.step.number), Rank(ctx.pp.rank().0 + 1));
        let raw = ctx.backend.raw(&mut ws.hidden, ctx.step.rows * self.shape.d_model);
        Ok(timed(ctx.waited, || ctx.pp.send(raw, to, name))?)
    }

    /// `hidden = tokens[ids] + positions[pos]`; with a projection in between where the token table is narrower, and a
    /// reduction where ranks share the vocabulary.
    fn embed(
        &self,
        ctx: &mut Context<'_, B>,
        ws: &mut Workspace<B>,
        tables: &Tables<B>,
    ) -> Result<(), RunError> {
        let (s, rows) = (&self.shape, ctx.step.rows);
        let table = self.tokens.as_ref().expect("the first stage holds the token table");
        let tokens = Some(Lookup { ids: &ws.ids, table, offset: 0, first: s.vocab_first });
        let drawn = Some(&ws.drawn);
        let positions = Some(Lookup {
            ids: &ws.positions,
            table: &tables.positions,
            offset: s.position_offset,
            first: 0,
        });
        if let Some(project_in) = &tables.project_in {
            let (out, d) = (&mut ws.embedded, s.d_embed);
            ctx.backend.embed(EmbedArgs { out, rows, d, tokens, positions: None, drawn })?;
            ctx.reduce(&mut ws.embedded, d, "embedding", 0)?;
            let store = Epilogue { bias: None, then: Then::Store };
            ctx.backend.linear(linear(
                &mut ws.hidden,
                &ws.embedded,
                project_in,
                (rows, K_SEGMENTS),
                store,
            ))?;
        } else if ctx.tp.world_size() > 1 {
            let (out, d) = (&mut ws.hidden, s.d_model);
            ctx.backend.embed(EmbedArgs { out, rows, d, tokens, positions: None, drawn })?;
            ctx.reduce(&mut ws.hidden, d, "embedding", 0)?;
        } else {
            let (out, d) = (&mut ws.hidden, s.d_model);
            return Ok(ctx.backend.embed(EmbedArgs { out, rows, d, tokens, positions, drawn })?);
        }
        let (out, d) = (&mut ws.hidden, s.d_model);
        Ok(ctx.backend.embed(EmbedArgs { out, rows, d, tokens: None, positions, drawn: None })?)
    }

    /// `normed` of the first block: its norm in pre-norm models, the residual itself in post-norm ones.
    fn first_norm(&self, ctx: &mut Context<'_, B>, ws: &mut Workspace<B>) -> Result<(), RunError> {
        let norm = match self.shape.norm_position {
            NormPosition::Pre => self.blocks.first().map_or(Norm::None, |block| block.norm1.as_norm()),
            NormPosition::Post => Norm::None,
        };
        Ok(ctx.backend.add_bias_norm(AddBiasNormArgs {
            normed: &mut ws.normed,
            residual: &mut ws.hidden,
            delta: None,
            bias: None,
            norm,
            keep: Residual::Sum,
            rows: ctx.step.rows,
            d: self.shape.d_model,
        })?)
    }

    /// The norm after block `i`, fused into its last step: the next block's, the final one, or the block's own.
    fn norm_after(&self, i: usize) -> Norm<'_, B> {
        if self.shape.norm_position == NormPosition::Post {
            return self.blocks[i].norm2.as_norm();
        }
        let next = self.blocks.get(i + 1).map(|next| &next.norm1);
        let last = || self.head.as_ref().and_then(|head| head.final_norm.as_ref());
        next.or_else(last).map_or(Norm::None, NormWeights::as_norm)
    }

    fn keep(&self) -> Residual {
        match self.shape.norm_position {
            NormPosition::Pre => Residual::Sum,
            NormPosition::Post => Residual::Normed,
        }
    }

    fn attention_half(
        &self,
        ctx: &mut Context<'_, B>,
        ws: &mut Workspace<B>,
        block: &Block<B>,
        kv: &mut KvLayer<B::Buf>,
    ) -> Result<(), RunError> {
        let (s, rows) = (&self.shape, ctx.step.rows);
        let append = Then::AppendKv(AppendKv { kv: &mut *kv, layout: s.kv, slots: &ws.slots });
        let epilogue = Epilogue { bias: block.qkv.bias.as_ref(), then: append };
        ctx.backend.linear(linear(
            &mut ws.qkv,
            &ws.normed,
            &block.qkv.weight,
            (rows, K_SEGMENTS),
            epilogue,
        ))?;
        ctx.backend.attention(AttentionArgs {
            out: &mut ws.heads,
            qkv: &ws.qkv,
            kv,
            layout: s.kv,
            n_heads_local: s.n_heads_local,
            scale: block.scale,
            window: block.window,
            seqs: Ragged {
                n_seqs: ctx.step.n_seqs,
                rows,
                max_rows: ctx.step.max_rows,
                q_offsets: &ws.q_offsets,
                context_lens: &ws.context_lens,
                block_tables: &ws.block_tables,
                max_blocks: ctx.step.max_blocks,
            },
        })?;
        let store = Epilogue { bias: None, then: Then::Store };
        ctx.backend.linear(linear(
            &mut ws.delta,
            &ws.heads,
            &block.proj.weight,
            (rows, s.k_segments),
            store,
        ))?;
        ctx.reduce(&mut ws.delta, s.d_model, "attention output", block.idx)?;
        let norm = match s.norm_position {
            NormPosition::Pre => block.norm2.as_norm(),
            NormPosition::Post => block.norm1.as_norm(),
        };
        self.add_bias_norm(ctx, ws, block.proj.bias.as_ref(), norm)
    }

    fn mlp_half(
        &self,
        ctx: &mut Context<'_, B>,
        ws: &mut Workspace<B>,
        block: &Block<B>,
        next: Norm<'_, B>,
    ) -> Result<(), RunError> {
        let (s, rows) = (&self.shape, ctx.step.rows);
        let activate = Epilogue { bias: block.fc1.bias.as_ref(), then: Then::Activate(s.activation) };
        ctx.backend.linear(linear(
            &mut ws.ff,
            &ws.normed,
            &block.fc1.weight,
            (rows, K_SEGMENTS),
            activate,
        ))?;
        let store = Epilogue { bias: None, then: Then::Store };
        ctx.backend.linear(linear(&mut ws.delta, &ws.ff, &block.fc2.weight, (rows, s.k_segments), store))?;
        ctx.reduce(&mut ws.delta, s.d_model, "feed-forward output", block.idx)?;
        self.add_bias_norm(ctx, ws, block.fc2.bias.as_ref(), next)
    }

    /// `hidden += delta + bias; normed = norm(hidden)`: the end of each half of a block.
    fn add_bias_norm(
        &self,
        ctx: &mut Context<'_, B>,
        ws: &mut Workspace<B>,
        bias: Option<&B::Buf>,
        norm: Norm<'_, B>,
    ) -> Result<(), RunError> {
        Ok(ctx.backend.add_bias_norm(AddBiasNormArgs {
            normed: &mut ws.normed,
            residual: &mut ws.hidden,
            delta: Some(&ws.delta),
            bias,
            norm,
            keep: self.keep(),
            rows: ctx.step.rows,
            d: self.shape.d_model,
        })?)
    }

    /// Logits of the rows that are sampled, only those.
    fn logits(
        &self,
        ctx: &mut Context<'_, B>,
        ws: &mut Workspace<B>,
        head: &Head<B>,
    ) -> Result<(), RunError> {
        let (s, n_out) = (&self.shape, ctx.step.n_logits);
        if n_out == 0 {
            return Ok(());
        }
        ctx.backend.gather_rows(GatherRowsArgs {
            out: &mut ws.selected,
            x: &ws.normed,
            indices: &ws.logit_rows,
            n_out,
            rows: ctx.step.rows,
            d: s.d_model,
        })?;
        let x = if let Some(project_out) = &head.project_out {
            let store = Epilogue { bias: None, then: Then::Store };
            let (out, x) = (&mut ws.projected, &ws.selected);
            ctx.backend.linear(linear(out, x, project_out, (n_out, K_SEGMENTS), store))?;
            &ws.projected
        } else {
            &ws.selected
        };
        let head = head.weight.as_ref().or(self.tokens.as_ref()).expect("a tied head is the token table");
        Ok(ctx.backend.logits(LogitsArgs { out: &mut ws.logits, x, head, rows: n_out })?)
    }
}

/// What a rank of `config` needs to know to size its workspace.
pub(crate) fn local_widths(config: &ModelConfig, n_heads: usize, n_kv_heads: usize) -> (usize, usize) {
    ((n_heads + 2 * n_kv_heads) * config.d_head, n_heads * config.d_head)
}
