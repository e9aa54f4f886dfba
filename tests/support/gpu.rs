//! The GPU for tests of whole models; a test that finds none is skipped loudly.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dist_core::DType;
use dist_kernels::KernelError;
use dist_kernels::cuda::cache::KernelCache;
use dist_kernels::cuda::driver::CudaError;
use dist_kernels::cuda::libraries::{Libraries, LibraryDirs};
use dist_kernels::cuda::staging::StagingOptions;
use dist_kernels::cuda::{CudaBackend, CudaOptions, GemmChoice};

/// One test at a time: who gives a backend back waits for the whole GPU, which ends what another thread records.
static ONE: Mutex<()> = Mutex::new(());

/// The GPU, as long as the first value is kept; without one, says that `test` is skipped.
pub(crate) fn gpu(test: &str) -> Option<(MutexGuard<'static, ()>, CudaBackend)> {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let first = std::env::var_os("DIST_CUDA_LIB").map(|dirs| std::env::split_paths(&dirs).collect());
    let dirs = LibraryDirs { first: first.unwrap_or_default(), asks_loader: true, last: vec![] };
    let cache = std::env::var_os("DIST_KERNEL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::env::temp_dir().join("dist-kernel-cache"));
    let libraries = Arc::new(Libraries::new(dirs));
    let cache = KernelCache::new(cache);
    let options = CudaOptions {
        libraries,
        cache,
        ordinal: 0,
        cast: Some(DType::BF16),
        staging: StagingOptions { n_readers: 2, chunk_bytes: 1 << 20, n_buffers: 2 },
        gemm: GemmChoice::Measured,
    };
    match CudaBackend::new(options) {
        Ok(backend) => return Some((one, backend)),
        Err(KernelError::Cuda(error @ (CudaError::Library(_) | CudaError::NoGpu))) => {
            eprintln!("SKIPPED: {test}: {error}");
            let log = std::env::var_os("DIST_SKIP_LOG")?;
            let log = std::fs::OpenOptions::new().append(true).create(true).open(log);
            writeln!(log.expect("the log of skipped tests"), "{test} {error}").expect("the log");
        }
        Err(error) => panic!("{error}"),
    }
    None
}
