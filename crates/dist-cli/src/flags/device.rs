//! Where to run.

use clap::{Args, ValueEnum};
use dist_kernels::cpu::CpuPath;

use super::numbers;
use crate::gpu::{self, DeviceChoice, GpuAsked, Usable};

/// Flags about the device.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Device to run on: `auto` or `cpu`; this version runs models on the CPU only
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = str::parse::<GpuAsked>)]
    pub device: GpuAsked,
    /// Threads that compute, shared by the ranks of a machine; by default all cores of this process
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    pub threads: Option<usize>,
    /// Instructions of the CPU; both give the same bits, `portable` many times slower
    #[arg(long, value_name = "PATH", value_enum, default_value_t = PathFlag::Auto)]
    pub cpu_path: PathFlag,
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
    /// Threads that compute, of all ranks of this machine together.
    pub threads: usize,
    /// Whether the user chose them.
    pub is_chosen: bool,
    /// Instructions.
    pub path: CpuPath,
}

impl DeviceArgs {
    /// The CPU or a GPU.
    fn choice(&self) -> anyhow::Result<DeviceChoice> {
        if !gpu::HAS_BACKEND {
            // Nothing that is found could be used, so nobody waits for a driver.
            let devices = Ok(Vec::new());
            return gpu::choose(self.device, || Usable { has_backend: false, devices, kernels: Vec::new() });
        }
        let cache = gpu::kernel_cache().ok();
        gpu::choose(self.device, || gpu::usable(&gpu::libraries(), cache.as_ref()))
    }

    /// The device, or why it cannot be had.
    pub fn to_request(&self) -> anyhow::Result<DeviceRequest> {
        self.choice()?;
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let path = match self.cpu_path {
            PathFlag::Auto => CpuPath::Auto,
            PathFlag::Avx2 => CpuPath::Avx2,
            PathFlag::Portable => CpuPath::Portable,
        };
        let threads = self.threads.unwrap_or_else(cores);
        Ok(DeviceRequest { threads, is_chosen: self.threads.is_some(), path })
    }
}
