//! Whether the numbers of a plan fit each other; nothing that a stranger wrote may overflow or divide by zero.

use super::{K_SEGMENTS, Plan, SCHEMA_VERSION};
use crate::config::{ConfigError, NormPosition};
use crate::{DType, Mesh, ModelConfig};

/// Largest product that a plan may ask for, in elements or bytes: sums of them stay far from an overflow.
const MAX_PRODUCT: u128 = 1 << 50;

/// Most ranks of a mesh.
const MAX_WORLD: usize = 1 << 12;

/// A plan or a request for one that nothing can run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Written by another version.
    #[error("the plan has schema version {found}, this program reads {expected}: plan again")]
    Schema {
        /// Its version.
        found: u32,
        /// Ours.
        expected: u32,
    },
    /// The model itself is impossible.
    #[error("the model is impossible: {}", sentences(.0))]
    Model(Vec<ConfigError>),
    /// A number outside its bounds.
    #[error("{field} = {found}: {expected}")]
    Field {
        /// Which one.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// Heads that cannot be dealt to so many ranks.
    #[error("{n_heads} query heads with {n_kv_heads} KV heads cannot be cut for tp {tp}: {}", nearest(*.below, *.above))]
    Heads {
        /// Query heads of the model.
        n_heads: usize,
        /// KV heads of the model.
        n_kv_heads: usize,
        /// The degree.
        tp: usize,
        /// The nearest legal degree below.
        below: usize,
        /// The nearest legal degree above, if there is one.
        above: Option<usize>,
    },
    /// Stages that do not make up the model.
    #[error("stages {stages:?} hold {} layers in {} stages, the model has {n_layers} for pp {pp}", .stages.iter().sum::<usize>(), .stages.len())]
    Stages {
        /// Layers of each stage.
        stages: Vec<usize>,
        /// Layers of the model.
        n_layers: usize,
        /// Stages of the mesh.
        pp: usize,
    },
}

fn sentences(errors: &[ConfigError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn nearest(below: usize, above: Option<usize>) -> String {
    match above {
        Some(above) => format!("the nearest legal degrees are {below} and {above}"),
        None => format!("the nearest legal degree is {below}"),
    }
}

/// Whether a rank of `tp` gets at least one query head, and the KV heads that its query heads read.
///
/// With a KV head for each query head both are dealt evenly, the first ranks holding one more where they do not
/// divide. Grouped heads need whole groups on every rank, or whole ranks for every group.
fn heads_fit(model: &ModelConfig, tp: usize) -> bool {
    let (q, kv) = (model.n_heads, model.n_kv_heads);
    if q == kv {
        return tp <= q;
    }
    kv.is_multiple_of(tp) || tp.is_multiple_of(kv) && q.is_multiple_of(tp)
}

/// Whether `model` can be cut for `tp` ranks; the error names the nearest degrees for which it can.
pub fn check_tp(model: &ModelConfig, tp: usize) -> Result<(), PlanError> {
    let legal = |tp: usize| (1..=model.d_ff.min(model.n_vocab)).contains(&tp) && heads_fit(model, tp);
    if legal(tp) {
        return Ok(());
    }
    let top = tp.min(model.n_heads + 1);
    Err(PlanError::Heads {
        n_heads: model.n_heads,
        n_kv_heads: model.n_kv_heads,
        tp,
        below: (1..top).rev().find(|&below| legal(below)).unwrap_or(1),
        above: (tp + 1..=model.n_heads).find(|&above| legal(above)),
    })
}

/// The model's own check, and that products of its dimensions stay small enough to calculate with.
pub(crate) fn model(model: &ModelConfig) -> Result<(), PlanError> {
    model.check().map_err(PlanError::Model)?;
    let ends_normalised = model.block.norm_position == NormPosition::Post && model.final_norm;
    require(!ends_normalised, "final_norm", &true, "must be false where blocks end with a norm")?;
    let [layers, d, embed, d_ff, heads, kv_heads, d_head, vocab, ctx] = [
        model.n_layers,
        model.d_model,
        model.d_embed,
        model.d_ff,
        model.n_heads,
        model.n_kv_heads,
        model.d_head,
        model.n_vocab,
        model.n_ctx,
    ]
    .map(|n| n as u128);
    let layer = d * ((2 * heads + 2 * kv_heads) * d_head + 2 * d_ff + 16);
    let n_params = layers * layer + 2 * vocab * embed + 2 * d * embed + ctx * d;
    bound("n_params", n_params)?;
    float("weight_dtype", model.weight_dtype)
}

/// Everything.
pub(super) fn plan(plan: &Plan) -> Result<(), PlanError> {
    if plan.schema_version != SCHEMA_VERSION {
        return Err(PlanError::Schema { found: plan.schema_version, expected: SCHEMA_VERSION });
    }
    model(&plan.model)?;
    mesh(plan.mesh)?;
    check_tp(&plan.model, plan.mesh.tp)?;
    stages(&plan.model, plan.mesh.pp, &plan.stages)?;
    float("act_dtype", plan.act_dtype)?;
    float("wire_dtype", plan.wire_dtype)?;
    float("kv.dtype", plan.kv.dtype)?;
    sizes(plan)?;
    let p = plan.predictions;
    for (field, seconds) in
        [("ttft_s", p.ttft_s), ("tpot_s", p.tpot_s), ("total_s", p.total_s), ("tokens_per_s", p.tokens_per_s)]
    {
        require(
            seconds.is_finite() && seconds >= 0.0,
            field,
            &seconds,
            "a prediction is a number from zero on",
        )?;
    }
    Ok(())
}

/// Degrees from one to a bound.
pub(crate) fn mesh(mesh: Mesh) -> Result<(), PlanError> {
    for (field, degree) in [("mesh.tp", mesh.tp), ("mesh.pp", mesh.pp), ("mesh.dp", mesh.dp)] {
        require((1..=MAX_WORLD).contains(&degree), field, &degree, "must be 1 to 4096")?;
    }
    require(mesh.world_size() <= MAX_WORLD, "mesh", &mesh, "at most 4096 ranks")
}

/// Every layer once, at least one a stage.
pub(crate) fn stages(model: &ModelConfig, pp: usize, stages: &[usize]) -> Result<(), PlanError> {
    let total = stages.iter().try_fold(0_usize, |sum, &n| sum.checked_add(n));
    if stages.len() == pp && !stages.contains(&0) && total == Some(model.n_layers) {
        return Ok(());
    }
    // An absurd list is not repeated, and its sum may not fit.
    let told = if total.is_none() { Vec::new() } else { stages.iter().copied().take(64).collect() };
    Err(PlanError::Stages { stages: told, n_layers: model.n_layers, pp })
}

/// Whether `model` is possible and can be cut for `tp` ranks and dealt to `stages`, before there is a plan.
pub fn check_split(model: &ModelConfig, tp: usize, stages: &[usize]) -> Result<(), PlanError> {
    self::model(model)?;
    mesh(Mesh { tp, pp: stages.len(), dp: 1 })?;
    check_tp(model, tp)?;
    self::stages(model, stages.len(), stages)
}

fn sizes(plan: &Plan) -> Result<(), PlanError> {
    let (kv, limits, m) = (plan.kv, plan.limits, &plan.model);
    let positive = [
        ("kv.block_size", kv.block_size),
        ("kv.n_blocks", kv.n_blocks),
        ("limits.max_seq_len", limits.max_seq_len),
        ("limits.max_seqs", limits.max_seqs),
        ("limits.max_batch_tokens", limits.max_batch_tokens),
        ("limits.max_sample_rows", limits.max_sample_rows),
    ];
    for (field, n) in positive {
        require((1..=1 << 31).contains(&n), field, &n, "must be 1 to 2147483648")?;
    }
    require(
        limits.max_seq_len <= m.n_ctx,
        "limits.max_seq_len",
        &limits.max_seq_len,
        "at most the model's n_ctx",
    )?;
    let token = 2 * m.n_layers as u128 * m.n_kv_heads as u128 * m.d_head as u128 * kv.dtype.bytes() as u128;
    bound("kv", kv.n_blocks as u128 * kv.block_size as u128 * token)?;
    let width = (m.d_model + m.d_embed + m.d_ff + (m.n_heads + m.n_kv_heads) * m.d_head) as u128;
    bound("limits.max_batch_tokens", limits.max_batch_tokens as u128 * 4 * width)?;
    let row = (m.n_vocab + m.d_model + m.d_embed + plan.mesh.tp + super::MAX_TOP * K_SEGMENTS) as u128;
    bound("limits.max_sample_rows", limits.max_sample_rows as u128 * 4 * row)?;
    bound("limits.max_seqs", limits.max_seqs as u128 * (limits.max_seq_len as u128 + 2))
}

fn float(field: &'static str, dtype: DType) -> Result<(), PlanError> {
    require(dtype.is_float(), field, &dtype, "must be f32, f16 or bf16")
}

fn bound(field: &'static str, product: u128) -> Result<(), PlanError> {
    require(product <= MAX_PRODUCT, field, &product, "asks for more than 2^50 elements or bytes")
}

fn require(
    ok: bool,
    field: &'static str,
    found: &dyn std::fmt::Display,
    expected: &str,
) -> Result<(), PlanError> {
    if ok {
        return Ok(());
    }
    Err(PlanError::Field { field, found: found.to_string(), expected: expected.to_owned() })
}
