//! Plans GPT-3 6.7B on two GPUs and prints what the planner found: `cargo run -p dist-core --example plan`.

#![expect(clippy::print_stdout, reason = "an example shows what it found")]

use std::error::Error;

use dist_core::plan::Limits;
use dist_core::planner::{PlanOptions, Workload, plan};
use dist_core::{DType, Device, DeviceKind, Link, Rank, Topology, presets};

fn main() -> Result<(), Box<dyn Error>> {
    let model = presets::preset("gpt3-6.7b", None).ok_or("no such preset")?;
    let h100 = Device {
        kind: DeviceKind::Cuda,
        name: "H100".into(),
        host: 0,
        memory_bytes: 80_000_000_000,
        read_bytes_per_s: 3.13e12,
        flops_per_s: 700e12,
        overhead: None,
    };
    let nvlink = Link { latency_s: 2.3e-6, bytes_per_s: 450e9 };
    let topology = Topology::uniform(&h100, 2, nvlink);
    let workload = Workload { n_seqs: 8, prompt_len: 1024, new_tokens: 128 };
    let options = PlanOptions {
        act_dtype: DType::BF16,
        wire_dtype: DType::F32,
        kv_dtype: DType::BF16,
        block_size: 16,
        limits: Limits { max_seq_len: 2048, max_seqs: 32, max_batch_tokens: 2048, max_sample_rows: 32 },
        memory_percent: 90,
        mesh: None,
        stages: None,
        copies: true,
    };

    let report = plan(&model, &topology, workload, &options)?;
    let best = report.best.as_ref().ok_or("nothing runs")?;
    let (p, memory) = (best.predictions, best.memory(Rank(0)));
    println!("{} on 2 × {}: {}", model.name, h100.name, best.mesh);
    println!(
        "  TTFT {:.2} ms, TPOT {:.2} ms, {:.0} tokens/s",
        p.ttft_s * 1e3,
        p.tpot_s * 1e3,
        p.tokens_per_s
    );
    let [weights, kv, workspace] =
        [memory.weights, memory.kv, memory.workspace].map(|bytes| bytes as f64 / 1e9);
    println!("  rank 0: weights {weights:.2} GB, KV cache {kv:.2} GB, workspace {workspace:.2} GB");
    println!("  plan {}", best.hash());
    for other in &report.alternatives {
        println!("not {}: {}", other.mesh, other.lost);
    }
    for rejected in &report.rejected {
        println!("not {}: {}", rejected.mesh, rejected.reason);
    }
    Ok(())
}
