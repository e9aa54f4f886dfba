//! Where to run.

use clap::{Args, ValueEnum};
use dist_core::{DType, DeviceKind};
use dist_kernels::cpu::CpuPath;

use super::numbers;
use crate::gpu::{self, DeviceChoice, GpuAsked};

/// Flags about the device.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Device to run on: `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes a GPU that can be used, if there is one rank
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = str::parse::<GpuAsked>)]
    pub device: GpuAsked,
    /// Type that a GPU rounds weights in f32 to, which no kernel of it takes as they are; by default bf16
    #[arg(long, value_name = "TYPE", value_enum)]
    pub cast: Option<CastFlag>,
    /// Launches every kernel of a GPU by itself, so that an error names it; by default a decode step is one launch
    #[arg(long, visible_alias = "enforce-eager")]
    pub no_graphs: bool,
    /// Threads that compute, shared by the ranks of a machine; by default all cores of this process
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    pub threads: Option<usize>,
    /// Instructions of the CPU; both give the same bits, `portable` many times slower
    #[arg(long, value_name = "PATH", value_enum, default_value_t = PathFlag::Auto)]
    pub cpu_path: PathFlag,
}

/// Types of 16 bits, as flags name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CastFlag {
    /// Brain floats: the range of f32, 8 bits of precision
    Bf16,
    /// Half floats: 11 bits of precision, up to 65504
    F16,
}

/// Instructions, as flags name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PathFlag {
    /// The fastest that this machine has
    Auto,
    /// AVX2 with FMA and F16C
    Avx2,
    /// Plain Rust
    Portable,
}

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRequest {
    /// The processor or a GPU.
    pub kind: DeviceKind,
    /// The driver's number of the GPU.
    pub ordinal: usize,
    /// Whether the user named the device.
    pub is_named: bool,
    /// What a GPU makes of weights in `f32`.
    pub cast: Option<DType>,
    /// Whether a GPU may record decode steps and launch each as one.
    pub has_graphs: bool,
    /// Threads that compute, of all ranks of this machine together.
    pub threads: usize,
    /// Whether the user chose them.
    pub is_chosen: bool,
    /// Instructions.
    pub path: CpuPath,
}

impl DeviceRequest {
    /// One thread of the processor.
    pub const CPU: Self = Self {
        kind: DeviceKind::Cpu,
        ordinal: 0,
        is_named: false,
        cast: None,
        has_graphs: true,
        threads: 1,
        is_chosen: false,
        path: CpuPath::Auto,
    };
}

impl DeviceArgs {
    /// The CPU or a GPU.
    fn choice(&self) -> anyhow::Result<DeviceChoice> {
        let cache = gpu::kernel_cache().ok();
        gpu::choose(self.device, || gpu::usable(&gpu::libraries(), cache.as_ref()))
    }

    /// The device, or why it cannot be had.
    pub fn to_request(&self) -> anyhow::Result<DeviceRequest> {
        let (kind, ordinal) = match self.choice()? {
            DeviceChoice::Cpu { why, is_here } => {
                // Who has no GPU does not wonder; who has one does.
                match why {
                    Some(why) if is_here => tracing::warn!("on the CPU: {why}; see dist-cli doctor"),
                    Some(why) => tracing::info!("on the CPU: {why}"),
                    None => {}
                }
                (DeviceKind::Cpu, 0)
            }
            DeviceChoice::Cuda { ordinal } => (DeviceKind::Cuda, ordinal),
        };
        let cast = match self.cast {
            _ if kind == DeviceKind::Cpu => None,
            None | Some(CastFlag::Bf16) => Some(DType::BF16),
            Some(CastFlag::F16) => Some(DType::F16),
        };
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let path = match self.cpu_path {
            PathFlag::Auto => CpuPath::Auto,
            PathFlag::Avx2 => CpuPath::Avx2,
            PathFlag::Portable => CpuPath::Portable,
        };
        let threads = self.threads.unwrap_or_else(cores);
        let (is_named, is_chosen) = (self.device != GpuAsked::Auto, self.threads.is_some());
        let has_graphs = !self.no_graphs;
        Ok(DeviceRequest { kind, ordinal, is_named, cast, has_graphs, threads, is_chosen, path })
    }
}
