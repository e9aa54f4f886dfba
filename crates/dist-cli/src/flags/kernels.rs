//! Flags of `kernels`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use dist_kernels::cuda::compile::Arch;

const AFTER_HELP: &str = "\
Kernels for GPUs are compiled by NVIDIA's NVRTC when they are first needed, and
kept in DIST_KERNEL_CACHE, by default $XDG_CACHE_HOME/dist/kernels. `build` does
that beforehand; it needs NVRTC (pip install nvidia-cuda-nvrtc==13.0.88), and
neither a GPU nor a driver. GPUs of sm_86 and sm_89 run what is for sm_80; those
of sm_100 and later get kernels of their own.

Exit codes: 0 done, 1 a kernel does not compile, spills or cannot be stored, 2 a flag is wrong.

Examples:
  dist-cli kernels build
  dist-cli kernels build --arch sm_90a,sm_80 --out kernels
  dist-cli kernels list --json";

const BUILD_HELP: &str = "\
Examples:
  dist-cli kernels build
  dist-cli kernels build --arch sm_90a,sm_80 --out kernels
  dist-cli kernels build --arch sm_120
  DIST_CUDA_LIB=venv/lib/python3.12/site-packages/nvidia/cu13/lib dist-cli kernels build --json";

const LIST_HELP: &str = "\
Examples:
  dist-cli kernels list
  dist-cli kernels list --json";

/// Flags of `kernels`.
#[derive(Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct KernelsArgs {
    /// What to do with them.
    #[command(subcommand)]
    pub task: KernelsTask,
}

/// What to do with kernels.
#[derive(Subcommand, Clone, Debug)]
pub enum KernelsTask {
    /// Compiles kernels and stores them
    Build(BuildArgs),
    /// Says what is compiled for which GPUs, and what is stored
    List(ListArgs),
}

/// Flags of `kernels build`.
#[derive(Args, Clone, Debug)]
#[command(after_help = BUILD_HELP)]
pub struct BuildArgs {
    /// GPUs to compile for, by architecture: each gets all kernels that it can run; by default all that are listed
    #[arg(long, value_name = "ARCH", value_delimiter = ',', value_parser = str::parse::<Arch>)]
    pub arch: Vec<Arch>,
    /// Stores the kernels in DIR and not in the cache
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Writes one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Flags of `kernels list`.
#[derive(Args, Clone, Debug)]
#[command(after_help = LIST_HELP)]
pub struct ListArgs {
    /// Writes one JSON object
    #[arg(long)]
    pub json: bool,
}
