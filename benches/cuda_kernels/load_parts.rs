//! What bounds loading: readers without a GPU, copies without readers, and other numbers of both.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use dist_kernels::cuda::driver::{Context, Driver};
use dist_kernels::cuda::staging::{Staging, StagingOptions};
use memmap2::MmapMut;

use crate::Failure;
use crate::gpu::Gpu;
use crate::load::{Source, line, started_pass};
use crate::report::{Report, Work};

const READERS: [usize; 4] = [4, 8, 12, 16];
const CHUNKS: [usize; 4] = [512 << 10, 1 << 20, 2 << 20, 4 << 20];
const BUFFERS: [usize; 2] = [2, 4];
/// Memory of the GPU that copies without readers go to, and how often.
const COPIED_BYTES: usize = 1 << 30;
const N_COPIED: usize = 3;
/// Memory of the host that readers copy where they read no file.
const MEMORY_BYTES: usize = 1 << 30;

pub(crate) fn n_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The machine, in a few words.
pub(crate) fn host() -> String {
    let fact = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned()
    };
    let nodes = fact("/sys/devices/system/node/online", "");
    let last_cache = fact("/sys/devices/system/cpu/cpu0/cache/index3/size", "");
    let (cpu, cache) = (fact("/proc/cpuinfo", "model name"), fact("/proc/cpuinfo", "cache size"));
    let huge = fact("/sys/kernel/mm/transparent_hugepage/enabled", "");
    let kernel = fact("/proc/version", "");
    let kernel: Vec<&str> = kernel.split(' ').take(3).collect();
    format!(
        "{} cores of {cpu}, cache {cache}, L3 {last_cache}, nodes {nodes}, huge pages {huge}, {}",
        n_cores(),
        kernel.join(" ")
    )
}

/// Does all of `n_bytes` in pieces, each by whichever of `n_threads` is free: thread, first byte, how many.
pub(crate) fn in_turn(
    n_threads: usize,
    n_bytes: usize,
    piece: usize,
    work: impl Fn(usize, usize, usize) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    std::thread::scope(|scope| {
        for thread in 0..n_threads {
            let (next, failed, work) = (&next, &failed, &work);
            scope.spawn(move || {
                loop {
                    let at = next.fetch_add(piece, Ordering::Relaxed);
                    if at >= n_bytes {
                        return;
                    }
                    if let Err(error) = work(thread, at, piece.min(n_bytes - at)) {
                        *failed.lock().expect("nobody panics with it") = Some(error);
                        return;
                    }
                }
            });
        }
    });
    failed.into_inner().expect("nobody panics with it").map_or(Ok(()), Err)
}

/// Seconds in which as many readers fill buffers like those of `staging`: `fill` writes bytes from a place on.
fn filling(
    context: &Context,
    staging: StagingOptions,
    n_bytes: usize,
    fill: impl Fn(usize, &mut [u8]) -> io::Result<()> + Sync,
) -> Result<f64, Failure> {
    let StagingOptions { n_readers, chunk_bytes, n_buffers } = staging;
    let mut pinned = context.alloc_pinned("buffers", n_readers * n_buffers * chunk_bytes)?;
    // Each reader's buffers, and which one is next.
    let own = pinned.bytes_mut().chunks_exact_mut(n_buffers * chunk_bytes);
    let own: Vec<_> = own.map(|buffers| Mutex::new((buffers, 0))).collect();
    let start = Instant::now();
    in_turn(n_readers, n_bytes, chunk_bytes, |reader, at, len| {
        let mut own = own[reader].lock().expect("it is its reader's alone");
        let (buffers, next) = &mut *own;
        let buffer = &mut buffers[*next * chunk_bytes..][..len];
        *next = (*next + 1) % n_buffers;
        fill(at, buffer)
    })?;
    Ok(start.elapsed().as_secs_f64())
}

/// Bytes that readers send without having read anything, and the seconds that it takes.
fn sending(gpu: &Gpu, driver: &Driver, staging: StagingOptions) -> Result<(usize, f64), Failure> {
    let ordinal = gpu.backend.describe().ordinal;
    let context = Context::new(driver, ordinal)?;
    let mut memory = context.alloc("copies", COPIED_BYTES)?;
    let mut readers = Staging::new(driver, ordinal, staging)?;
    // The first time they take their buffers.
    readers.load(&mut memory, 0, (1, COPIED_BYTES / 2), Box::new(|_, _| Ok(())))?;
    readers.finish()?;
    let start = Instant::now();
    for _ in 0..N_COPIED {
        readers.load(&mut memory, 0, (1, COPIED_BYTES), Box::new(|_, _| Ok(())))?;
    }
    readers.finish()?;
    Ok((N_COPIED * COPIED_BYTES, start.elapsed().as_secs_f64()))
}

/// Seconds in which readers start, take their buffers, send one each and end.
fn starting(gpu: &Gpu, driver: &Driver, staging: StagingOptions) -> Result<f64, Failure> {
    let ordinal = gpu.backend.describe().ordinal;
    let context = Context::new(driver, ordinal)?;
    let n_bytes = staging.n_readers * staging.chunk_bytes;
    let mut memory = context.alloc("copies", n_bytes)?;
    let start = Instant::now();
    let mut readers = Staging::new(driver, ordinal, staging)?;
    readers.load(&mut memory, 0, (1, n_bytes), Box::new(|_, _| Ok(())))?;
    readers.finish()?;
    drop(readers);
    Ok(start.elapsed().as_secs_f64())
}

fn push_sending(
    gpu: &Gpu,
    driver: &Driver,
    (staging, bus): (StagingOptions, f64),
    report: &mut Report,
) -> Result<(), Failure> {
    let (n_bytes, seconds) = sending(gpu, driver, staging)?;
    report.push(line("copies alone", staging, seconds, Work::Load { n_bytes, bus }));
    Ok(())
}

fn push_reading(
    context: &Context,
    source: &Source,
    (staging, bus): (StagingOptions, f64),
    report: &mut Report,
) -> Result<(), Failure> {
    let file = &source.file;
    let seconds =
        filling(context, staging, source.n_bytes, |at, buffer| file.read_exact_at(buffer, at as u64))?;
    report.push(line("readers alone", staging, seconds, Work::Load { n_bytes: source.n_bytes, bus }));
    Ok(())
}

/// The parts alone, as the engine would have them.
pub(crate) fn run(
    gpu: &Gpu,
    driver: &Driver,
    (source, bus): (&Source, f64),
    report: &mut Report,
) -> Result<(), Failure> {
    let context = Context::new(driver, gpu.backend.describe().ordinal)?;
    let staging = StagingOptions::of_cores(n_cores());
    push_reading(&context, source, (staging, bus), report)?;
    push_sending(gpu, driver, (staging, bus), report)?;
    report.push(line("start and end", staging, starting(gpu, driver, staging)?, Work::Latency));
    // Without a file: what copying alone costs.
    let mut memory = MmapMut::map_anon(MEMORY_BYTES)?;
    memory.fill(0x5a);
    let seconds = filling(&context, staging, MEMORY_BYTES, |at, buffer| {
        buffer.copy_from_slice(&memory[at..at + buffer.len()]);
        Ok(())
    })?;
    report.push(line("memory to pinned", staging, seconds, Work::Load { n_bytes: MEMORY_BYTES, bus }));
    Ok(())
}

/// The same with other numbers, and the whole with all of them: the better of two passes each.
pub(crate) fn sweep(
    gpu: &Gpu,
    driver: &Driver,
    (source, bus): (&Source, f64),
    report: &mut Report,
) -> Result<(), Failure> {
    let start = Instant::now();
    let context = Context::new(driver, gpu.backend.describe().ordinal)?;
    let all = || {
        let numbers =
            READERS.into_iter().flat_map(|n_readers| CHUNKS.map(|chunk_bytes| (n_readers, chunk_bytes)));
        numbers.flat_map(|(n_readers, chunk_bytes)| {
            BUFFERS.map(|n_buffers| StagingOptions { n_readers, chunk_bytes, n_buffers })
        })
    };
    for staging in all().filter(|staging| staging.n_buffers == BUFFERS[0]) {
        push_reading(&context, source, (staging, bus), report)?;
    }
    for staging in all().filter(|staging| staging.n_buffers == BUFFERS[0] && staging.n_readers == READERS[0])
    {
        push_sending(gpu, driver, (staging, bus), report)?;
    }
    for staging in all() {
        let (first, second) = (started_pass(gpu, staging, source)?, started_pass(gpu, staging, source)?);
        let seconds = first.whole.min(second.whole);
        let work = Work::Load { n_bytes: source.n_bytes, bus };
        report.push(line("sweep", staging, seconds, work));
    }
    report.say(format!("load: swept in {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}
