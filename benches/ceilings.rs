//! What a benchmark's figures are held against, measured in the same run and between its samples: plain reading of
//! memory, fused multiply-adds in registers, the `gemm` crate. And the table at the end.
#![allow(dead_code)] // Each bench includes this file and uses its part.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use dist_core::DType;
use dist_core::philox::{NormalTable, stream_key};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use dist_kernels::weight::HostBytes;
use half::{bf16, f16};

#[path = "../crates/dist-kernels/src/cpu/gemm_reference.rs"]
mod gemm_reference;
#[allow(unused_imports, reason = "not every bench multiplies matrices")]
pub(crate) use gemm_reference::gemm_f32;

/// Below this a measured read ceiling is too low to be believed, and the run is void.
const READ_GBPS_MIN: f64 = 26.0;
/// Bytes of weights: buffers rotate through them, beyond every cache.
pub(crate) const POOL_BYTES: usize = 256 << 20;
/// Bytes that one reading of memory takes.
const READ_BYTES: usize = 64 << 20;
/// Steps of one run of multiply-adds, about a millisecond.
const FMA_STEPS: usize = 400_000;

/// A backend with all threads of the machine, or with `DIST_THREADS` of them.
pub(crate) fn backend() -> CpuBackend {
    let threads = std::env::var("DIST_THREADS").ok().and_then(|n| n.parse().ok());
    let threads = threads.or_else(|| std::thread::available_parallelism().ok().map(Into::into)).unwrap_or(1);
    CpuBackend::new(CpuOptions { threads, path: CpuPath::Auto, spin: Duration::from_micros(50) })
        .expect("a CPU backend")
}

/// Memory with huge pages, shared with weights that are views of it.
struct Shared(CpuBuf);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.bytes()
    }
}

/// Weights from N(0, 0.02) in `dtype`.
pub(crate) fn weights(backend: &mut CpuBackend, dtype: DType, bytes: usize) -> HostBytes {
    let (table, key) = (NormalTable::new(0.02), stream_key(1, "bench"));
    let mut buf = backend.alloc("weights", dtype, bytes / dtype.bytes()).expect("memory for weights");
    let eight = |i: usize| table.eight(key, i as u64);
    match dtype {
        DType::F32 => fill(buf.slice_mut::<f32>(), eight, |x| x),
        DType::F16 => fill(buf.slice_mut::<f16>(), eight, f16::from_f32),
        _ => fill(buf.slice_mut::<bf16>(), eight, bf16::from_f32),
    }
    HostBytes::new(Shared(buf))
}

/// Draws a few million numbers, and repeats them behind: only their spread matters, and where they lie.
fn fill<T: Copy>(out: &mut [T], eight: impl Fn(usize) -> [f32; 8], convert: impl Fn(f32) -> T) {
    let n_drawn = out.len().min(4 << 20);
    let (drawn, rest) = out.split_at_mut(n_drawn);
    for (i, out) in drawn.chunks_mut(8).enumerate() {
        for (out, x) in out.iter_mut().zip(eight(i)) {
            *out = convert(x);
        }
    }
    for rest in rest.chunks_mut(n_drawn) {
        rest.copy_from_slice(&drawn[..rest.len()]);
    }
}

/// `len` activations from N(0, 1).
pub(crate) fn activations(len: usize) -> CpuBuf {
    let (table, key) = (NormalTable::new(1.0), stream_key(2, "x"));
    let x: Vec<f32> = (0..len).map(|i| table.at(key, i as u64)).collect();
    CpuBuf::from_slice("activations", &x).expect("memory for activations")
}

/// Durations of the same work.
#[derive(Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Runs and times.
    pub(crate) fn time(&mut self, run: impl FnOnce()) -> Duration {
        let start = Instant::now();
        run();
        let took = start.elapsed();
        self.0.push(took.as_secs_f64());
        took
    }

    /// Median in seconds.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// The ceilings as seen around one benchmark.
#[derive(Default)]
pub(crate) struct Ceilings {
    read: Samples,
    fma: Samples,
    flop: f64,
    at: usize,
}

impl Ceilings {
    /// Measures both once; call it between samples, so that a noisy neighbour hurts both sides alike.
    pub(crate) fn measure(&mut self, backend: &CpuBackend, pool: &HostBytes) {
        let bytes = pool.as_slice();
        self.at = (self.at + READ_BYTES) % (bytes.len() - READ_BYTES + 1) / READ_BYTES * READ_BYTES;
        let window = &bytes[self.at..self.at + READ_BYTES];
        self.read.time(|| {
            std::hint::black_box(backend.read_all(window));
        });
        let mut flop = 0.0;
        self.fma.time(|| flop = backend.multiply_add(FMA_STEPS));
        self.flop = flop;
    }

    /// Plain reading, GB/s.
    pub(crate) fn read_gbps(&self) -> f64 {
        READ_BYTES as f64 / self.read.median() / 1e9
    }

    /// Multiply-adds in registers, GFLOP/s.
    pub(crate) fn fma_gflops(&self) -> f64 {
        self.flop / self.fma.median() / 1e9
    }
}

/// One line of the table.
pub(crate) struct Line {
    /// Operation and shape.
    pub(crate) name: String,
    /// Median time of one run, in seconds.
    pub(crate) seconds: f64,
    /// Bytes that must be read.
    pub(crate) bytes: f64,
    /// Operations that must be done.
    pub(crate) flop: f64,
    /// Ceilings around it.
    pub(crate) ceilings: Ceilings,
    /// Median time of the `gemm` crate on the same product in f32.
    pub(crate) gemm: Option<f64>,
}

impl Line {
    /// Fraction of the lower of the two ceilings.
    fn fraction(&self) -> f64 {
        let read = self.bytes / self.ceilings.read_gbps() / 1e9;
        let fma = self.flop / self.ceilings.fma_gflops() / 1e9;
        read.max(fma) / self.seconds
    }
}

/// Prints all lines with all that a figure needs to be believed.
pub(crate) fn print_table(backend: &CpuBackend, lines: &[Line]) {
    let mut text = format!(
        "\n{:<34} {:>9} {:>7} {:>8} {:>9} {:>7} {:>8} {:>7}\n",
        "op", "p50 ms", "GB/s", "GFLOP/s", "read", "fma", "ceiling", "gemm"
    );
    for line in lines {
        let (read, fma) = (line.ceilings.read_gbps(), line.ceilings.fma_gflops());
        let gemm = line.gemm.map_or("-".into(), |gemm| format!("{:.0} %", 100.0 * gemm / line.seconds));
        let void = if read < READ_GBPS_MIN { "  void: read ceiling too low" } else { "" };
        let _ = writeln!(
            text,
            "{:<34} {:>9.3} {:>7.1} {:>8.1} {read:>9.1} {fma:>7.0} {:>6.0} % {gemm:>7}{void}",
            line.name,
            1e3 * line.seconds,
            line.bytes / line.seconds / 1e9,
            line.flop / line.seconds / 1e9,
            100.0 * line.fraction(),
        );
    }
    let about = backend.describe();
    let command: Vec<String> = std::env::args().skip(1).collect();
    let _ = writeln!(
        text,
        "read: GB/s of plain reading, fma: GFLOP/s in registers, ceiling: share of the lower one, gemm: share of that \
         crate's GFLOP/s in f32; medians of one run\ndevice={:?} threads={} path={} commit={} command={:?}",
        device(),
        about.threads,
        about.path,
        commit(),
        format!("cargo bench -p dist-kernels -- {}", command.join(" ")),
    );
    #[expect(clippy::print_stdout, reason = "the table is what a bench is for")]
    {
        println!("{text}");
    }
}

fn device() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("unknown".into(), |(_, model)| model.to_owned())
}

fn commit() -> String {
    let output = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    let commit = output.ok().filter(|output| output.status.success());
    commit.map_or("unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
