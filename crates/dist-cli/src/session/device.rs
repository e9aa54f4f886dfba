//! A backend as the commands need it: how it is opened, what it is called, what it can do.

use std::sync::Arc;
use std::time::Duration;

use dist_core::{DType, DeviceKind};
use dist_kernels::cpu::{CpuBackend, CpuOptions};
use dist_kernels::cuda::staging::StagingOptions;
use dist_kernels::cuda::{CudaBackend, CudaOptions, GemmChoice};
use dist_kernels::{Backend, KernelError};

use super::DeviceReport;
use crate::bench::Ceilings;
use crate::flags::DeviceRequest;
use crate::gpu;
use crate::launch::Launch;
use crate::machine;
use crate::problem::Problem;

/// How long idle threads spin: long enough to reach the next layer's step.
const SPIN: Duration = Duration::from_micros(50);

/// What a command runs on.
pub trait Device: Backend {
    /// Opens it.
    fn open_as(request: DeviceRequest) -> anyhow::Result<(Self, DeviceReport)>;

    /// Bytes of its own memory that are free; `None` where that is the machine's.
    fn free_bytes(&self) -> anyhow::Result<Option<u64>>;

    /// What it can do at best.
    fn ceilings(&mut self) -> anyhow::Result<Ceilings>;

    /// The rate at which it reads memory now.
    fn read_rate(&mut self) -> anyhow::Result<f64>;
}

impl Device for CpuBackend {
    fn open_as(request: DeviceRequest) -> anyhow::Result<(Self, DeviceReport)> {
        let options = CpuOptions { threads: request.threads, path: request.path, spin: SPIN };
        let backend = Self::new(options).map_err(|error| {
            Problem::failed("the CPU cannot be used as asked").help("try --cpu-path auto").because(error)
        })?;
        let described = backend.describe();
        let (name, kind, cast) = (machine::cpu_name(), DeviceKind::Cpu, None);
        let report = DeviceReport { kind, name, threads: described.threads, path: described.path, cast };
        Ok((backend, report))
    }

    fn free_bytes(&self) -> anyhow::Result<Option<u64>> {
        Ok(None)
    }

    fn ceilings(&mut self) -> anyhow::Result<Ceilings> {
        Ok(Ceilings::measure(self))
    }

    fn read_rate(&mut self) -> anyhow::Result<f64> {
        Ok(crate::bench::read_rate(self).0)
    }
}

impl Device for CudaBackend {
    fn open_as(request: DeviceRequest) -> anyhow::Result<(Self, DeviceReport)> {
        let options = CudaOptions {
            libraries: Arc::new(gpu::libraries()),
            cache: gpu::kernel_cache()?,
            ordinal: request.ordinal,
            cast: request.cast,
            staging: StagingOptions::of_cores(request.threads),
            gemm: GemmChoice::Measured,
        };
        let backend = Self::new(options).map_err(gpu_problem)?;
        let backend = if request.has_graphs { backend } else { backend.without_graphs() };
        let name = backend.describe().name.clone();
        let (kind, cast) = (DeviceKind::Cuda, request.cast);
        Ok((backend, DeviceReport { kind, name, threads: request.threads, path: "cuda", cast }))
    }

    fn free_bytes(&self) -> anyhow::Result<Option<u64>> {
        Ok(Some(self.memory()?.0 as u64))
    }

    fn ceilings(&mut self) -> anyhow::Result<Ceilings> {
        let (read_bytes_per_s, pass_bytes) = CudaBackend::read_rate(self)?;
        let flops_per_s = self.multiply_rate(DType::BF16)?;
        Ok(Ceilings { read_bytes_per_s, flops_per_s, pass_bytes })
    }

    fn read_rate(&mut self) -> anyhow::Result<f64> {
        Ok(CudaBackend::read_rate(self)?.0)
    }
}

/// One GPU serves one rank so far: several ranks run on the processor, unless a GPU was named.
pub fn for_ranks(request: DeviceRequest, launch: &Launch) -> anyhow::Result<DeviceRequest> {
    let (request, why) = for_n_ranks(request, launch.world_size())?;
    // Once for all ranks.
    if let Some(why) = why.filter(|_| !launch.is_follower()) {
        tracing::warn!("on the CPU: {why}");
    }
    Ok(request)
}

/// The device of each of `n` ranks, and why it is not the one that was found.
fn for_n_ranks(request: DeviceRequest, n: usize) -> anyhow::Result<(DeviceRequest, Option<String>)> {
    if request.kind == DeviceKind::Cpu || n == 1 {
        return Ok((request, None));
    }
    if request.is_named {
        let problem = Problem::usage(format!("--device cuda: {n} ranks, and only one can run on a GPU"));
        return Err(problem.help("leave out --tp and --pp, or use --device cpu").into());
    }
    let why = format!("{n} ranks, and only one can run on a GPU; without --tp and --pp it is taken");
    Ok((DeviceRequest { kind: DeviceKind::Cpu, cast: None, ..request }, Some(why)))
}

fn gpu_problem(error: KernelError) -> Problem {
    let help = error.help().unwrap_or_else(|| "use --device cpu".to_owned());
    Problem::failed("the GPU cannot be used").because(error).help(help)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_leave_a_gpu_alone_say_why() {
        let gpu = DeviceRequest { kind: DeviceKind::Cuda, cast: Some(DType::BF16), ..DeviceRequest::CPU };
        assert_eq!(for_n_ranks(gpu, 1).unwrap(), (gpu, None));
        assert_eq!(for_n_ranks(DeviceRequest::CPU, 4).unwrap(), (DeviceRequest::CPU, None));
        let (request, why) = for_n_ranks(gpu, 2).unwrap();
        assert_eq!(request, DeviceRequest::CPU);
        assert!(why.is_some_and(|why| why.starts_with("2 ranks, and only one can run on a GPU")));
        let refusal = for_n_ranks(DeviceRequest { is_named: true, ..gpu }, 2).unwrap_err();
        assert_eq!(crate::problem::exit_of(&refusal), crate::problem::Exit::Usage);
        assert!(crate::problem::help_of(&refusal).is_some_and(|help| help.contains("--device cpu")));
    }
}
