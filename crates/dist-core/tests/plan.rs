//! Properties of plans over random models and meshes: nothing is lost, nothing is held twice without reason.

use dist_core::plan::{KvPlan, Limits, Plan, Predictions, SCHEMA_VERSION, check_tp};
use dist_core::shape::split_even;
use dist_core::{Coord, DType, Mesh, ModelConfig, Placement, Rank, TensorSpec, presets};
use proptest::prelude::*;

/// A small decoder; `groups` query heads share a KV head.
fn model(n_layers: usize, n_kv_heads: usize, groups: usize, n_vocab: usize, tied_head: bool) -> ModelConfig {
    let base = presets::preset("gpt3-125m", None).expect("listed");
    let n_heads = n_kv_heads * groups;
    ModelConfig {
        n_layers,
        n_kv_heads,
        n_heads,
        n_vocab,
        tied_head,
        d_model: 24,
        d_embed: 24,
        d_head: 4,
        d_ff: 50,
        n_ctx: 32,
        windows: vec![None; n_layers],
        ..base
    }
}

fn plan(model: ModelConfig, mesh: Mesh) -> Plan {
    let stages = (0..mesh.pp).map(|stage| split_even(model.n_layers, mesh.pp, stage).1).collect();
    Plan {
        schema_version: SCHEMA_VERSION,
        model,
        mesh,
        stages,
        act_dtype: DType::F32,
        wire_dtype: DType::F32,
        kv: KvPlan { dtype: DType::F32, block_size: 16, n_blocks: 8 },
        limits: Limits { max_seq_len: 32, max_seqs: 2, max_batch_tokens: 32, max_sample_rows: 2 },
        predictions: Predictions { ttft_s: 0.0, tpot_s: 0.0, total_s: 0.0, tokens_per_s: 0.0 },
    }
}

prop_compose! {
    fn plans()(
        n_layers in 1_usize..9, n_kv_heads in 1_usize..9, groups in 1_usize..4, n_vocab in 8_usize..40,
        tied in any::<bool>(), tp in 1_usize..9, pp in 1_usize..5, dp in 1_usize..3,
    ) -> Plan {
        let model = model(n_layers, n_kv_heads, groups, n_vocab, tied);
        let tp = (1..=tp).rev().find(|&tp| check_tp(&model, tp).is_ok()).expect("one rank is legal");
        plan(model, Mesh { tp, pp: pp.min(n_layers), dp })
    }
}

proptest! {
    #[test]
    fn stages_cover_every_layer_once(plan in plans()) {
        prop_assert_eq!(plan.validate(), Ok(()));
        let layers: Vec<usize> = (0..plan.mesh.pp).flat_map(|stage| plan.layers(stage)).collect();
        prop_assert_eq!(layers, (0..plan.model.n_layers).collect::<Vec<_>>());
    }

    /// Every byte of every tensor is held by some rank of each copy; bytes of cut tensors by one rank of a stage, but for
    /// shared KV heads.
    #[test]
    fn every_tensor_has_owners(plan in plans()) {
        let Mesh { tp, pp, dp } = plan.mesh;
        for copy in 0..dp {
            for spec in dist_core::decoder_specs(&plan.model) {
                let holds = |tp_rank: usize, stage: usize| {
                    plan.specs(plan.mesh.rank(Coord { tp: tp_rank, pp: stage, dp: copy })).contains(&spec)
                };
                let stages: Vec<usize> = (0..pp).filter(|&stage| holds(0, stage)).collect();
                let both_ends = spec.name == "embed.tokens.weight" && plan.model.tied_head && pp > 1;
                prop_assert_eq!(stages.len(), if both_ends { 2 } else { 1 }, "{}", &spec.name);
                prop_assert!(stages.iter().all(|&stage| (0..tp).all(|rank| holds(rank, stage))));
                let held = |rank| spec.byte_ranges(tp, rank).iter().map(ExactSizeIterator::len).sum::<usize>();
                let total: usize = (0..tp).map(held).sum();
                match &spec.placement {
                    Placement::Replicated => prop_assert_eq!(total, tp * spec.n_bytes()),
                    Placement::Sharded { parts, .. } => {
                        let shared = |part: &dist_core::Part| part.replicate_if_short && part.len / part.unit < tp;
                        prop_assert!(total == spec.n_bytes() || parts.iter().any(shared) && total > spec.n_bytes());
                    }
                }
            }
        }
    }

    /// What a rank's specs add up to, vectors kept in f32, is the weights' line of its memory.
    #[test]
    fn memory_counts_what_the_specs_say(plan in plans()) {
        let Mesh { tp, .. } = plan.mesh;
        for rank in (0..plan.mesh.world_size()).map(Rank) {
            let bytes = |spec: &TensorSpec| {
                let shape = spec.local_shape(tp, plan.mesh.coord(rank).tp);
                shape.iter().product::<usize>() * if shape.len() == 1 { 4 } else { spec.dtype.bytes() }
            };
            let total: usize = plan.specs(rank).iter().map(bytes).sum();
            prop_assert_eq!(plan.memory(rank).weights, total as u64);
        }
    }

    /// The heads that a rank computes are those whose keys and values it holds.
    #[test]
    fn query_heads_meet_their_kv_heads(plan in plans()) {
        let m = &plan.model;
        let specs = dist_core::decoder_specs(m);
        let qkv = specs.iter().find(|spec| spec.name.ends_with("attn.qkv.weight")).expect("every layer has it");
        for tp_rank in 0..plan.mesh.tp {
            let slice = qkv.slice(plan.mesh.tp, tp_rank);
            let d_heads = m.n_heads * m.d_head;
            let heads = |range: &std::ops::Range<usize>, base: usize| {
                (range.start - base) / m.d_head..(range.end - base) / m.d_head
            };
            let (q, kv) = (heads(&slice.ranges[0], 0), heads(&slice.ranges[1], d_heads));
            prop_assert!(!q.is_empty() && q.len() % kv.len() == 0);
            // Local query head i reads local KV head i / (q / kv): the same pair as in the whole model.
            for (local, global) in q.clone().enumerate() {
                let wanted = global / (m.n_heads / m.n_kv_heads);
                prop_assert_eq!(kv.start + local / (q.len() / kv.len()), wanted);
            }
        }
    }

    #[test]
    fn a_plan_survives_json(plan in plans()) {
        let json = serde_json::to_string(&plan).expect("plain values");
        let back: Plan = serde_json::from_str(&json).expect("just written");
        prop_assert_eq!(back.hash(), plan.hash());
        prop_assert_eq!(back, plan);
    }
}
