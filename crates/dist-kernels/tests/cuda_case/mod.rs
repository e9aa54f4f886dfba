//! One code for both backends: what a test does on the GPU it does on the CPU, from the same numbers.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.
#![allow(dead_code)] // Each test file uses its part.
#![allow(clippy::print_stderr)] // A skip must be loud, and the seed belongs to a failure.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use dist_core::DType;
use dist_core::philox::{NormalTable, philox4x32};
use dist_kernels::cpu::{CpuBackend, CpuOptions, CpuPath};
use dist_kernels::cuda::cache::KernelCache;
use dist_kernels::cuda::driver::CudaError;
use dist_kernels::cuda::libraries::{Libraries, LibraryDirs};
use dist_kernels::cuda::staging::StagingOptions;
use dist_kernels::cuda::{CudaBackend, CudaOptions, GemmChoice};
use dist_kernels::weight::{Buffer, HostBytes, HostPart, HostWeight, Layout, Weight};
use dist_kernels::{Backend, KernelError};
use half::{bf16, f16};

/// How the GPU is opened. Compiled kernels may be brought along in `DIST_KERNEL_CACHE`.
pub(crate) fn options(cast: Option<DType>) -> CudaOptions {
    let first = std::env::var_os("DIST_CUDA_LIB").map(|dirs| std::env::split_paths(&dirs).collect());
    let dirs = LibraryDirs { first: first.unwrap_or_default(), asks_loader: true, last: vec![] };
    let cache = std::env::var_os("DIST_KERNEL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::env::temp_dir().join("dist-kernel-cache"));
    let libraries = Arc::new(Libraries::new(dirs));
    CudaOptions {
        libraries,
        cache: KernelCache::new(cache),
        ordinal: 0,
        cast,
        staging: StagingOptions { n_readers: 2, chunk_bytes: 1 << 20, n_buffers: 2 },
        gemm: GemmChoice::Measured,
    }
}

/// One test at a time: each takes most of what kernels need for itself.
static ONE: Mutex<()> = Mutex::new(());

/// The GPU, as long as the first value is kept; `None`, and a loud line, where there is none.
pub(crate) fn gpu(test: &str) -> Option<(MutexGuard<'static, ()>, CudaBackend)> {
    gpu_with(test, options(None))
}

/// The same, opened as `options` say.
pub(crate) fn gpu_with(test: &str, options: CudaOptions) -> Option<(MutexGuard<'static, ()>, CudaBackend)> {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match CudaBackend::new(options) {
        Ok(backend) => Some((one, backend)),
        Err(KernelError::Cuda(error @ (CudaError::Library(_) | CudaError::NoGpu))) => {
            skip(test, &error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Says that a test was skipped where nobody overlooks it.
pub(crate) fn skip(test: &str, why: &str) {
    eprintln!("SKIPPED: {test}: {why}");
    if let Some(log) = std::env::var_os("DIST_SKIP_LOG") {
        let mut log = OpenOptions::new().append(true).create(true).open(log).unwrap();
        writeln!(log, "{test} {why}").unwrap();
    }
}

/// Options with a folder of plans for this test alone, in which the kernels are that others have compiled.
pub(crate) fn own_folder(dir: &Path, gemm: GemmChoice) -> CudaOptions {
    let shared = options(None);
    for entry in fs::read_dir(shared.cache.dir()).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|end| end == "cubin") {
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
    }
    CudaOptions { cache: KernelCache::new(dir.to_owned()), gemm, ..shared }
}

/// Whether cuBLASLt is there; a test of it says that it is skipped where it is not.
pub(crate) fn has_library(test: &str) -> bool {
    if std::env::var_os("DIST_TEST_OWN_KERNELS").is_some() {
        skip(test, "DIST_TEST_OWN_KERNELS is set");
        return false;
    }
    match options(None).libraries.cublas_lt() {
        Ok(_) => true,
        Err(error) => {
            skip(test, &error.to_string());
            false
        }
    }
}

/// The driver and the compiler of kernels as they are found, and nothing else.
pub(crate) fn without_cublas_lt(dir: &Path) -> Option<Arc<Libraries>> {
    let found = options(None).libraries;
    let (driver, nvrtc) = (found.driver().ok()?.path.clone(), found.nvrtc().ok()?.path().to_owned());
    symlink(driver, dir.join("libcuda.so.1")).unwrap();
    symlink(&nvrtc, dir.join("libnvrtc.so.13")).unwrap();
    for entry in fs::read_dir(nvrtc.parent().unwrap()).unwrap() {
        let beside = entry.unwrap().path();
        let name = beside.file_name().unwrap();
        if name.to_string_lossy().starts_with("libnvrtc-builtins") {
            symlink(&beside, dir.join(name)).unwrap();
        }
    }
    let dirs = LibraryDirs { first: vec![dir.to_owned()], asks_loader: false, last: vec![] };
    Some(Arc::new(Libraries::new(dirs)))
}

pub(crate) fn cpu() -> CpuBackend {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(8);
    CpuBackend::new(CpuOptions { threads, path: CpuPath::Auto, spin: Duration::from_micros(20) }).unwrap()
}

/// Numbers that nobody has seen before; the seed is printed, and `DIST_TEST_SEED` repeats it.
pub(crate) struct Random {
    key: [u32; 2],
    at: u64,
    table: NormalTable,
}

impl Random {
    pub(crate) fn new() -> Self {
        let asked = std::env::var("DIST_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed: u64 = asked.unwrap_or_else(now);
        eprintln!("DIST_TEST_SEED={seed}");
        Self { key: [seed as u32, (seed >> 32) as u32], at: 0, table: NormalTable::new(1.0) }
    }

    /// From N(0, `scale`), rounded to what `dtype` holds, so that both backends begin with the same numbers.
    pub(crate) fn normal(&mut self, n: usize, scale: f32, dtype: DType) -> Vec<f32> {
        let start = self.at;
        self.at += n as u64;
        (start..self.at).map(|at| round(self.table.at(self.key, at) * scale, dtype)).collect()
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.at += 1;
        let bits = philox4x32([self.at as u32, (self.at >> 32) as u32, 1, 0], self.key);
        ((u64::from(bits[0]) * end as u64) >> 32) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

pub(crate) fn encode(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        DType::BF16 => pairs().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        DType::F16 => pairs().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

/// A buffer of `values` as `dtype`.
pub(crate) fn put<B: Backend>(backend: &mut B, dtype: DType, values: &[f32]) -> B::Buf {
    let mut buf = backend.alloc("test", dtype, values.len()).unwrap();
    backend.upload(&mut buf, 0, &encode(values, dtype)).unwrap();
    buf
}

pub(crate) fn words<B: Backend>(backend: &mut B, values: &[u32]) -> B::Buf {
    let mut buf = backend.alloc("test", DType::U32, values.len()).unwrap();
    backend.upload(&mut buf, 0, bytemuck::cast_slice(values)).unwrap();
    buf
}

pub(crate) fn ints<B: Backend>(backend: &mut B, values: &[i32]) -> B::Buf {
    let mut buf = backend.alloc("test", DType::I32, values.len()).unwrap();
    backend.upload(&mut buf, 0, bytemuck::cast_slice(values)).unwrap();
    buf
}

/// `n` numbers that are none, so that what is not written shows.
pub(crate) fn poisoned<B: Backend>(backend: &mut B, dtype: DType, n: usize) -> B::Buf {
    put(backend, dtype, &vec![f32::NAN; n])
}

pub(crate) fn get<B: Backend>(backend: &mut B, buf: &B::Buf) -> Vec<f32> {
    let mut bytes = vec![0; buf.len() * buf.dtype().bytes()];
    backend.download(buf, 0, &mut bytes).unwrap();
    decode(&bytes, buf.dtype())
}

pub(crate) fn get_words<B: Backend>(backend: &mut B, buf: &B::Buf) -> Vec<u32> {
    let mut words = vec![0_u32; buf.len()];
    backend.download(buf, 0, bytemuck::cast_slice_mut(&mut words)).unwrap();
    words
}

/// A weight of `n` outputs in one or two parts, its rows apart by more than they are long.
pub(crate) fn weight<B: Backend>(
    backend: &mut B,
    (values, n, k): (&[f32], usize, usize),
    dtype: DType,
    layout: Layout,
    n_parts: usize,
) -> Weight<B::Buf> {
    let gap = 3;
    let mut parts = vec![];
    let mut first = 0;
    for part in 0..n_parts {
        let n_part = (n - first) / (n_parts - part);
        let (height, width) = if layout == Layout::Nk { (n_part, k) } else { (k, n_part) };
        let ld = width + gap;
        let mut stored = vec![1e9; height * ld + 1];
        for i in 0..n_part {
            for j in 0..k {
                let at = if layout == Layout::Nk { i * ld + j } else { j * ld + i };
                stored[at + 1] = values[(first + i) * k + j];
            }
        }
        let bytes = HostBytes::new(encode(&stored, dtype));
        parts.push(HostPart { bytes, offset: dtype.bytes(), n: n_part, ld });
        first += n_part;
    }
    backend.prepare(HostWeight { parts, dtype, layout, k }).unwrap()
}

/// Panics unless `‖found − expected‖ ≤ bound · ‖expected‖`; NaN is never near.
pub(crate) fn assert_near(what: &str, found: &[f32], expected: &[f32], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let square = |x: f64| x * x;
    let apart: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
    let error = (apart / size.max(1e-30)).sqrt();
    assert!(error <= bound, "{what}: error {error:.2e}, at most {bound:.2e}");
}

/// Bound of the error of one operation whose result is rounded to `dtype` once.
pub(crate) fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 4e-3,
        DType::F16 => 6e-4,
        _ => 1e-5,
    }
}

/// Panics unless the elements from `from` on are still poisoned.
pub(crate) fn assert_untouched(what: &str, values: &[f32], from: usize) {
    assert!(values[from..].iter().all(|x| x.is_nan()), "{what}: wrote beyond its {from} elements");
}
