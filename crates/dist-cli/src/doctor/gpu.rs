//! NVIDIA's driver, GPUs and libraries: what there is, and for what is missing where it was looked for.

use std::fs;
use std::path::{Path, PathBuf};

use dist_kernels::cuda::compile::Compiler;
use dist_kernels::cuda::driver::{Context, CudaError, DeviceInfo, Driver};
use dist_kernels::cuda::libraries::{Libraries, LibraryError, Version};
use serde::{Deserialize, Serialize};

use crate::gpu;

/// A library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    /// Its name.
    pub name: String,
    /// The file that was opened.
    pub path: Option<PathBuf>,
    /// What it says of its version.
    pub version: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<Trouble>,
}

/// What is wrong, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// One line.
    pub what: String,
    /// The next step.
    pub help: Option<String>,
}

impl From<CudaError> for Trouble {
    fn from(error: CudaError) -> Self {
        Self { what: error.to_string(), help: error.help() }
    }
}

impl From<LibraryError> for Trouble {
    fn from(error: LibraryError) -> Self {
        Self { what: error.to_string(), help: Some(error.help()) }
    }
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What the driver says of it.
    #[serde(flatten)]
    pub info: DeviceInfo,
    /// Memory that is free.
    pub free_bytes: Option<usize>,
    /// Why it cannot be used.
    pub problem: Option<Trouble>,
    /// Why there are no kernels for it.
    pub missing_kernels: Option<String>,
}

/// GPUs of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// The kernel driver's version.
    pub driver: Option<String>,
    /// All that the driver sees.
    pub devices: Vec<Device>,
    /// Why it sees none.
    pub problem: Option<Trouble>,
    /// What is used of NVIDIA's libraries, found or not.
    pub libraries: Vec<Library>,
    /// Folders that were looked through beside what the loader knows.
    pub searched: Vec<PathBuf>,
    /// Where compiled kernels are kept.
    pub kernel_cache: Option<PathBuf>,
}

impl Gpu {
    /// Of this machine.
    pub fn of_this() -> Self {
        let driver = fs::read_to_string("/proc/driver/nvidia/version").ok();
        let libraries = gpu::libraries();
        let cache = gpu::kernel_cache().ok();
        let usable = gpu::usable(&libraries, cache.as_ref());
        let (infos, problem) = match usable.devices {
            Ok(devices) => (devices, None),
            Err(error) => (Vec::new(), Some(Trouble::from(error))),
        };
        let devices = infos.into_iter().zip(usable.kernels);
        Self {
            driver: driver.and_then(|text| driver_version(&text)),
            devices: devices.map(|(info, missing)| device(info, missing, &libraries)).collect(),
            problem,
            libraries: found(&libraries),
            searched: libraries.searched().map(Path::to_owned).collect(),
            kernel_cache: cache.map(|cache| cache.dir().to_owned()),
        }
    }
}

/// Takes the GPU for a moment, which shows whether it can be taken.
fn device(info: DeviceInfo, missing_kernels: Option<String>, libraries: &Libraries) -> Device {
    let driver = Driver::open(libraries);
    let context = driver.and_then(|driver| Context::new(&driver, info.ordinal));
    let (free_bytes, problem) = match context.and_then(|context| context.memory()) {
        Ok((free, _)) => (Some(free), None),
        Err(error) => (None, Some(Trouble::from(error))),
    };
    Device { info, free_bytes, problem, missing_kernels }
}

fn found(libraries: &Libraries) -> Vec<Library> {
    let of = |name: &str, result: Result<(&Path, Version), LibraryError>| {
        let (path, version, problem) = match result {
            Ok((path, version)) => (Some(path.to_owned()), Some(version.to_string()), None),
            Err(error) => (None, None, Some(Trouble::from(error))),
        };
        Library { name: name.to_owned(), path, version, problem }
    };
    vec![
        of("CUDA driver", libraries.driver().map(|opened| (opened.path.as_path(), opened.version))),
        of("NVRTC", libraries.nvrtc().map(|nvrtc| (nvrtc.path(), nvrtc.version()))),
        of("cuBLASLt", libraries.cublas_lt().map(|opened| (opened.path.as_path(), opened.version))),
        of("NCCL", libraries.nccl().map(|opened| (opened.path.as_path(), opened.version))),
    ]
}

/// The version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  …`.
fn driver_version(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_driver_says() {
        let text =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27 2025\nGCC version:  12\n";
        assert_eq!(driver_version(text).as_deref(), Some("580.82.07"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1  Release Build\n";
        assert_eq!(driver_version(open).as_deref(), Some("570.1"));
        assert_eq!(driver_version(""), None);
    }
}
