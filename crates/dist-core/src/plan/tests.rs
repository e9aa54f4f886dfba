//! The plan's promises: hashed fields, checked input, what ranks hold.

use super::*;
use crate::presets::preset;

fn plan() -> Plan {
    Plan {
        schema_version: SCHEMA_VERSION,
        model: preset("gpt3-125m", None).expect("listed"),
        mesh: Mesh { tp: 2, pp: 2, dp: 1 },
        stages: vec![5, 7],
        act_dtype: DType::BF16,
        wire_dtype: DType::F32,
        kv: KvPlan { dtype: DType::BF16, block_size: 16, n_blocks: 128 },
        limits: Limits { max_seq_len: 2048, max_seqs: 4, max_batch_tokens: 512, max_sample_rows: 4 },
        predictions: Predictions { ttft_s: 0.1, tpot_s: 1.0 / 3.0, total_s: 1.0, tokens_per_s: 3.0 },
    }
}

/// A field and something that changes it.
type Change = (&'static str, fn(&mut Plan));

#[test]
fn the_hash_changes_with_each_agreed_field_and_with_no_other() {
    let agreed: [Change; 26] = [
        ("n_layers", |plan| plan.model.n_layers += 1),
        ("d_model", |plan| plan.model.d_model += 1),
        ("d_embed", |plan| plan.model.d_embed -= 1),
        ("n_heads", |plan| plan.model.n_heads += 1),
        ("n_kv_heads", |plan| plan.model.n_kv_heads = 1),
        ("d_head", |plan| plan.model.d_head += 1),
        ("d_ff", |plan| plan.model.d_ff += 1),
        ("n_ctx", |plan| plan.model.n_ctx += 1),
        ("n_vocab", |plan| plan.model.n_vocab += 1),
        ("position_offset", |plan| plan.model.position_offset = 2),
        ("norm_eps", |plan| plan.model.block.norm_eps = 1e-6),
        ("activation", |plan| plan.model.block.activation = crate::Activation::Relu),
        ("scale_attn", |plan| plan.model.block.scale_attn = false),
        ("windows", |plan| plan.model.windows[3] = Some(256)),
        ("tied_head", |plan| plan.model.tied_head = false),
        ("eos_ids", |plan| plan.model.eos_ids = vec![0]),
        ("bos_id", |plan| plan.model.bos_id = Some(0)),
        ("weight_dtype", |plan| plan.model.weight_dtype = DType::F16),
        ("mesh", |plan| plan.mesh = Mesh { tp: 2, pp: 1, dp: 2 }),
        ("stages", |plan| plan.stages = vec![6, 6]),
        ("act_dtype", |plan| plan.act_dtype = DType::F16),
        ("wire_dtype", |plan| plan.wire_dtype = DType::BF16),
        ("kv.dtype", |plan| plan.kv.dtype = DType::F32),
        ("kv.block_size", |plan| plan.kv.block_size = 32),
        ("kv.n_blocks", |plan| plan.kv.n_blocks += 1),
        ("limits", |plan| plan.limits.max_seqs += 1),
    ];
    let hash = plan().hash();
    let mut seen = vec![hash];
    for (field, change) in agreed {
        let mut plan = plan();
        change(&mut plan);
        assert!(!seen.contains(&plan.hash()), "{field} is not hashed");
        seen.push(plan.hash());
    }
    let mut other = plan();
    other.model.name = "another directory".into();
    other.predictions.ttft_s *= 2.0;
    assert_eq!(other.hash(), hash);
}

#[test]
fn a_hash_reads_as_it_prints() {
    let hash = plan().hash();
    assert_eq!(hash.to_string().parse(), Ok(hash));
    assert_eq!(hash.to_string().len(), 64);
    for bad in ["", "12", &"g".repeat(64), &"é".repeat(32)] {
        assert_eq!(bad.parse::<PlanHash>(), Err(PlanHashError));
    }
}

#[test]
fn json_gives_back_the_same_plan() {
    let plan = plan();
    let json = serde_json::to_string(&plan).expect("plain values");
    let back: Plan = serde_json::from_str(&json).expect("just written");
    assert_eq!(back, plan);
    let hash = serde_json::to_string(&plan.hash()).expect("text");
    assert_eq!(serde_json::from_str::<PlanHash>(&hash).expect("just written"), plan.hash());
}

#[test]
fn a_read_plan_is_checked() {
    let check = |pointer: &str, value: serde_json::Value, told: &str| {
        let mut json = serde_json::to_value(plan()).expect("plain values");
        *json.pointer_mut(pointer).expect("a field") = value;
        let error = serde_json::from_value::<Plan>(json).expect_err(pointer).to_string();
        assert!(error.contains(told), "{pointer}: {error}");
    };
    check("/schema_version", 9.into(), "the plan has schema version 9, this program reads 1: plan again");
    check("/model/n_layers", 0.into(), "n_layers = 0: must be 1 to 4096");
    check("/model/n_heads", 0.into(), "n_heads");
    check("/model/d_model", (1_u64 << 40).into(), "d_model");
    check("/mesh/tp", 0.into(), "mesh.tp = 0");
    check("/mesh/tp", 13.into(), "cannot be cut for tp 13: the nearest legal degree is 12");
    check("/mesh/pp", 3.into(), "hold 12 layers in 2 stages, the model has 12 for pp 3");
    check("/mesh/dp", u64::MAX.into(), "mesh.dp");
    check("/stages", vec![12, 0].into(), "stages [12, 0]");
    check("/stages", vec![u64::MAX, 13].into(), "stages");
    check("/act_dtype", "u8".into(), "act_dtype = u8: must be f32, f16 or bf16");
    check("/kv/block_size", 0.into(), "kv.block_size = 0");
    check("/kv/n_blocks", (1_u64 << 31).into(), "asks for more than 2^50");
    check("/limits/max_seq_len", 4096.into(), "limits.max_seq_len = 4096: at most the model's n_ctx");
    check("/limits/max_batch_tokens", (1_u64 << 63).into(), "limits.max_batch_tokens");
    check("/predictions/tpot_s", (-1).into(), "tpot_s = -1");
    check("/model/block/norm_position", "post".into(), "final_norm = true");
}

#[test]
fn ends_of_the_pipeline_both_hold_a_tied_table() {
    let plan = plan();
    let holders: Vec<usize> = (0..4)
        .filter(|&rank| plan.specs(Rank(rank)).iter().any(|spec| spec.name == "embed.tokens.weight"))
        .collect();
    assert_eq!(holders, [0, 1, 2, 3]);
    let three = Plan { mesh: Mesh { tp: 1, pp: 3, dp: 1 }, stages: vec![4, 4, 4], ..plan };
    let names = |rank| three.specs(Rank(rank)).into_iter().map(|spec| spec.name).collect::<Vec<_>>();
    assert!(!names(1).iter().any(|name| name.starts_with("embed")));
    assert_eq!(names(2)[..2], ["embed.tokens.weight", "layers.8.norm1.weight"]);
    assert_eq!(names(2).last().map(String::as_str), Some("final_norm.bias"));
}

#[test]
fn uneven_heads_and_segments() {
    let mut plan = plan();
    plan.mesh = Mesh { tp: 5, pp: 1, dp: 1 };
    plan.stages = vec![12];
    assert_eq!(plan.validate(), Ok(()));
    let heads: Vec<usize> = (0..5).map(|rank| plan.n_heads_local(Rank(rank))).collect();
    assert_eq!(heads, [3, 3, 2, 2, 2]);
    assert_eq!(heads[4], plan.kv_layout(Rank(4)).n_kv_heads_local);
    let segments =
        [1, 2, 3, 4, 8].map(|tp| Plan { mesh: Mesh { tp, pp: 1, dp: 1 }, ..plan.clone() }.k_segments());
    assert_eq!(segments, [8, 4, 8, 2, 1]);
}

/// 12 layers of 12 · 768² matrix elements and 13 · 768 vector ones, 50257 + 2048 rows of 768, a final norm.
#[test]
fn memory_of_one_rank_is_what_the_shapes_say() {
    let whole = Plan { mesh: Mesh::SOLO, stages: vec![12], ..plan() };
    let memory = whole.memory(Rank(0));
    let matrices = 12 * 12 * 768 * 768 + (50257 + 2048) * 768;
    assert_eq!(memory.weights, 2 * (matrices + 12 * 13 * 768 + 2 * 768));
    assert_eq!(memory.kv, 128 * 16 * 2 * 12 * 768 * 2);
    // The residual stream, its norm and the delta, q k v, heads and feed-forward rows in bf16.
    assert!(memory.workspace > 512 * 2 * (3 + 3 + 1 + 4) * 768);
}
