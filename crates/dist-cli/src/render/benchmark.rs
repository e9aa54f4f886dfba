//! Benchmarks as a table for people and as JSON for machines.

use std::fmt::Write as _;

use dist_core::cost::Work;
use dist_core::{DeviceKind, ModelConfig};
use serde::Serialize;

use super::milliseconds;
use crate::bench::{Ceilings, Measured, Origin, Quantiles, Report};
use crate::machine;

const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct ReportObject<'a> {
    schema_version: u32,
    #[serde(flatten)]
    origin: &'a Origin,
    device: DeviceObject<'a>,
    ceilings: CeilingsObject,
    model: ModelObject<'a>,
    plan: PlanObject,
    load_ms: f64,
    warmups: usize,
    repeats: usize,
    results: Vec<CellObject>,
}

#[derive(Serialize)]
struct DeviceObject<'a> {
    kind: &'static str,
    name: &'a str,
    threads: usize,
    cpu_path: &'static str,
    memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct CeilingsObject {
    read_bytes_per_s: f64,
    read_pass_bytes: u64,
    flops_per_s: f64,
}

#[derive(Serialize)]
struct ModelObject<'a> {
    name: &'a str,
    weight_dtype: &'static str,
    n_params: u64,
    #[serde(flatten)]
    shape: ShapeObject,
}

#[derive(Serialize)]
struct ShapeObject {
    n_layers: usize,
    d_model: usize,
    n_heads: usize,
    n_kv_heads: usize,
    d_head: usize,
    d_ff: usize,
    n_ctx: usize,
    n_vocab: usize,
}

#[derive(Serialize)]
struct PlanObject {
    hash: String,
    mesh: dist_core::Mesh,
    act_dtype: &'static str,
    kv_dtype: &'static str,
    limits: dist_core::plan::Limits,
}

#[derive(Serialize)]
struct CellObject {
    batch: usize,
    prompt_len: usize,
    new_tokens: usize,
    ttft_ms: Option<Quantiles>,
    tpot_ms: Option<Quantiles>,
    tokens_per_s: Option<f64>,
    decode_tokens_per_s: Option<f64>,
    decode_bytes: u64,
    /// Reading memory, around the time of this cell.
    read_bytes_per_s: f64,
    decode_bytes_per_s: Option<f64>,
    decode_share_of_read: Option<f64>,
    decode_share_of_limit: Option<f64>,
    prefill_flops_per_s: Option<f64>,
    prefill_share_of_flops: Option<f64>,
    predicted_ttft_ms: f64,
    predicted_tpot_ms: f64,
    ttft_predicted_over_measured: Option<f64>,
    tpot_predicted_over_measured: Option<f64>,
    /// Busy time over wall time, a stage each.
    stage_busy: Vec<f64>,
}

fn shape(config: &ModelConfig) -> ShapeObject {
    ShapeObject {
        n_layers: config.n_layers,
        d_model: config.d_model,
        n_heads: config.n_heads,
        n_kv_heads: config.n_kv_heads,
        d_head: config.d_head,
        d_ff: config.d_ff,
        n_ctx: config.n_ctx,
        n_vocab: config.n_vocab,
    }
}

/// Seconds that `work` takes at best.
fn least_s(work: Work, ceilings: Ceilings) -> f64 {
    (work.bytes as f64 / ceilings.read_bytes_per_s).max(work.flops as f64 / ceilings.flops_per_s)
}

fn cell_object(measured: &Measured, report: &Report) -> CellObject {
    let &Measured { cell, ref times, predictions, decode, prefill, ceilings } = measured;
    let (ttft, tpot) = (Quantiles::of(&times.ttft), Quantiles::of(&times.steps));
    let tpot_s = tpot.map(|quantiles| quantiles.p50 / 1e3);
    // A batch's prompts share steps, so that only a single one's time is that of its own work.
    let ttft_alone = ttft.filter(|_| cell.batch == 1);
    let prefill_s = ttft_alone.map(|quantiles| quantiles.p50 / 1e3);
    let round_s = Quantiles::of(&times.rounds).map(|quantiles| quantiles.p50 / 1e3);
    let bytes_per_s = tpot_s.map(|s| decode.bytes as f64 / s);
    let flops_per_s = prefill_s.map(|s| prefill.flops as f64 / s);
    let over = |predicted_s: f64, measured: Option<Quantiles>| {
        measured.map(|quantiles| predicted_s * 1e3 / quantiles.p50)
    };
    CellObject {
        batch: cell.batch,
        prompt_len: cell.prompt_len,
        new_tokens: cell.new_tokens,
        ttft_ms: ttft,
        tpot_ms: tpot,
        tokens_per_s: round_s.map(|s| (cell.batch * cell.new_tokens) as f64 / s),
        decode_tokens_per_s: tpot_s.map(|s| cell.batch.min(report.plan.limits.max_seqs) as f64 / s),
        decode_bytes: decode.bytes as u64,
        read_bytes_per_s: ceilings.read_bytes_per_s,
        decode_bytes_per_s: bytes_per_s,
        decode_share_of_read: bytes_per_s.map(|rate| rate / ceilings.read_bytes_per_s),
        decode_share_of_limit: tpot_s.map(|s| least_s(decode, ceilings) / s),
        prefill_flops_per_s: flops_per_s,
        prefill_share_of_flops: flops_per_s.map(|rate| rate / ceilings.flops_per_s),
        predicted_ttft_ms: predictions.ttft_s * 1e3,
        predicted_tpot_ms: predictions.tpot_s * 1e3,
        ttft_predicted_over_measured: over(predictions.ttft_s, ttft_alone),
        tpot_predicted_over_measured: over(predictions.tpot_s, tpot),
        stage_busy: times.stage_busy(report.plan.mesh),
    }
}

/// The report as one object.
pub fn benchmark_json(report: &Report) -> serde_json::Result<String> {
    let (plan, config) = (&report.plan, &report.plan.model);
    let is_gpu = report.device.kind == DeviceKind::Cuda;
    let object = ReportObject {
        schema_version: SCHEMA_VERSION,
        origin: &report.origin,
        device: DeviceObject {
            kind: if is_gpu { "cuda" } else { "cpu" },
            name: &report.device.name,
            threads: report.device.threads,
            cpu_path: report.device.path,
            // The host's is not that of a GPU.
            memory_bytes: if is_gpu { None } else { machine::total_bytes() },
        },
        ceilings: CeilingsObject {
            read_bytes_per_s: report.ceilings.read_bytes_per_s,
            read_pass_bytes: report.ceilings.pass_bytes,
            flops_per_s: report.ceilings.flops_per_s,
        },
        model: ModelObject {
            name: &report.model,
            weight_dtype: config.weight_dtype.name(),
            n_params: config.n_params(),
            shape: shape(config),
        },
        plan: PlanObject {
            hash: plan.hash().to_string(),
            mesh: plan.mesh,
            act_dtype: plan.act_dtype.name(),
            kv_dtype: plan.kv.dtype.name(),
            limits: plan.limits,
        },
        load_ms: milliseconds(report.load),
        warmups: report.warmups,
        repeats: report.repeats,
        results: report.cells.iter().map(|cell| cell_object(cell, report)).collect(),
    };
    Ok(serde_json::to_string(&object)? + "\n")
}

fn quantiles(quantiles: Option<Quantiles>) -> String {
    let told = quantiles.map(|q| format!("{:>9.2} {:>9.2} {:>9.2}", q.p50, q.p90, q.p99));
    told.unwrap_or_else(|| format!("{:>9} {:>9} {:>9}", "-", "-", "-"))
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

/// How much of the time each stage computed; two that do so at the same time come to more than 100 % together.
fn stage_lines(report: &Report) -> String {
    let (mesh, stages) = (report.plan.mesh, &report.plan.stages);
    let mut out = format!("\n{mesh}, layers a stage {stages:?}; busy time over wall time of each stage:\n");
    for Measured { cell, times, .. } in &report.cells {
        let busy =
            times.stage_busy(mesh).iter().map(|busy| format!("{:.0} %", busy * 100.0)).collect::<Vec<_>>();
        let _ = writeln!(
            out,
            "{:>5} {:>6} {:>5} | {}",
            cell.batch,
            cell.prompt_len,
            cell.new_tokens,
            busy.join(", ")
        );
    }
    out
}

/// The report for people; the lines below the table are part of it.
pub fn benchmark_table(report: &Report) -> String {
    let mut out = format!(
        "{:>5} {:>6} {:>5} | {:^29} | {:^29} | {:>9} | {:>7} {:>6} {:>6} | {:>7} | {:^11}\n",
        "batch",
        "prompt",
        "new",
        "TTFT ms p50 p90 p99",
        "TPOT ms p50 p90 p99",
        "tok/s",
        "GB/s",
        "% read",
        "% best",
        "GFLOP/s",
        "plan/ran"
    );
    for measured in &report.cells {
        let cell = cell_object(measured, report);
        let percent = |share: Option<f64>| number(share.map(|share| share * 100.0), 0);
        let _ = writeln!(
            out,
            "{:>5} {:>6} {:>5} | {} | {} | {:>9} | {:>7} {:>6} {:>6} | {:>7} | {:>5} {:>5}",
            cell.batch,
            cell.prompt_len,
            cell.new_tokens,
            quantiles(cell.ttft_ms),
            quantiles(cell.tpot_ms),
            number(cell.tokens_per_s, 1),
            number(cell.decode_bytes_per_s.map(|rate| rate / 1e9), 2),
            percent(cell.decode_share_of_read),
            percent(cell.decode_share_of_limit),
            number(cell.prefill_flops_per_s.map(|rate| rate / 1e9), 1),
            number(cell.ttft_predicted_over_measured, 2),
            number(cell.tpot_predicted_over_measured, 2),
        );
    }
    if report.plan.mesh.world_size() > 1 {
        out.push_str(&stage_lines(report));
    }
    let (device, origin) = (&report.device, &report.origin);
    let rates = || report.cells.iter().map(|cell| cell.ceilings.read_bytes_per_s / 1e9);
    let _ = write!(
        out,
        "\nGB/s: bytes that a decode step must read over TPOT p50; % read: of what this machine reads, {:.1} to {:.1} \
         GB/s around these cells; % best: of what reading and multiplying ({:.0} GFLOP/s) allow together\n\
         GFLOP/s: of taking in a single prompt; plan/ran: foretold over measured TTFT (of a single prompt) and TPOT\n\
         model={} dtype={} device=\"{}\" threads={} path={} commit={} date={} command=\"{}\"\n",
        rates().fold(f64::MAX, f64::min),
        rates().fold(0.0, f64::max),
        report.ceilings.flops_per_s / 1e9,
        report.model,
        report.plan.model.weight_dtype.name(),
        device.name,
        device.threads,
        device.path,
        origin.commit,
        origin.date,
        origin.command,
    );
    out
}
