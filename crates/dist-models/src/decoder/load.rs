//! Brings one rank's part of a checkpoint into a backend; the only place that knows tensors by name.

use std::ops::ControlFlow;

use dist_core::plan::{Plan, TOKEN_TABLE};
use dist_core::{Coord, DType, ModelConfig, Rank, TensorSpec};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout, Weight};
use dist_kernels::{Backend, KernelError};

use super::{Block, Decoder, Head, NormWeights, Projection, Shape, Tables};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::export::cast::cast;

/// Why a decoder could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A vector whose values the type of the activations does not hold.
    #[error("{name} holds {value}, which {dtype} cannot hold")]
    Range {
        /// The vector.
        name: String,
        /// Its first such value.
        value: f32,
        /// The type.
        dtype: DType,
    },
    /// Whoever was told of the progress did not want more.
    #[error("loading was broken off after {done_bytes} of {total_bytes} bytes")]
    BrokenOff {
        /// Bytes of weights taken in so far.
        done_bytes: u64,
        /// Bytes of this rank's weights.
        total_bytes: u64,
    },
}

/// How far loading is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights taken in so far.
    pub done_bytes: u64,
    /// Bytes of this rank's weights.
    pub total_bytes: u64,
}

/// Is told after each tensor how far loading is, and says whether it goes on: a rank that loads for minutes sees so that
/// another one is gone.
pub type OnProgress<'a> = &'a mut dyn FnMut(LoadProgress) -> ControlFlow<()>;

/// Takes tensors in by their canonical names.
struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    checkpoint: &'a Checkpoint,
    specs: Vec<TensorSpec>,
    tp: usize,
    tp_rank: usize,
    vectors: DType,
    progress: OnProgress<'a>,
    state: LoadProgress,
}

impl<B: Backend> Loader<'_, B> {
    fn spec(&self, name: &str) -> Option<TensorSpec> {
        self.specs.iter().find(|spec| spec.name == name).cloned()
    }

    fn advance(&mut self, n_bytes: usize) -> Result<(), LoadError> {
        self.state.done_bytes += n_bytes as u64;
        let LoadProgress { done_bytes, total_bytes } = self.state;
        match (self.progress)(self.state) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(LoadError::BrokenOff { done_bytes, total_bytes }),
        }
    }

    /// A matrix.
    fn weight(&mut self, name: &str) -> Result<Option<Weight<B::Buf>>, LoadError> {
        let Some(spec) = self.spec(name) else { return Ok(None) };
        let host = self.checkpoint.weight(&spec, self.tp, self.tp_rank)?;
        self.take(&spec, host).map(Some)
    }

    /// The token table: on a stage that only has it as its head, from that stage's own file.
    fn token_table(&mut self, is_first: bool) -> Result<Option<Weight<B::Buf>>, LoadError> {
        let Some(spec) = self.spec(TOKEN_TABLE) else { return Ok(None) };
        let (tp, tp_rank) = (self.tp, self.tp_rank);
        let host = if is_first {
            self.checkpoint.weight(&spec, tp, tp_rank)?
        } else {
            self.checkpoint.head_table(&spec, tp, tp_rank)?
        };
        self.take(&spec, host).map(Some)
    }

    /// A vocabulary's padding rows become a part of zeros.
    fn take(&mut self, spec: &TensorSpec, mut host: HostWeight) -> Result<Weight<B::Buf>, LoadError> {
        let n_padding = spec.local_shape(self.tp, self.tp_rank)[0].saturating_sub(host.n());
        if n_padding > 0 && host.layout == Layout::Nk {
            let bytes = HostBytes::new(vec![0_u8; n_padding * host.k * host.dtype.bytes()]);
            host.parts.push(HostPart { bytes, offset: 0, n: n_padding, ld: host.k });
        }
        let n_bytes = host.n() * host.k * host.dtype.bytes();
        let weight = self.backend.prepare(host)?;
        self.advance(n_bytes)?;
        Ok(weight)
    }

    /// A matrix that this rank is known to hold.
    fn weight_there(&mut self, name: &str) -> Result<Weight<B::Buf>, LoadError> {
        Ok(self.weight(name)?.expect("decoder_specs lists every weight that a block always has"))
    }

    /// A vector, kept in the type of the activations.
    fn vector(&mut self, name: &str) -> Result<Option<B::Buf>, LoadError> {
        let Some(spec) = self.spec(name) else { return Ok(None) };
        let values = self.checkpoint.vector(&spec, self.tp, self.tp_rank)?;
        let (dtype, mut bytes) = (self.vectors, Vec::new());
        cast(bytemuck::cast_slice(&values), DType::F32, dtype, &mut bytes)
            .map_err(|value| LoadError::Range { name: name.to_owned(), value, dtype })?;
        let mut buf = self.backend.alloc(name, dtype, values.len())?;
        self.backend.upload(&mut buf, 0, &bytes)?;
        self.advance(values.len() * spec.dtype.bytes())?;
        Ok(Some(buf))
    }

    fn norm(&mut self, name: &str, eps: f32) -> Result<Option<NormWeights<B>>, LoadError> {
        let weight = self.vector(&format!("{name}.weight"))?;
        let bias = self.vector(&format!("{name}.bias"))?;
        Ok(weight.zip(bias).map(|(weight, bias)| NormWeights { weight, bias, eps }))
    }

    fn projection(&mut self, name: &str) -> Result<Projection<B>, LoadError> {
        let weight = self.weight_there(&format!("{name}.weight"))?;
        Ok(Projection { weight, bias: self.vector(&format!("{name}.bias"))? })
    }

    fn tables(&mut self) -> Result<Tables<B>, LoadError> {
        let positions = self.weight_there("embed.positions.weight")?;
        Ok(Tables { positions, project_in: self.weight("embed.project_in.weight")? })
    }

    fn head(&mut self, eps: f32) -> Result<Head<B>, LoadError> {
        let final_norm = self.norm("final_norm", eps)?;
        let project_out = self.weight("head.project_out.weight")?;
        Ok(Head { final_norm, project_out, weight: self.weight("head.weight")? })
    }

    fn block(&mut self, config: &ModelConfig, layer: usize) -> Result<Block<B>, LoadError> {
        let eps = config.block.norm_eps;
        let name = |part: &str| format!("layers.{layer}.{part}");
        let there = "decoder_specs lists both norms of every layer";
        Ok(Block {
            norm1: self.norm(&name("norm1"), eps)?.expect(there),
            qkv: self.projection(&name("attn.qkv"))?,
            proj: self.projection(&name("attn.proj"))?,
            norm2: self.norm(&name("norm2"), eps)?.expect(there),
            fc1: self.projection(&name("mlp.fc1"))?,
            fc2: self.projection(&name("mlp.fc2"))?,
            scale: config.attn_scale(layer),
            window: config.windows[layer],
            idx: layer,
        })
    }
}

impl<B: Backend> Decoder<B> {
    /// Takes in what `rank` holds under `plan`, telling `progress` after each tensor.
    pub fn load(
        backend: &mut B,
        checkpoint: &Checkpoint,
        plan: &Plan,
        rank: Rank,
        progress: OnProgress<'_>,
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config();
        let Coord { tp: tp_rank, pp: stage, .. } = plan.mesh.coord(rank);
        let tp = plan.mesh.tp;
        let specs = plan.specs(rank);
        let local = |spec: &TensorSpec| {
            spec.local_shape(tp, tp_rank).iter().product::<usize>() as u64 * spec.dtype.bytes() as u64
        };
        let total_bytes = specs.iter().map(local).sum();
        let state = LoadProgress { done_bytes: 0, total_bytes };
        let (is_first, is_last) = (stage == 0, stage + 1 == plan.mesh.pp);
        let mut loader =
            Loader { backend, checkpoint, specs, tp, tp_rank, vectors: plan.act_dtype, progress, state };
        let tokens = loader.token_table(is_first)?;
        let tables = if is_first { Some(loader.tables()?) } else { None };
        let blocks = plan.layers(stage).map(|layer| loader.block(config, layer)).collect::<Result<_, _>>()?;
        let head = if is_last { Some(loader.head(config.block.norm_eps)?) } else { None };
        checkpoint.compared()?;
        let vocab_share = config.n_vocab.div_ceil(tp);
        let shape = Shape {
            d_model: config.d_model,
            d_embed: config.d_embed,
            n_heads_local: plan.n_heads_local(rank),
            position_offset: config.position_offset as u32,
            vocab_first: (tp_rank * vocab_share) as u32,
            k_segments: plan.k_segments(),
            norm_position: config.block.norm_position,
            activation: config.block.activation,
            kv: plan.kv_layout(rank),
        };
        Ok(Self { shape, tokens, tables, blocks, head })
    }
}
