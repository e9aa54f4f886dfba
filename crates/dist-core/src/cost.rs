//! What a step costs, from shapes alone: bytes read, floating-point operations and exchanges, and the seconds that these
//! take on given devices.
//!
//! The formulas are the usual roofline ones: a phase takes the longer of (bytes over read rate) and (operations over
//! compute rate), then what its kernels take beside that ([`Overhead`](crate::topology::Overhead)), then its exchanges. On
//! a CPU there is no such overhead and activations are left out, so that a prediction is a floor; how far a measurement
//! stays above it is the measurement's business to say.

use crate::shape::div_ceil;
use crate::topology::{Link, Topology};
use crate::{Coord, DType, Mesh, ModelConfig, Owner, Plan, Rank, decoder_specs};

/// Bytes read and floating-point operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Work {
    /// Bytes read from the device's memory.
    pub bytes: u128,
    /// Operations; a multiplication and an addition count two.
    pub flops: u128,
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

/// One kind of exchange of a step between the ranks that share a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// How many of them.
    pub count: u128,
    /// Bytes of one rank's part.
    pub bytes: u128,
    /// What it does.
    pub kind: ExchangeKind,
}

/// What an exchange does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExchangeKind {
    /// All ranks end with the sum.
    AllReduce,
    /// All ranks end with all parts.
    AllGather,
    /// To the next stage.
    Send,
}

/// What the busiest rank of one pipeline stage does in a step, term by term.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct StageWork {
    /// Matrices of the layers.
    pub weights: Work,
    /// Keys and values, and the products with them.
    pub kv: Work,
    /// The head, and the projections beside it.
    pub head: Work,
    /// Norms and biases.
    pub norms: Work,
    /// Kernels, where a device has such: each of its ranks launches as many.
    pub launches: usize,
    /// Between ranks.
    pub exchanges: Vec<Exchange>,
}

impl StageWork {
    /// All terms but the exchanges.
    #[must_use]
    pub fn total(&self) -> Work {
        self.weights + self.kv + self.head + self.norms
    }
}

/// A step of `n_seqs` sequences alike: each adds `rows` tokens to `context` ones that are cached already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Sequences.
    pub n_seqs: usize,
    /// New tokens of each: 1 in decode.
    pub rows: usize,
    /// Tokens of each before them.
    pub context: usize,
    /// Rows whose logits are wanted.
    pub n_logits: usize,
}

impl StepShape {
    /// A decode step: each of `n_seqs` sequences adds a token to `context` others.
    #[must_use]
    pub const fn decode(n_seqs: usize, context: usize) -> Self {
        Self { n_seqs, rows: 1, context, n_logits: n_seqs }
    }

    /// Prefill of `n_seqs` whole prompts.
    #[must_use]
    pub const fn prefill(n_seqs: usize, prompt_len: usize) -> Self {
        Self { n_seqs, rows: prompt_len, context: 0, n_logits: n_seqs }
    }
}

/// What a split of a model costs. Borrowed values only: build one where it is needed.
#[derive(Clone, Copy, Debug)]
pub struct CostModel<'a> {
    /// The model.
    pub model: &'a ModelConfig,
    /// The degrees.
    pub mesh: Mesh,
    /// Layers of each stage.
    pub stages: &'a [usize],
    /// Type of activations, sent between stages.
    pub act_dtype: DType,
    /// Type of partial sums.
    pub wire_dtype: DType,
    /// Type of keys and values.
    pub kv_dtype: DType,
}

impl<'a> CostModel<'a> {
    /// That of a plan.
    #[must_use]
    pub fn of(plan: &'a Plan) -> Self {
        Self {
            model: &plan.model,
            mesh: plan.mesh,
            stages: &plan.stages,
            act_dtype: plan.act_dtype,
            wire_dtype: plan.wire_dtype,
            kv_dtype: plan.kv.dtype,
        }
    }

    /// What the busiest rank of each stage does in a step.
    #[must_use]
    pub fn step(&self, shape: StepShape) -> Vec<StageWork> {
        let parts = Parts::of(self.model, self.mesh.tp);
        let mut first_layer = 0;
        let mut works = Vec::with_capacity(self.stages.len());
        for (stage, &n_layers) in self.stages.iter().enumerate() {
            works.push(self.stage(stage, first_layer..first_layer + n_layers, shape, &parts));
            first_layer += n_layers;
        }
        works
    }

    fn stage(
        &self,
        stage: usize,
        layers: std::ops::Range<usize>,
        shape: StepShape,
        parts: &Parts,
    ) -> StageWork {
        let (m, last) = (self.model, stage + 1 == self.stages.len());
        let rows = (shape.n_seqs * shape.rows) as u128;
        let n_layers = layers.len() as u128;
        let product = |elements: u128, rows: u128| 2 * elements * rows;
        let weights = Work {
            bytes: n_layers * parts.layer_matrices * parts.weight_bytes,
            flops: n_layers * product(parts.layer_matrices, rows),
        };
        let norms = Work {
            bytes: (n_layers * parts.layer_vectors + u128::from(last) * parts.head_vectors)
                * parts.weight_bytes,
            flops: 0,
        };
        let mut kv = Work::default();
        for layer in layers {
            let (reached, pairs) = attended(shape, m.windows[layer]);
            let token = (2 * parts.n_kv_heads * m.d_head * self.kv_dtype.bytes()) as u128;
            kv.bytes += shape.n_seqs as u128 * reached * token;
            kv.flops += shape.n_seqs as u128 * pairs * (4 * parts.n_heads * m.d_head) as u128;
        }
        let n_logits = if last { shape.n_logits as u128 } else { 0 };
        let head = Work {
            bytes: if n_logits > 0 { parts.head * parts.weight_bytes } else { 0 },
            flops: product(parts.head, n_logits),
        };
        let exchanges = self.exchanges(stage, n_layers, rows, n_logits);
        let launches = self.launches(stage, n_layers as usize, n_logits > 0);
        StageWork { weights, kv, head, norms, launches, exchanges }
    }

    /// A layer is queries, keys and values, attention, a projection, a norm, two products, a norm. Before the layers go the
    /// step's arrays, the embedding and a norm, after them the rows that draw, logits, the draw and its way back; narrow
    /// embeddings are projected on both ends, and positions added after.
    fn launches(&self, stage: usize, n_layers: usize, draws: bool) -> usize {
        let is_narrow = usize::from(self.model.d_embed != self.model.d_model);
        let first = if stage == 0 { 2 + 2 * is_narrow } else { 0 };
        let last = if draws { 4 + is_narrow } else { 0 };
        1 + first + 7 * n_layers + last
    }

    /// Two sums a layer, one of the embedding; the logits' parts; the residual stream to the next stage.
    fn exchanges(&self, stage: usize, n_layers: u128, rows: u128, n_logits: u128) -> Vec<Exchange> {
        let mut exchanges = Vec::new();
        let row = |width: usize, dtype: DType| rows * (width * dtype.bytes()) as u128;
        if self.mesh.tp > 1 {
            let (kind, bytes) = (ExchangeKind::AllReduce, row(self.model.d_model, self.wire_dtype));
            exchanges.push(Exchange { count: 2 * n_layers, bytes, kind });
            if stage == 0 {
                let bytes = row(self.model.d_embed, self.wire_dtype);
                exchanges.push(Exchange { count: 1, bytes, kind });
            }
            if n_logits > 0 {
                let vocab_local = div_ceil(self.model.n_vocab, self.mesh.tp) as u128;
                let bytes = n_logits * vocab_local * DType::F32.bytes() as u128;
                exchanges.push(Exchange { count: 1, bytes, kind: ExchangeKind::AllGather });
            }
        }
        if stage + 1 < self.stages.len() {
            let bytes = row(self.model.d_model, self.act_dtype);
            exchanges.push(Exchange { count: 1, bytes, kind: ExchangeKind::Send });
        }
        exchanges
    }

    /// Seconds that each stage needs for a step, its exchanges included, in data-parallel copy `dp`.
    #[must_use]
    pub fn stage_seconds(&self, topology: &Topology, dp: usize, shape: StepShape) -> Vec<f64> {
        let seconds = |(stage, work): (usize, StageWork)| {
            let ranks: Vec<usize> =
                (0..self.mesh.tp).map(|tp| self.mesh.rank(Coord { tp, pp: stage, dp }).0).collect();
            let compute = ranks.iter().map(|&rank| {
                let (device, total) = (&topology.devices[rank], work.total());
                let overhead = device.overhead();
                let flops_per_s = device.flops_per_s * overhead.product_share;
                let limit =
                    (total.bytes as f64 / device.read_bytes_per_s).max(total.flops as f64 / flops_per_s);
                limit + overhead.seconds(work.launches, shape.n_seqs * shape.rows)
            });
            let exchanges = work.exchanges.iter().map(|exchange| {
                let link = match exchange.kind {
                    ExchangeKind::Send => self.link_to_next(topology, &ranks),
                    _ => topology.worst_link(&ranks),
                };
                link.map_or(0.0, |link| exchange.seconds(self.mesh.tp, link))
            });
            compute.fold(0.0, f64::max) + exchanges.sum::<f64>()
        };
        self.step(shape).into_iter().enumerate().map(seconds).collect()
    }

    fn link_to_next(&self, topology: &Topology, ranks: &[usize]) -> Option<Link> {
        let next = |&rank: &usize| {
            let Coord { tp, pp, dp } = self.mesh.coord(Rank(rank));
            self.mesh.rank(Coord { tp, pp: pp + 1, dp }).0
        };
        ranks.iter().map(|rank| topology.link(*rank, next(rank))).reduce(Link::worst)
    }
}

impl Exchange {
    /// Seconds of all of them between `n` ranks whose worst link is `link`.
    ///
    /// A sum takes the better of two ways: everybody sends all to everybody, or everybody sends each its share and gets
    /// the sums back, which has two latencies and moves less.
    #[must_use]
    pub fn seconds(self, n: usize, link: Link) -> f64 {
        let (bytes, others) = (self.bytes as f64, (n - 1) as f64);
        let one = match self.kind {
            ExchangeKind::AllReduce => {
                let shares = 2.0 * link.seconds(bytes * others / n as f64);
                link.seconds(bytes * others).min(shares)
            }
            ExchangeKind::AllGather => link.seconds(bytes * others),
            ExchangeKind::Send => link.seconds(bytes),
        };
        self.count as f64 * one
    }
}

/// For one sequence: cached tokens that a layer's attention reads, and (query, key) pairs that it multiplies.
fn attended(shape: StepShape, window: Option<usize>) -> (u128, u128) {
    let (rows, context) = (shape.rows as u128, shape.context as u128);
    let end = context + rows;
    // Row i, counted from one, sees context + i positions, at most `window` of them.
    let window = window.map_or(end, |window| (window as u128).min(end));
    let growing = window.saturating_sub(context).min(rows);
    let pairs = growing * context + growing * (growing + 1) / 2 + (rows - growing) * window;
    let reached = (window + rows - 1).min(end);
    (reached, pairs)
}

/// Elements that the busiest of `tp` ranks holds.
struct Parts {
    layer_matrices: u128,
    layer_vectors: u128,
    head_vectors: u128,
    head: u128,
    n_heads: usize,
    n_kv_heads: usize,
    weight_bytes: u128,
}

impl Parts {
    /// Of rank 0, which has the longest share of every cut.
    fn of(model: &ModelConfig, tp: usize) -> Self {
        let one_layer = ModelConfig { n_layers: 1, windows: vec![None], ..model.clone() };
        let mut parts = Self {
            layer_matrices: 0,
            layer_vectors: 0,
            head_vectors: 0,
            head: 0,
            n_heads: 0,
            n_kv_heads: 0,
            weight_bytes: model.weight_dtype.bytes() as u128,
        };
        for spec in decoder_specs(&one_layer) {
            let shape = spec.local_shape(tp, 0);
            let n: u128 = shape.iter().product::<usize>() as u128;
            match (spec.owner, shape.len()) {
                (Owner::Layer(_), 1) => parts.layer_vectors += n,
                (Owner::Layer(_), _) => parts.layer_matrices += n,
                (Owner::Head, 1) => parts.head_vectors += n,
                (Owner::Head, _) => parts.head += n,
                (Owner::Embed, _) if model.tied_head && spec.name == crate::plan::TOKEN_TABLE => {
                    parts.head += n;
                }
                (Owner::Embed, _) => {}
            }
        }
        (parts.n_heads, parts.n_kv_heads) = crate::plan::heads_local(model, tp, 0);
        parts
    }
}

#[cfg(test)]
mod tests;
