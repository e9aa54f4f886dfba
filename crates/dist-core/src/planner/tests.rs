//! Scenarios whose outcome can be checked by hand.

use super::*;
use crate::presets::preset;
use crate::topology::{Device, DeviceKind, Link};

const NVLINK: Link = Link { latency_s: 2.3e-6, bytes_per_s: 450e9 };

fn gpu(name: &str, memory_gb: u64, tb_per_s: f64) -> Device {
    Device {
        kind: DeviceKind::Cuda,
        name: name.to_owned(),
        host: 0,
        memory_bytes: memory_gb * 1_000_000_000,
        read_bytes_per_s: tb_per_s * 1e12,
        flops_per_s: 780e12,
        overhead: None,
    }
}

fn model(name: &str) -> ModelConfig {
    preset(name, None).expect("listed")
}

const CHAT: Workload = Workload { n_seqs: 1, prompt_len: 128, new_tokens: 128 };

fn options(max_seq_len: usize, max_seqs: usize) -> PlanOptions {
    PlanOptions {
        act_dtype: DType::BF16,
        wire_dtype: DType::F32,
        kv_dtype: DType::BF16,
        block_size: 16,
        limits: Limits { max_seq_len, max_seqs, max_batch_tokens: 2048, max_sample_rows: max_seqs },
        memory_percent: 90,
        mesh: None,
        stages: None,
        copies: false,
    }
}

fn best_mesh(report: &PlanReport) -> Mesh {
    report.best.as_ref().expect("something runs").mesh
}

#[test]
fn thirteen_billion_do_not_fit_24_gigabytes_and_it_says_why() {
    let topology = Topology::uniform(&gpu("24 GB GPU", 24, 1.0), 1, NVLINK);
    let report = plan(&model("gpt3-13b"), &topology, CHAT, &options(2048, 1)).expect("sound");
    assert_eq!((report.best, report.alternatives.len()), (None, 0));
    // 12 · 40 · 5120² parameters in the layers, 50257 · 5120 in the table, 2048 · 5120 positions, 2 bytes each; 2048 tokens of 819,200 bytes are 1.68 GB; 90 % of 24 GB.
    let told = report.rejected[0].reason.to_string();
    let start = "rank 0 needs 27.62 GB of the 21.60 GB that it may take of 24 GB GPU: weights 25.71 GB, KV cache 1.68 GB";
    assert!(told.starts_with(start), "{told}");
}

#[test]
fn two_stages_or_halves_fit_where_one_gpu_does_not() {
    let topology = Topology::uniform(&gpu("24 GB GPU", 24, 1.0), 2, NVLINK);
    let report = plan(&model("gpt3-13b"), &topology, CHAT, &options(2048, 1)).expect("sound");
    assert_eq!(best_mesh(&report), Mesh { tp: 2, pp: 1, dp: 1 });
    assert_eq!(report.alternatives[0].mesh, Mesh { tp: 1, pp: 2, dp: 1 });
    assert_eq!(report.rejected.len(), 1);
}

#[test]
fn two_h200_share_the_layers_of_a_large_model() {
    let topology = Topology::uniform(&gpu("H200", 141, 4.3), 2, NVLINK);
    let report = plan(&model("gpt3-13b"), &topology, CHAT, &options(2048, 1)).expect("sound");
    assert_eq!(best_mesh(&report), Mesh { tp: 2, pp: 1, dp: 1 });
    let meshes: Vec<Mesh> = report.alternatives.iter().map(|other| other.mesh).collect();
    assert_eq!(meshes, [Mesh::SOLO, Mesh { tp: 1, pp: 2, dp: 1 }]);
    let told = report.alternatives[0].lost.to_string();
    assert!(told.contains("slower over the workload than tp 2 × pp 1 × dp 1: TTFT"), "{told}");
}

#[test]
fn a_small_model_stays_on_one_gpu() {
    let topology = Topology::uniform(&gpu("H200", 141, 4.3), 4, NVLINK);
    let report = plan(&model("gpt3-125m"), &topology, CHAT, &options(2048, 1)).expect("sound");
    assert_eq!(best_mesh(&report), Mesh::SOLO);
}

#[test]
fn copies_win_a_small_model_with_many_requests() {
    let topology = Topology::uniform(&gpu("H100", 80, 3.1), 2, NVLINK);
    let many = Workload { n_seqs: 64, prompt_len: 1024, new_tokens: 128 };
    let copies = PlanOptions { copies: true, ..options(2048, 64) };
    let report = plan(&model("gpt3-350m"), &topology, many, &copies).expect("sound");
    assert_eq!(best_mesh(&report), Mesh { tp: 1, pp: 1, dp: 2 });
}

#[test]
fn a_slow_network_prefers_stages_to_halves() {
    let mut topology = Topology::uniform(&gpu("24 GB GPU", 24, 1.0), 2, NVLINK);
    topology.devices[1].host = 1;
    topology.other_host = Link { latency_s: 500e-6, bytes_per_s: 1e9 };
    let report = plan(&model("gpt3-13b"), &topology, CHAT, &options(2048, 1)).expect("sound");
    let best = report.best.expect("something runs");
    assert_eq!(best.mesh, Mesh { tp: 1, pp: 2, dp: 1 });
    // The head weighs about 0.8 layers: the last stage gets as many or one less.
    assert_eq!(best.stages, [20, 20]);
}

#[test]
fn the_faster_device_gets_more_layers() {
    let mut topology = Topology::uniform(&gpu("fast", 24, 2.0), 2, NVLINK);
    topology.devices[1].read_bytes_per_s = 1e12;
    let fixed = PlanOptions { mesh: Some(Mesh { tp: 1, pp: 2, dp: 1 }), ..options(2048, 1) };
    let report = plan(&model("gpt3-6.7b"), &topology, CHAT, &fixed).expect("sound");
    let stages = report.best.expect("runs").stages;
    // 32 layers at 2 : 1, less the head's one layer's worth on the slow one: 22 : 10.
    assert_eq!(stages, [22, 10]);
}

#[test]
fn the_cache_fills_the_memory_up_to_what_sequences_can_use() {
    let topology = Topology::uniform(&gpu("H100", 80, 3.1), 1, NVLINK);
    let blocks = |max_seqs| {
        let report = plan(&model("gpt3-6.7b"), &topology, CHAT, &options(2048, max_seqs)).expect("sound");
        report.best.expect("fits").kv.n_blocks
    };
    assert_eq!(blocks(2), 2 * 128);
    // 72 GB less 13.33 GB of weights and about 0.4 GB of workspace, in blocks of 8.39 MB.
    assert!((6900..7000).contains(&blocks(256)), "{}", blocks(256));
}

#[test]
fn every_mesh_is_accounted_for_once() {
    let topology = Topology::uniform(&gpu("H100", 80, 3.1), 8, NVLINK);
    let mut heads = model("gpt3-125m");
    (heads.n_heads, heads.n_kv_heads, heads.d_head) = (12, 4, 64);
    let report = plan(&heads, &topology, CHAT, &options(2048, 1)).expect("sound");
    let n = usize::from(report.best.is_some()) + report.alternatives.len() + report.rejected.len();
    assert_eq!(n, (1..=8).map(|n| (1..=n).filter(|d| n % d == 0).count()).sum::<usize>());
    let of_tp_3 = report.rejected.iter().find(|rejected| rejected.mesh.tp == 3).expect("illegal");
    let told = "12 query heads with 4 KV heads cannot be cut for tp 3: the nearest legal degrees are 2 and 4";
    assert_eq!(of_tp_3.reason.to_string(), told);
    assert_eq!(report, plan(&heads, &topology, CHAT, &options(2048, 1)).expect("sound"));
}

#[test]
fn a_mesh_or_stages_of_the_callers_are_taken_or_refused() {
    let topology = Topology::uniform(&gpu("H100", 80, 3.1), 2, NVLINK);
    let of = |mesh, stages: &[usize]| {
        let stages = (!stages.is_empty()).then(|| stages.to_vec());
        let options = PlanOptions { mesh, stages, ..options(2048, 1) };
        plan(&model("gpt3-1.3b"), &topology, CHAT, &options).expect("sound")
    };
    let report = of(Some(Mesh { tp: 4, pp: 1, dp: 1 }), &[]);
    assert_eq!(report.rejected[0].reason.to_string(), "4 ranks on 2 devices");
    assert_eq!(of(None, &[10, 14]).best.expect("runs").stages, [10, 14]);
    let told = of(Some(Mesh::SOLO), &[10, 14]).rejected[0].reason.to_string();
    assert_eq!(told, "stages [10, 14] hold 24 layers in 2 stages, the model has 24 for pp 1");
}

#[test]
fn a_request_beyond_the_model_is_an_error() {
    let topology = Topology::uniform(&gpu("H100", 80, 3.1), 1, NVLINK);
    let too_long = Workload { n_seqs: 1, prompt_len: 2000, new_tokens: 100 };
    let error = plan(&model("gpt3-1.3b"), &topology, too_long, &options(2048, 1)).expect_err("too long");
    assert_eq!(error.to_string(), "2000 prompt and 100 new tokens, the limit is 2048");
    let none = Topology { devices: Vec::new(), ..topology };
    assert!(plan(&model("gpt3-1.3b"), &none, CHAT, &options(2048, 1)).is_err());
}

#[test]
fn the_largest_preset_needs_six_of_eight_gpus() {
    let topology = Topology::uniform(&gpu("H100", 80, 3.1), 8, NVLINK);
    let report = plan(&model("gpt3-175b"), &topology, CHAT, &options(2048, 1)).expect("sound");
    // 350 GB of weights and 9.7 GB of cache; a fifth is 72 GB, all that a rank may take, before any workspace.
    let too_few = |rejected: &&Rejected| matches!(rejected.reason, Reason::Memory { .. });
    let most = report.rejected.iter().filter(too_few).map(|rejected| rejected.mesh.world_size()).max();
    assert_eq!(most, Some(5));
    assert_eq!(best_mesh(&report), Mesh { tp: 8, pp: 1, dp: 1 });
}
