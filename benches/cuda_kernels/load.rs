//! Weights of a file in the page cache on their way to the GPU, as the engine asks for them, beside what the bus carries
//! at best: pinned memory to the GPU's, in large pieces.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dist_core::DType;
use dist_kernels::Backend;
use dist_kernels::cuda::driver::{Context, Driver};
use dist_kernels::cuda::staging::StagingOptions;
use dist_kernels::cuda::{CudaBackend, CudaBuf, CudaOptions};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout, Weight};
use memmap2::MmapMut;
use serde_json::json;

use crate::Failure;
use crate::gpu::{DTYPE, Gpu, options};
use crate::load_parts;
use crate::report::{Bar, Line, Report, Work};

/// Of the file, if nothing else is asked for.
const GIB: usize = 4;
/// What loading shall reach of what the bus carries.
const BUS_SHARE: f64 = 0.8;
/// Of the copies that say what it carries.
const PIECE_BYTES: usize = 64 << 20;
const N_PIECES: usize = 24;
const N_PASSES: usize = 3;

/// Outputs and inputs of the matrices of a layer of 6.7B: qkv, proj, fc1, fc2.
const MATRICES: [(usize, usize); 4] = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)];
/// Elements of its vectors: biases of these, and two norms.
const VECTORS: [usize; 8] = [4096, 4096, 12288, 4096, 4096, 4096, 16384, 4096];

/// What flags say of this section.
pub(crate) struct Asked {
    pub(crate) gib: Option<usize>,
    pub(crate) sweeps: bool,
}

/// A tensor of the file.
#[derive(Clone, Copy)]
pub(crate) enum Tensor {
    Matrix { at: usize, n: usize, k: usize },
    Vector { at: usize, len: usize },
}

/// A file of weights, which nobody else sees and which is gone when this is, however the program ends.
pub(crate) struct Source {
    pub(crate) file: File,
    pub(crate) n_bytes: usize,
    pub(crate) tensors: Vec<Tensor>,
    bytes: HostBytes,
}

/// Layers one after the other, as many as have room.
fn layout(n_bytes_max: usize) -> (Vec<Tensor>, usize) {
    let layer_elements = MATRICES.iter().map(|(n, k)| n * k).sum::<usize>() + VECTORS.iter().sum::<usize>();
    let n_layers = (n_bytes_max / (layer_elements * DTYPE.bytes())).max(1);
    let (mut tensors, mut at) = (Vec::new(), 0);
    for _ in 0..n_layers {
        for (n, k) in MATRICES {
            tensors.push(Tensor::Matrix { at, n, k });
            at += n * k * DTYPE.bytes();
        }
        for len in VECTORS {
            tensors.push(Tensor::Vector { at, len });
            at += len * DTYPE.bytes();
        }
    }
    (tensors, at)
}

/// Numbers without a pattern, fast.
fn scramble(words: &mut [u64], seed: u64) {
    for (idx, word) in words.iter_mut().enumerate() {
        let mixed = (seed.wrapping_add(idx as u64)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        *word = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
}

impl Source {
    /// Writes the file, and reads it once.
    fn new(n_bytes_max: usize) -> io::Result<Self> {
        const BLOCK: usize = 8 << 20;
        let dir = std::env::var_os("DIST_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let file = tempfile::tempfile_in(dir)?;
        let (tensors, n_bytes) = layout(n_bytes_max);
        load_parts::in_turn(load_parts::n_cores(), n_bytes, BLOCK, |_, at, len| {
            let mut words = vec![0; len.div_ceil(8)];
            scramble(&mut words, at as u64);
            file.write_all_at(&bytemuck::cast_slice(&words)[..len], at as u64)
        })?;
        load_parts::in_turn(load_parts::n_cores(), n_bytes, BLOCK, |_, at, len| {
            file.read_exact_at(&mut vec![0; len], at as u64)
        })?;
        // Stands for the file's map: readers of whole rows read the file, and nothing else asks for more than its length.
        let map = MmapMut::map_anon(n_bytes)?;
        let bytes = HostBytes::of_file(map, file.try_clone()?);
        Ok(Self { file, n_bytes, tensors, bytes })
    }
}

/// What one pass took, in seconds.
#[derive(Clone, Copy)]
pub(crate) struct Pass {
    pub(crate) whole: f64,
    /// From the last tensor that was asked for to the arrival of all.
    pub(crate) last_wait: f64,
}

/// Weights and vectors on the GPU, kept until the clock has stopped.
type Loaded = (Vec<Weight<CudaBuf>>, Vec<CudaBuf>);

/// Asks for a tensor as a decoder does.
fn ask(
    backend: &mut CudaBackend,
    source: &Source,
    tensor: Tensor,
    loaded: &mut Loaded,
) -> Result<(), Failure> {
    match tensor {
        Tensor::Matrix { at, n, k } => {
            let part = HostPart { bytes: source.bytes.clone(), offset: at, n, ld: k };
            let weight = HostWeight { parts: vec![part], dtype: DTYPE, layout: Layout::Nk, k };
            loaded.0.push(backend.prepare(weight)?);
        }
        Tensor::Vector { at, len } => {
            let mut bytes = vec![0; len * DTYPE.bytes()];
            source.file.read_exact_at(&mut bytes, at as u64)?;
            let mut buf = backend.alloc("a vector", DTYPE, len)?;
            backend.upload(&mut buf, 0, &bytes)?;
            loaded.1.push(buf);
        }
    }
    Ok(())
}

/// Loads the whole file once.
fn pass(backend: &mut CudaBackend, source: &Source) -> Result<Pass, Failure> {
    let mut loaded = Loaded::default();
    let start = Instant::now();
    for &tensor in &source.tensors {
        ask(backend, source, tensor, &mut loaded)?;
    }
    let asked = Instant::now();
    backend.synchronize()?;
    Ok(Pass { whole: start.elapsed().as_secs_f64(), last_wait: asked.elapsed().as_secs_f64() })
}

/// Time in which a new backend's readers take their buffers, as they do while the engine opens a checkpoint.
const START: Duration = Duration::from_millis(150);

/// A pass of a backend of its own whose readers are there: what [`START`] hides is in `start and end`.
pub(crate) fn started_pass(gpu: &Gpu, staging: StagingOptions, source: &Source) -> Result<Pass, Failure> {
    let mut backend = open(gpu, staging)?;
    std::thread::sleep(START);
    pass(&mut backend, source)
}

/// Another backend, whose weights travel like this.
pub(crate) fn open(gpu: &Gpu, staging: StagingOptions) -> Result<CudaBackend, Failure> {
    Ok(CudaBackend::new(CudaOptions { staging, ..options(Arc::clone(&gpu.libraries)) })?)
}

/// Bytes a second from pinned memory to the GPU's, one large piece after the other: the median.
fn bus_rate(driver: &Driver, ordinal: usize) -> Result<f64, Failure> {
    let context = Context::new(driver, ordinal)?;
    let stream = context.stream()?;
    let mut pinned = context.alloc_pinned("pieces", PIECE_BYTES)?;
    for (idx, block) in pinned.bytes_mut().chunks_exact_mut(1 << 20).enumerate() {
        scramble(bytemuck::cast_slice_mut(block), idx as u64);
    }
    let mut memory = context.alloc("pieces", PIECE_BYTES)?;
    let mut times = Vec::with_capacity(N_PIECES);
    for _ in 0..N_PIECES {
        let start = Instant::now();
        stream.upload(&mut memory, 0, pinned.bytes())?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(PIECE_BYTES as f64 / times[N_PIECES / 2])
}

/// Seconds to take the memory of all tensors, without anything in it.
fn taking_memory(backend: &mut CudaBackend, source: &Source) -> Result<f64, Failure> {
    let (start, mut taken) = (Instant::now(), Vec::with_capacity(source.tensors.len()));
    for &tensor in &source.tensors {
        let len = match tensor {
            Tensor::Matrix { n, k, .. } => n * k,
            Tensor::Vector { len, .. } => len,
        };
        taken.push(backend.alloc("a tensor", DType::BF16, len)?);
    }
    Ok(start.elapsed().as_secs_f64())
}

/// A line of this section.
pub(crate) fn line(what: &str, staging: StagingOptions, seconds: f64, work: Work) -> Line {
    let StagingOptions { n_readers, chunk_bytes, n_buffers } = staging;
    let name = format!("load/{what}/{n_readers}x{n_buffers}x{}K/", chunk_bytes >> 10);
    let shape = json!({ "op": "load", "what": what, "readers": n_readers, "buffers": n_buffers,
        "chunk_bytes": chunk_bytes });
    Line { name, shape, seconds, work, beside: vec![], runs: None, bars: vec![] }
}

/// As the engine does it: the median of some passes.
fn weights(gpu: &Gpu, source: &Source, bus: f64, report: &mut Report) -> Result<(), Failure> {
    let staging = StagingOptions::of_cores(load_parts::n_cores());
    let memory = taking_memory(&mut open(gpu, staging)?, source)?;
    let mut passes =
        (0..N_PASSES).map(|_| started_pass(gpu, staging, source)).collect::<Result<Vec<_>, _>>()?;
    passes.sort_by(|a, b| a.whole.total_cmp(&b.whole));
    let Pass { whole, last_wait } = passes[N_PASSES / 2];
    let work = Work::Load { n_bytes: source.n_bytes, bus };
    let beside = vec![("memory alone", memory), ("the last wait", last_wait)];
    report.push(Line { beside, bars: vec![Bar::Bus(BUS_SHARE)], ..line("weights", staging, whole, work) });
    Ok(())
}

pub(crate) fn run(
    gpu: &Gpu,
    takes: &dyn Fn(&str) -> bool,
    asked: &Asked,
    report: &mut Report,
) -> Result<(), Failure> {
    if !takes("load/weights/") {
        return Ok(());
    }
    let start = Instant::now();
    let source = match Source::new(asked.gib.unwrap_or(GIB) << 30) {
        Ok(source) => source,
        Err(error) => {
            report
                .say(format!("SKIPPED: load: the file cannot be made (DIST_BENCH_DIR, --load-gib): {error}"));
            return Ok(());
        }
    };
    let driver = Driver::open(&gpu.libraries)?;
    let bus = bus_rate(&driver, gpu.backend.describe().ordinal)?;
    report.say(format!(
        "load: {:.2} GB made in {:.1} s; pinned host to device {:.1} GB/s; {}",
        source.n_bytes as f64 / 1e9,
        start.elapsed().as_secs_f64(),
        bus / 1e9,
        load_parts::host(),
    ));
    weights(gpu, &source, bus, report)?;
    load_parts::run(gpu, &driver, (&source, bus), report)?;
    if asked.sweeps {
        load_parts::sweep(gpu, &driver, (&source, bus), report)?;
    }
    Ok(())
}
