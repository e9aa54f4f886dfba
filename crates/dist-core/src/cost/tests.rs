//! The cost model against figures that were worked out elsewhere from the published shapes, and against sums that can be
//! done by hand.

use super::*;
use crate::presets::preset;
use crate::topology::{Device, DeviceKind, Overhead};

fn model(name: &str) -> ModelConfig {
    preset(name, None).expect("listed")
}

fn cost<'a>(model: &'a ModelConfig, tp: usize, stages: &'a [usize]) -> CostModel<'a> {
    let mesh = Mesh { tp, pp: stages.len(), dp: 1 };
    let dtype = model.weight_dtype;
    CostModel { model, mesh, stages, act_dtype: dtype, wire_dtype: dtype, kv_dtype: dtype }
}

fn gpus(n: usize, read_bytes_per_s: f64, flops_per_s: f64, latency_s: f64) -> Topology {
    let (kind, name) = (DeviceKind::Cuda, "gpu".to_owned());
    // The tables are limits: bytes and operations alone.
    let overhead = Some(Overhead::NONE);
    let device =
        Device { kind, name, host: 0, memory_bytes: 1 << 40, read_bytes_per_s, flops_per_s, overhead };
    Topology::uniform(&device, n, Link { latency_s, bytes_per_s: 450e9 })
}

#[track_caller]
fn assert_near(found: f64, reference: f64, tolerance: f64, what: &str) {
    let off = (found / reference - 1.0).abs();
    assert!(off <= tolerance, "{what}: {found} against {reference}, {:.2} % off", off * 100.0);
}

/// Name; bf16 gigabytes read a token; KV bytes a token; H100 milliseconds a token at 3.0 and 3.35 TB/s; prefill of 1024
/// and 2048 tokens in milliseconds at 790 TFLOP/s. The figures have three or four digits.
type Reference = (&'static str, f64, u128, [f64; 2], [f64; 2]);

const REFERENCES: [Reference; 5] = [
    ("gpt3-760m", 1.51, 147_456, [0.505, 0.452], [1.86, 3.91]),
    ("gpt3-1.3b", 2.62, 196_608, [0.874, 0.783], [3.26, 6.79]),
    ("gpt3-2.7b", 5.29, 327_680, [1.764, 1.580], [6.74, 13.9]),
    ("gpt3-6.7b", 13.3, 524_288, [4.434, 3.970], [17.1, 34.8]),
    ("gpt3-13b", 25.7, 819_200, [8.562, 7.668], [33.2, 67.4]),
];

#[test]
fn one_gpu_agrees_with_the_table_of_limits() {
    for (name, gigabytes, kv_bytes, decode_ms, prefill_ms) in REFERENCES {
        let model = model(name);
        let cost = cost(&model, 1, std::slice::from_ref(&model.n_layers));
        let at_zero = &cost.step(StepShape::decode(1, 0))[0];
        assert_near((at_zero.total().bytes - at_zero.kv.bytes) as f64 / 1e9, gigabytes, 0.005, name);
        assert_eq!(cost.step(StepShape::decode(1, 99))[0].kv.bytes, 100 * kv_bytes, "{name}");
        for (rate, reference) in [3.0e12, 3.35e12].into_iter().zip(decode_ms) {
            let ms = cost.stage_seconds(&gpus(1, rate, 790e12, 0.0), 0, StepShape::decode(1, 0))[0] * 1e3;
            assert_near(ms, reference, 0.002, name);
        }
        for (prompt_len, reference) in [1024, 2048].into_iter().zip(prefill_ms) {
            let shape = StepShape::prefill(1, prompt_len);
            let ms = cost.stage_seconds(&gpus(1, 3.0e12, 790e12, 0.0), 0, shape)[0] * 1e3;
            assert_near(ms, reference, 0.005, name);
        }
    }
}

#[test]
fn a_context_of_2048_costs_what_the_table_says() {
    for (name, reference_ms) in [("gpt3-1.3b", 0.134), ("gpt3-6.7b", 0.358), ("gpt3-13b", 0.559)] {
        let model = model(name);
        let cost = cost(&model, 1, std::slice::from_ref(&model.n_layers));
        let topology = gpus(1, 3.0e12, 790e12, 0.0);
        let seconds = |context| cost.stage_seconds(&topology, 0, StepShape::decode(1, context))[0];
        assert_near((seconds(2048) - seconds(0)) * 1e3, reference_ms, 0.005, name);
    }
}

/// The table counts two sums a layer; ours adds one of the embedding and one exchange of logits.
#[test]
fn two_gpus_agree_with_the_table_but_for_two_more_exchanges() {
    let rows = [
        ("gpt3-760m", [0.287, 0.368, 0.695]),
        ("gpt3-1.3b", [0.416, 0.497, 0.824]),
        ("gpt3-2.7b", [0.763, 0.872, 1.307]),
        ("gpt3-6.7b", [1.695, 1.804, 2.239]),
        ("gpt3-13b", [3.173, 3.309, 3.853]),
    ];
    for (name, reference_ms) in rows {
        let model = model(name);
        let cost = cost(&model, 2, std::slice::from_ref(&model.n_layers));
        for (latency_us, reference) in [2.3, 4.0, 10.8].into_iter().zip(reference_ms) {
            let topology = gpus(2, 4.3e12, 790e12, latency_us * 1e-6);
            let ms = cost.stage_seconds(&topology, 0, StepShape::decode(1, 0))[0] * 1e3;
            assert_near(ms - 2.0 * latency_us * 1e-3, reference, 0.01, name);
        }
    }
}

#[test]
fn attention_counts_pairs_one_by_one() {
    for (rows, context, window) in
        [(1, 0, None), (1, 7, Some(3)), (5, 4, Some(6)), (6, 0, Some(2)), (3, 9, None)]
    {
        let sees = |row: u128| {
            let all = context as u128 + row + 1;
            window.map_or(all, |window: usize| all.min(window as u128))
        };
        let pairs: u128 = (0..rows as u128).map(sees).sum();
        let oldest = (0..rows as u128).map(|row| context as u128 + row + 1 - sees(row)).min().expect("a row");
        let shape = StepShape { n_seqs: 1, rows, context, n_logits: 0 };
        let reached = (context + rows) as u128 - oldest;
        assert_eq!(attended(shape, window), (reached, pairs), "{rows} rows after {context}, {window:?}");
    }
}

#[test]
fn stages_do_together_what_one_does() {
    let model = preset("gpt3-1.3b", Some(256)).expect("listed");
    let shape = StepShape::decode(3, 1000);
    let whole = cost(&model, 1, &[24]).step(shape)[0].total();
    let parts = cost(&model, 1, &[7, 9, 8]).step(shape);
    assert_eq!(parts.iter().map(StageWork::total).fold(Work::default(), |sum, work| sum + work), whole);
    let sends: Vec<usize> = parts.iter().map(|stage| stage.exchanges.len()).collect();
    assert_eq!(sends, [1, 1, 0]);
}

#[test]
fn a_large_sum_is_shared_out() {
    let link = Link { latency_s: 1e-6, bytes_per_s: 1e9 };
    let seconds = |bytes, n| Exchange { count: 1, bytes, kind: ExchangeKind::AllReduce }.seconds(n, link);
    // 8 bytes between 4: one exchange of 24 bytes. 8 MB: two of 6 MB instead of one of 24.
    assert_near(seconds(8, 4), 1e-6 + 24e-9, 1e-9, "small");
    assert_near(seconds(8_000_000, 4), 2e-6 + 12e-3, 1e-9, "large");
}

#[test]
fn launches_of_stages_are_those_of_the_whole_and_one_more_for_arrays() {
    let model = model("gpt3-1.3b");
    let launches = |stages: &[usize]| {
        let steps = cost(&model, 1, stages).step(StepShape::decode(3, 100));
        steps.iter().map(|stage| stage.launches).collect::<Vec<_>>()
    };
    assert_eq!(launches(&[24]), [1 + 2 + 7 * 24 + 4]);
    assert_eq!(launches(&[10, 14]), [1 + 2 + 7 * 10, 1 + 7 * 14 + 4]);
}

#[test]
fn a_launch_costs_a_gpu_and_no_cpu() {
    let model = model("gpt3-1.3b");
    let cost = cost(&model, 1, std::slice::from_ref(&model.n_layers));
    let seconds = |kind, overhead, shape| {
        let mut topology = gpus(1, 3.0e12, 800e12, 0.0);
        (topology.devices[0].kind, topology.devices[0].overhead) = (kind, overhead);
        cost.stage_seconds(&topology, 0, shape)[0]
    };
    for shape in [StepShape::decode(1, 128), StepShape::decode(64, 128), StepShape::prefill(1, 1024)] {
        let limit = seconds(DeviceKind::Cuda, Some(Overhead::NONE), shape);
        assert_eq!(seconds(DeviceKind::Cpu, None, shape).to_bits(), limit.to_bits());
        assert!(seconds(DeviceKind::Cuda, None, shape) > limit + 175.0 * 1.6e-6);
    }
    let of_rows = |n| Overhead::H100.seconds(100, n);
    assert_near(of_rows(64), 100.0 * (1.6e-6 + 64.0 * 0.05e-6), 1e-9, "64 rows");
    assert_eq!(of_rows(128).to_bits(), of_rows(4096).to_bits());
}
