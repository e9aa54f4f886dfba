//! Flags of `plan`, and the request that they make.

use clap::{Args, ValueEnum};
use dist_core::plan::Limits;
use dist_core::planner::{PlanOptions, Workload};
use dist_core::{DType, Device, DeviceKind, Link, Mesh, ModelConfig, Topology};

use super::{DegreeArgs, Degrees, LimitArgs, ModelArgs, check_room, numbers};
use crate::machine;
use crate::model::ModelChoice;
use crate::problem::Problem;
use crate::session;

const AFTER_HELP: &str = "\
Nothing is loaded and no device is touched: the plan is a calculation. What is
not given of the devices is this machine's memory and the rates of a common
server, or the memory (80 GB) and the rates of an H100 with --device-kind cuda. A
GPU computes in 16 bits, and takes some time for every kernel beside its rates.
So far a GPU runs one rank alone: a plan for several GPUs is a forecast. TTFT is
that of a prompt that comes alone.

Exit codes: 0 a split was found, 1 there is none, 2 a flag is wrong.

Examples:
  dist-cli plan --model gpt3-13b --devices 2 --device-memory 24
  dist-cli plan --model gpt3-175b --device-kind cuda --devices 8 --device-memory 80 --json
  dist-cli plan --model ~/models/gpt2 --prompt-len 512 --batch 8
  dist-cli plan --model gpt3-1.3b --tp 2 --stages 10,14 --json > plan.json";

/// Flags of `plan`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
#[command(mut_arg("max_seqs", |arg| arg.help("Sequences that run at the same time; by default all of --batch")))]
pub struct PlanArgs {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// What they are: `cpu` or `cuda`
    #[arg(long, value_name = "KIND", value_enum, default_value_t = PlannedKind::Cpu, help_heading = "Devices")]
    pub device_kind: PlannedKind,
    /// Devices alike; by default as many as --tp times --pp
    #[arg(long, value_name = "N", value_parser = numbers::count, help_heading = "Devices")]
    pub devices: Option<usize>,
    /// Memory of each, in GB
    #[arg(long, value_name = "GB", value_parser = numbers::rate, help_heading = "Devices")]
    pub device_memory: Option<f64>,
    /// Rate at which each reads its memory, in GB/s; by default 30 for a CPU, 3120 for a GPU
    #[arg(long, value_name = "GB/S", value_parser = numbers::rate, help_heading = "Devices")]
    pub bandwidth: Option<f64>,
    /// Rate at which each multiplies, in TFLOP/s; by default 0.15 for a CPU, 815 for a GPU
    #[arg(long, value_name = "TFLOP/S", value_parser = numbers::rate, help_heading = "Devices")]
    pub tflops: Option<f64>,
    /// Rate between two of them, in GB/s
    #[arg(long, value_name = "GB/S", value_parser = numbers::rate, default_value = "10", help_heading = "Devices")]
    pub link_bandwidth: f64,
    /// Time of an empty exchange between two of them, in microseconds
    #[arg(long, value_name = "US", value_parser = numbers::rate, default_value = "20", help_heading = "Devices")]
    pub link_latency: f64,
    /// Only this split; a degree that is not given fills up the devices
    #[command(flatten)]
    pub degrees: DegreeArgs,
    /// Sequences that arrive at once
    #[arg(long, visible_alias = "batch-size", value_name = "N", value_parser = numbers::count, default_value = "1")]
    pub batch: usize,
    /// Tokens of each prompt
    #[arg(long, visible_alias = "input-len", value_name = "N", value_parser = numbers::count, default_value = "128")]
    pub prompt_len: usize,
    /// New tokens of each
    #[arg(long, visible_alias = "output-len", value_name = "N", value_parser = numbers::count, default_value = "128")]
    pub new_tokens: usize,
    /// How much memory to take.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Writes one JSON object
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// Kinds of devices, as flags name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlannedKind {
    /// Cores of a machine
    Cpu,
    /// NVIDIA GPUs
    Cuda,
}

/// What `plan` shall do.
#[derive(Debug)]
pub struct PlanRequest {
    /// The model.
    pub model: ModelConfig,
    /// The devices.
    pub topology: Topology,
    /// What is asked of them.
    pub workload: Workload,
    /// What is fixed.
    pub options: PlanOptions,
    /// Whether to write JSON.
    pub json: bool,
}

impl PlanArgs {
    /// Opens the model's header; every user error ends here.
    pub fn into_request(self) -> anyhow::Result<PlanRequest> {
        let degrees = self.degrees.to_degrees()?;
        let devices = self.devices(&degrees);
        let model = match self.model.to_choice()? {
            ModelChoice::Preset { config, .. } => *config,
            choice => choice.open()?.config().clone(),
        };
        let memory_bytes = match (self.device_memory, self.device_kind) {
            (Some(gb), _) => (gb * 1e9) as u64,
            (None, PlannedKind::Cpu) => machine::total_bytes().ok_or_else(|| {
                Problem::usage("this machine's memory is not known").help("give --device-memory")
            })?,
            // An H100's, as the rates are.
            (None, PlannedKind::Cuda) => 80_000_000_000,
        };
        let (kind, dtype, gb_per_s, tflops) = match self.device_kind {
            PlannedKind::Cpu => (DeviceKind::Cpu, DType::F32, 30.0, 0.15),
            // What an H100 was measured to do (`benches/results/h100-*.json`); weights in f32 become bf16 there.
            PlannedKind::Cuda => {
                let stored = model.weight_dtype;
                (DeviceKind::Cuda, if stored == DType::F32 { DType::BF16 } else { stored }, 3120.0, 815.0)
            }
        };
        let device = Device {
            kind,
            name: "device".to_owned(),
            host: 0,
            memory_bytes,
            read_bytes_per_s: self.bandwidth.unwrap_or(gb_per_s) * 1e9,
            flops_per_s: self.tflops.unwrap_or(tflops) * 1e12,
            overhead: None,
        };
        let link = Link { latency_s: self.link_latency * 1e-6, bytes_per_s: self.link_bandwidth * 1e9 };
        let max_seqs = self.limits.max_seqs.unwrap_or(self.batch);
        let running = max_seqs.min(self.batch);
        check_room(self.limits.max_batch_tokens, running)?;
        let of_device = || session::batch_tokens(kind).max(running);
        let limits = Limits {
            max_seq_len: session::max_seq_len(&self.limits, &model)?,
            max_seqs,
            max_batch_tokens: self.limits.max_batch_tokens.unwrap_or_else(of_device),
            max_sample_rows: max_seqs,
        };
        let options = PlanOptions {
            act_dtype: dtype,
            wire_dtype: dtype,
            kv_dtype: dtype,
            block_size: session::BLOCK_SIZE,
            limits,
            memory_percent: session::MEMORY_PERCENT,
            mesh: mesh(&degrees, devices)?,
            stages: degrees.stages,
            copies: false,
        };
        let (n_seqs, prompt_len, new_tokens) = (self.batch, self.prompt_len, self.new_tokens);
        Ok(PlanRequest {
            topology: Topology::uniform(&device, devices, link),
            workload: Workload { n_seqs, prompt_len, new_tokens },
            options,
            json: self.json,
            model,
        })
    }
}

impl PlanArgs {
    fn devices(&self, degrees: &Degrees) -> usize {
        self.devices.unwrap_or_else(|| degrees.tp.unwrap_or(1) * degrees.pp.unwrap_or(1))
    }
}

/// The mesh that was asked for; a degree that is not given fills up the devices.
fn mesh(degrees: &Degrees, devices: usize) -> anyhow::Result<Option<Mesh>> {
    let rest = |degree| dist_core::shape::div_exact(devices, degree).unwrap_or(0);
    let (tp, pp) = match (degrees.tp, degrees.pp) {
        (None, None) => return Ok(None),
        (Some(tp), Some(pp)) => (tp, pp),
        (Some(tp), None) => (tp, rest(tp)),
        (None, Some(pp)) => (rest(pp), pp),
    };
    if tp * pp == 0 {
        let problem = Problem::usage(format!("{devices} devices cannot be split that way"));
        return Err(problem.help("give a degree that divides --devices, or both degrees").into());
    }
    Ok(Some(Mesh { tp, pp, dp: 1 }))
}
