//! The GPU under measurement: memory full of numbers like a model's, the ceilings, and the median of replays.

use std::path::PathBuf;
use std::sync::Arc;

use dist_core::DType;
use dist_core::philox::{NormalTable, stream_key};
use dist_kernels::Backend;
use dist_kernels::Result;
use dist_kernels::args::SampleRow;
use dist_kernels::cuda::cache::KernelCache;
use dist_kernels::cuda::libraries::{Libraries, LibraryDirs};
use dist_kernels::cuda::staging::StagingOptions;
use dist_kernels::cuda::{CudaBackend, CudaBuf, CudaOptions, GemmChoice};
use dist_kernels::weight::{Layout, Weight, WeightPart};
use half::bf16;

/// All that is measured has this type.
pub(crate) const DTYPE: DType = DType::BF16;
/// Bytes that buffers rotate through, at least: several times the L2 cache.
pub(crate) const ROTATION_BYTES: usize = 256 << 20;
/// Elements of the pattern that weights are cut from: 64 MB.
const PATTERN_LEN: usize = 32 << 20;
/// From one weight's place in the pattern to the next one's: a prime, so that no two are alike.
const PATTERN_STEP: usize = 1_299_709;
/// How long a replay should take, as far as a case can be foretold.
const REPLAY_SECONDS: f64 = 2e-3;
const LAUNCHES_MAX: usize = 160;
const REPLAYS: usize = 7;
/// What an H100 reads and multiplies a second, about: only the number of launches depends on it.
const ABOUT: (f64, f64) = (3e12, 6e14);

/// A recording.
pub(crate) type Graph = <CudaBackend as Backend>::Graph;

/// Another backend whose `linear` is measured beside the first one's.
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) backend: CudaBackend,
}

/// Name of a column, and how it changes the options. The first one is what all else is measured with; the bars compare
/// with the one named `library`.
type ColumnOptions = (&'static str, fn(CudaOptions) -> CudaOptions);

pub(crate) const COLUMNS: [ColumnOptions; 2] = [
    ("own", |options| CudaOptions { gemm: GemmChoice::Own, ..options }),
    ("library", |options| CudaOptions { gemm: GemmChoice::Library, ..options }),
];
pub(crate) const LIBRARY: &str = "library";

/// What this GPU can do at best.
#[derive(Clone, Copy)]
pub(crate) struct Ceilings {
    /// Bytes a second.
    pub(crate) read: f64,
    /// Bytes a second, those read and those written together.
    pub(crate) copy: f64,
    /// Multiplications and additions a second.
    pub(crate) multiply: f64,
}

pub(crate) struct Gpu {
    // The others go before the first one, which opened the GPU.
    pub(crate) others: Vec<Column>,
    /// N(0, 0.02).
    weights: CudaBuf,
    /// N(0, 1).
    activations: CudaBuf,
    pub(crate) backend: CudaBackend,
    pub(crate) libraries: Arc<Libraries>,
    pub(crate) ceilings: Ceilings,
    n_filled: usize,
}

/// Libraries and kernels where the tests look for them as well.
pub(crate) fn options(libraries: Arc<Libraries>) -> CudaOptions {
    let cache = std::env::var_os("DIST_KERNEL_CACHE").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| std::env::temp_dir().join("dist-kernel-cache"));
    let staging = StagingOptions { n_readers: 2, chunk_bytes: 1 << 20, n_buffers: 2 };
    CudaOptions {
        libraries,
        cache: KernelCache::new(cache),
        ordinal: 0,
        cast: None,
        staging,
        gemm: GemmChoice::Own,
    }
}

/// `len` numbers from N(0, `std_dev`).
fn normal(backend: &mut CudaBackend, name: &str, std_dev: f64, len: usize) -> Result<CudaBuf> {
    let (table, key) = (NormalTable::new(std_dev), stream_key(1, name));
    let values: Vec<bf16> =
        (0..len as u64 / 8).flat_map(|group| table.eight(key, group).map(bf16::from_f32)).collect();
    let mut buf = backend.alloc(name, DTYPE, values.len())?;
    backend.upload(&mut buf, 0, bytemuck::cast_slice(&values))?;
    Ok(buf)
}

impl Gpu {
    pub(crate) fn open() -> Result<Self> {
        let dirs = std::env::var_os("DIST_CUDA_LIB").map(|dirs| std::env::split_paths(&dirs).collect());
        let last = vec![PathBuf::from("/usr/local/cuda/lib64")];
        let dirs = LibraryDirs { first: dirs.unwrap_or_default(), asks_loader: true, last };
        let libraries = Arc::new(Libraries::new(dirs));
        let open = |change: fn(CudaOptions) -> CudaOptions| {
            CudaBackend::new(change(options(Arc::clone(&libraries))))
        };
        let [(_, first), rest @ ..] = COLUMNS;
        let mut backend = open(first)?;
        let others = rest.into_iter().map(|(name, change)| Ok(Column { name, backend: open(change)? }));
        let mut others: Vec<Column> = others.collect::<Result<_>>()?;
        let weights = normal(&mut backend, "weights", 0.02, PATTERN_LEN)?;
        let activations = normal(&mut backend, "activations", 1.0, PATTERN_LEN / 4)?;
        let (read, _) = backend.read_rate()?;
        let (copy, _) = backend.copy_rate()?;
        // By whoever multiplies fastest.
        let mut multiply = backend.multiply_rate(DTYPE)?;
        for column in &mut others {
            multiply = multiply.max(column.backend.multiply_rate(DTYPE)?);
        }
        let ceilings = Ceilings { read, copy, multiply };
        Ok(Self { others, weights, activations, backend, libraries, ceilings, n_filled: 0 })
    }

    /// `len` elements from N(0, 1).
    pub(crate) fn activations(&mut self, len: usize) -> Result<CudaBuf> {
        let mut buf = self.backend.alloc("activations", DTYPE, len)?;
        self.n_filled += 1;
        self.backend.fill_from(&mut buf, &self.activations, self.n_filled * PATTERN_STEP)?;
        Ok(buf)
    }

    /// A weight of `n` outputs and `k` inputs from N(0, 0.02).
    pub(crate) fn weight(&mut self, n: usize, k: usize) -> Result<Weight<CudaBuf>> {
        let mut data = self.backend.alloc("a weight", DTYPE, n * k)?;
        self.n_filled += 1;
        self.backend.fill_from(&mut data, &self.weights, self.n_filled * PATTERN_STEP)?;
        Ok(Weight { parts: vec![WeightPart { data, n, ld: k }], dtype: DTYPE, layout: Layout::Nk, n, k })
    }

    /// Memory for `len` elements that kernels write.
    pub(crate) fn output(&mut self, dtype: DType, len: usize) -> Result<CudaBuf> {
        self.backend.alloc("an output", dtype, len)
    }

    /// Does `ask` while the GPU multiplies large matrices.
    pub(crate) fn while_busy<T: Send>(&mut self, ask: impl FnOnce() -> T + Send) -> Result<T> {
        const SIDE: usize = 8192;
        let (x, weight) = (self.activations(SIDE * SIDE)?, self.weight(SIDE, SIDE)?);
        let mut out = self.output(DTYPE, SIDE * SIDE)?;
        std::thread::scope(|scope| {
            let asking = scope.spawn(ask);
            while !asking.is_finished() {
                for _ in 0..8 {
                    self.backend.linear(crate::linear::plain(&mut out, &x, &weight, SIDE))?;
                }
                self.backend.synchronize()?;
            }
            Ok(asking.join().expect("asking does not panic"))
        })
    }

    /// Words that tell kernels what is where.
    pub(crate) fn words(&mut self, words: &[u32]) -> Result<CudaBuf> {
        let mut buf = self.backend.alloc("words", DType::U32, words.len())?;
        self.backend.upload(&mut buf, 0, bytemuck::cast_slice(words))?;
        Ok(buf)
    }
}

/// Buffers of `n_bytes` that rotate beyond the L2 cache.
pub(crate) fn n_rotating(n_bytes: usize) -> usize {
    ROTATION_BYTES.div_ceil(n_bytes.max(1)).max(2)
}

/// Launches of one graph: once through all of `n_buffers`, and as often again as a replay has time for.
pub(crate) fn n_launches(n_bytes: usize, flop: f64, n_buffers: usize) -> usize {
    let seconds = (n_bytes as f64 / ABOUT.0).max(flop / ABOUT.1).max(2e-6);
    let rounds = (REPLAY_SECONDS / seconds / n_buffers as f64) as usize;
    n_buffers * rounds.clamp(1, (LAUNCHES_MAX / n_buffers).max(1))
}

/// Seconds of one of the `n` steps that a graph is made of: the median of its replays. `step` takes the number of
/// the launch.
pub(crate) fn median(
    backend: &mut CudaBackend,
    n: usize,
    step: impl FnMut(&mut CudaBackend, usize) -> Result<()>,
) -> Result<f64> {
    median_of_draws(backend, n, &[], step)
}

/// The same for steps that draw, each as `rows` say.
pub(crate) fn median_of_draws(
    backend: &mut CudaBackend,
    n: usize,
    rows: &[SampleRow],
    step: impl FnMut(&mut CudaBackend, usize) -> Result<()>,
) -> Result<f64> {
    let graph = recorded(backend, n, step)?;
    let times = backend.time_replays(&graph, rows, REPLAYS)?;
    Ok(of_step(times, n))
}

/// A graph of `n` steps.
pub(crate) fn recorded(
    backend: &mut CudaBackend,
    n: usize,
    mut step: impl FnMut(&mut CudaBackend, usize) -> Result<()>,
) -> Result<Graph> {
    let graph = backend.capture(&mut |backend| (0..n).try_for_each(|idx| step(backend, idx)))?;
    Ok(graph.expect("this backend has graphs"))
}

/// Medians of graphs of `n` steps each that are replayed in turn: who multiplies at full power lowers the clock for a
/// while, which must not be another's loss.
pub(crate) fn medians_in_turn(graphs: &mut [(&mut CudaBackend, Graph)], n: usize) -> Result<Vec<f64>> {
    let mut times = vec![Vec::new(); graphs.len()];
    for _ in 0..REPLAYS {
        for ((backend, graph), times) in graphs.iter_mut().zip(&mut times) {
            times.extend(backend.time_replays(graph, &[], 1)?);
        }
    }
    Ok(times.into_iter().map(|times| of_step(times, n)).collect())
}

/// Seconds of a step: the median of `times`, milliseconds of `n` steps each.
fn of_step(mut times: Vec<f32>, n: usize) -> f64 {
    times.sort_by(f32::total_cmp);
    f64::from(times[times.len() / 2]) / 1e3 / n as f64
}
