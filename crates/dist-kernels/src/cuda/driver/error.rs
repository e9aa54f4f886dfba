//! What can go wrong below an op, and what to do about it.

use std::ffi::CStr;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use super::super::compile::CompileError;
use super::super::libraries::{LibraryError, Version};
use crate::error::{MORE_THREADS, TAKE_LESS};

/// An error of the GPU, its driver or its libraries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// A library is missing or cannot be used.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// Kernels are missing or do not compile.
    #[error(transparent)]
    Kernels(#[from] CompileError),
    /// The driver is older than what this program calls.
    #[error("NVIDIA's driver is too old: it knows CUDA {found}, at least {least} is needed")]
    DriverTooOld {
        /// The newest CUDA that it knows.
        found: Version,
        /// What it must know.
        least: Version,
    },
    /// The driver is there, and no GPU.
    #[error("NVIDIA's driver is here, but it sees no GPU")]
    NoGpu,
    /// There is no GPU of that number.
    #[error("there is no GPU {ordinal}: the driver sees {n}, counted from 0")]
    NoSuchGpu {
        /// The number that was asked for.
        ordinal: usize,
        /// How many there are.
        n: usize,
    },
    /// The GPU is older than what kernels are written for.
    #[error("{name} has compute capability {}.{}: kernels need 8.0 or more", .capability.0, .capability.1)]
    Capability {
        /// The GPU's name.
        name: String,
        /// Its capability.
        capability: (u32, u32),
    },
    /// A thread works with one GPU.
    #[error("this thread works with another GPU already")]
    OtherGpu,
    /// Memory does not suffice.
    #[error("out of GPU memory for {what}: {needed} bytes needed, {free} free")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes that were asked for.
        needed: usize,
        /// Bytes that were free.
        free: usize,
    },
    /// Weights could not be read on their way to the GPU.
    #[error("the weights cannot be read: {why}")]
    Unreadable {
        /// The system's word.
        why: String,
    },
    /// Threads that read weights could not be started.
    #[error("no thread could be started to read the weights: {why}")]
    NoThread {
        /// The system's word.
        why: String,
    },
    /// A thread that reads weights panicked, and that was told before.
    #[error("weights are missing: a thread that read them has panicked: {message}")]
    ReaderPanicked {
        /// What it said.
        message: String,
    },
    /// A module has no such kernel, or one that takes something else.
    #[error("{module} has no kernel {kernel}: {why}")]
    Kernel {
        /// The module.
        module: String,
        /// The kernel.
        kernel: String,
        /// What is wrong.
        why: String,
    },
    /// A call of cuBLASLt failed.
    #[error("{call} failed for {what}: {status}")]
    Blas {
        /// The library's function.
        call: &'static str,
        /// What it was about.
        what: String,
        /// The library's name of the error.
        status: String,
    },
    /// A call failed.
    #[error("{call} failed for {what}: {name} ({meaning})")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// What it was about.
        what: String,
        /// The driver's name of the error.
        name: String,
        /// The driver's sentence for it.
        meaning: String,
        /// The driver's number of it.
        status: u32,
    },
}

impl CudaError {
    /// Of a call that may only have brought to light what went wrong before it: what was launched last until then.
    pub(in crate::cuda) fn after(self, last: &str) -> Self {
        match self {
            Self::Call { call, what, name, meaning, status } => {
                let what = format!("{what}; launched before it: {last}");
                Self::Call { call, what, name, meaning, status }
            }
            Self::Blas { call, what, status } => {
                Self::Blas { call, what: format!("{what}; launched before it: {last}"), status }
            }
            other => other,
        }
    }

    /// What to do about it, if that is known.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Library(error) => Some(error.help()),
            Self::Kernels(CompileError::NoCompiler { .. }) => {
                Some("pip install nvidia-cuda-nvrtc==13.0.88, or fill the cache: dist-cli kernels build".to_owned())
            }
            Self::DriverTooOld { .. } => Some("install NVIDIA's driver 580 or later".to_owned()),
            Self::NoGpu => {
                Some("look with nvidia-smi; in a container, pass the GPU on (--gpus all); see CUDA_VISIBLE_DEVICES".to_owned())
            }
            Self::NoSuchGpu { n: 0, .. } => Self::NoGpu.help(),
            Self::NoSuchGpu { n: 1, .. } => Some("there is one: --device cuda:0".to_owned()),
            Self::NoSuchGpu { n, .. } => Some(format!("choose another: --device cuda:0 to cuda:{}", n - 1)),
            Self::Capability { .. } => Some("use --device cpu, or an Ampere GPU or later".to_owned()),
            Self::OutOfMemory { .. } => Some(TAKE_LESS.to_owned()),
            Self::NoThread { .. } => Some(MORE_THREADS.to_owned()),
            Self::Call { status, .. } => help_of(*status).map(str::to_owned),
            Self::Unreadable { .. } => {
                Some("see whether the file is whole and its disk is well: dist-cli shard --verify".to_owned())
            }
            Self::OtherGpu
            | Self::ReaderPanicked { .. }
            | Self::Kernel { .. }
            | Self::Blas { .. }
            | Self::Kernels(CompileError::Refused { .. }) => None,
        }
    }
}

fn help_of(status: u32) -> Option<&'static str> {
    let is = |known: CUresult| status == known as u32;
    if is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) {
        return Some(TAKE_LESS);
    }
    if is(CUresult::CUDA_ERROR_ECC_UNCORRECTABLE) {
        return Some("the GPU's memory is damaged: look with nvidia-smi -q -d ECC, and restart the machine");
    }
    let of_kernels = [
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
        CUresult::CUDA_ERROR_LAUNCH_FAILED,
        CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
        CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
        CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
        CUresult::CUDA_ERROR_INVALID_PC,
        CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
        CUresult::CUDA_ERROR_ASSERT,
    ];
    if of_kernels.into_iter().any(is) {
        return Some(
            "a kernel went wrong: run again with CUDA_LAUNCH_BLOCKING=1 and --no-graphs, which names it by its own \
             launch; compute-sanitizer says why; please report both",
        );
    }
    if is(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU) || is(CUresult::CUDA_ERROR_INVALID_IMAGE) {
        return Some(
            "the kernels are for another GPU or driver: empty the kernel cache, or update the driver",
        );
    }
    if is(CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH) {
        return Some("the driver was updated while it was loaded: restart the machine");
    }
    if is(CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE) {
        return Some("another program has the GPU for itself: look with nvidia-smi");
    }
    if is(CUresult::CUDA_ERROR_SYSTEM_NOT_READY) {
        return Some("NVIDIA's fabric manager does not run: systemctl status nvidia-fabricmanager");
    }
    if is(CUresult::CUDA_ERROR_UNKNOWN) {
        return Some(
            "look with nvidia-smi whether the driver works; restart the machine after an update of it",
        );
    }
    None
}

/// The error of a call. It may be asked for only after the driver's library is open, as every call is.
pub(super) fn failed(call: &'static str, what: impl Into<String>, error: DriverError) -> CudaError {
    let text = |text: std::result::Result<&CStr, DriverError>| {
        text.map_or_else(|_| "unknown".to_owned(), |text| text.to_string_lossy().into_owned())
    };
    CudaError::Call {
        call,
        what: what.into(),
        name: text(error.error_name()),
        meaning: text(error.error_string()),
        status: error.0 as u32,
    }
}

/// A value that is being dropped has nobody to tell: after an error every call on the GPU fails, and that error was told.
pub(super) fn dropped(call: &'static str, result: std::result::Result<(), DriverError>) {
    if let Err(error) = result {
        tracing::debug!("{}", failed(call, "a value that ends", error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a driver nobody can be asked for the names of errors, so they are written here.
    fn told_by(call: &'static str, status: CUresult) -> CudaError {
        let (name, meaning) = ("CUDA_ERROR".to_owned(), "no reason".to_owned());
        CudaError::Call { call, what: "an event".to_owned(), name, meaning, status: status as u32 }
    }

    #[test]
    fn an_error_that_comes_late_names_what_was_launched() {
        let error = told_by("cuEventSynchronize", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        let told = error.after("a graph of 9 launches (norm, linear)").to_string();
        let expected = "cuEventSynchronize failed for an event; launched before it: a graph of 9 launches \
                        (norm, linear): CUDA_ERROR (no reason)";
        assert_eq!(told, expected);
    }

    #[test]
    fn no_gpu_is_proposed_that_is_not_there() {
        let help = |n| CudaError::NoSuchGpu { ordinal: 7, n }.help().unwrap();
        assert!(help(0).contains("nvidia-smi") && !help(0).contains("cuda:"), "{}", help(0));
        assert!(help(1).ends_with("--device cuda:0") && help(4).ends_with("cuda:0 to cuda:3"));
    }

    #[test]
    fn memory_that_does_not_suffice_has_a_next_step_in_every_shape() {
        let known = CudaError::OutOfMemory { what: "a cache".to_owned(), needed: 9, free: 5 };
        let plain = told_by("cuMemHostAlloc", CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        for error in [known, plain] {
            let help = error.help().unwrap();
            let flags = ["--max-seqs", "--max-seq-len", "--max-batch-tokens", "another GPU", "smaller model"];
            assert!(flags.into_iter().all(|flag| help.contains(flag)), "{help}");
            assert_eq!(crate::KernelError::from(error).help(), Some(help));
        }
    }

    #[test]
    fn a_kernel_that_went_wrong_has_a_next_step() {
        for status in [CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, CUresult::CUDA_ERROR_MISALIGNED_ADDRESS] {
            let help = told_by("cuGraphLaunch", status).help().unwrap();
            assert!(help.contains("CUDA_LAUNCH_BLOCKING=1") && help.contains("--no-graphs"), "{help}");
        }
    }
}
