//! Weights on their way to the GPU: several threads copy them (out of mapped files, whose pages come in meanwhile) to a
//! few buffers of pinned memory, and the GPU fetches one buffer while others are filled. There is no second copy of a
//! weight on the host.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::driver::{Context, CudaError, DeviceMemory, Event, PinnedMemory, Result, Stream};

/// Buffers of a reader: it fills one while others are on their way.
const BUFFERS_A_READER: usize = 4;

/// How weights travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingOptions {
    /// Threads that fill buffers.
    pub n_readers: usize,
    /// Bytes of a buffer; there are four for each thread.
    pub chunk_bytes: usize,
}

impl StagingOptions {
    /// For a machine with so many cores: more readers than this are no faster than the bus.
    pub fn of_cores(n_cores: usize) -> Self {
        // Small enough that all readers have something of every matrix, large enough for the bus.
        Self { n_readers: n_cores.clamp(1, 16), chunk_bytes: 2 << 20 }
    }
}

/// Buffers, and the stream on which they are fetched.
#[derive(Debug)]
pub struct Staging {
    options: StagingOptions,
    lane: Lane,
    pinned: PinnedMemory,
}

/// The GPU's side of the buffers.
#[derive(Debug)]
struct Lane {
    stream: Stream,
    /// After each buffer's last copy.
    fetched: Vec<Event>,
}

impl Staging {
    /// Takes the buffers.
    pub fn new(context: &Context, options: StagingOptions) -> Result<Self> {
        let n_buffers = BUFFERS_A_READER * options.n_readers;
        let pinned = context.alloc_pinned("staging of weights", n_buffers * options.chunk_bytes)?;
        let stream = context.stream()?;
        let fetched = (0..n_buffers).map(|_| context.event()).collect::<Result<_>>()?;
        Ok(Self { options, lane: Lane { stream, fetched }, pinned })
    }

    /// Brings `n_bytes` to the bytes of `dst` from `at` on. `fill(from, buffer)` writes those from `from` on to a buffer;
    /// several threads call it at once. When this returns all bytes have been read, and the last are still on their way:
    /// see [`Self::finish`].
    pub fn load(&mut self, dst: &mut DeviceMemory, at: usize, n_bytes: usize, fill: Fill<'_>) -> Result<()> {
        let mut load = Load { lane: &self.lane, dst, at };
        let buffers = self.pinned.bytes_mut().chunks_mut(self.options.chunk_bytes);
        carry(buffers.collect(), self.options.n_readers, n_bytes, fill, &mut load)
    }

    /// Waits until everything has arrived.
    pub fn finish(&self) -> Result<()> {
        self.lane.stream.synchronize()
    }
}

/// One load's way to the GPU.
struct Load<'a> {
    lane: &'a Lane,
    dst: &'a mut DeviceMemory,
    at: usize,
}

impl Sink for Load<'_> {
    fn fetch(&mut self, buffer: usize, at: usize, bytes: &[u8]) -> Result<()> {
        self.lane.stream.copy_in_slice(self.dst, self.at + at, bytes)?;
        self.lane.stream.record(&self.lane.fetched[buffer])
    }

    fn is_fetched(&mut self, buffer: usize) -> Result<bool> {
        self.lane.fetched[buffer].is_done()
    }

    fn wait(&mut self, buffer: usize) -> Result<()> {
        self.lane.fetched[buffer].synchronize()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The buffers go next. An error was told by whoever waited for the weights.
        let _ = self.finish();
    }
}

/// Who takes the bytes of a buffer, later.
trait Sink {
    /// Asks for a buffer's bytes to be taken to the place from `at` on.
    fn fetch(&mut self, buffer: usize, at: usize, bytes: &[u8]) -> Result<()>;
    /// Whether the bytes that were last asked for have been taken; true if none were.
    fn is_fetched(&mut self, buffer: usize) -> Result<bool>;
    /// Waits until they are.
    fn wait(&mut self, buffer: usize) -> Result<()>;
}

/// A buffer that is on its way to a reader and back.
struct Job<'a> {
    buffer: usize,
    bytes: &'a mut [u8],
    at: usize,
    n_bytes: usize,
    /// Why the reader could not fill it.
    failed: Option<Failure>,
}

/// Writes the bytes from a place on to a buffer.
type Fill<'a> = &'a (dyn Fn(usize, &mut [u8]) -> io::Result<()> + Sync);

/// What became of a reader.
enum Failure {
    Panic(Box<dyn Any + Send>),
    Read(io::Error),
}

/// Moves `n_bytes` through `buffers` into `sink`.
fn carry(
    buffers: Vec<&mut [u8]>,
    n_readers: usize,
    n_bytes: usize,
    fill: Fill<'_>,
    sink: &mut dyn Sink,
) -> Result<()> {
    let chunk_bytes = buffers[0].len();
    // One reader is enough for what fits in one buffer.
    let n_readers = n_readers.min(n_bytes.div_ceil(chunk_bytes)).max(1);
    let (jobs, todo) = channel::<Job>();
    let (filled, done) = channel::<Job>();
    let todo = Mutex::new(todo);
    std::thread::scope(|scope| {
        for _ in 0..n_readers {
            let (todo, filled) = (&todo, filled.clone());
            scope.spawn(move || read(todo, &filled, fill));
        }
        drop(filled);
        // Without jobs the readers end, whatever becomes of this.
        feed(buffers, n_bytes, jobs, &done, sink)
    })
}

/// A reader: fills buffers until there are no more jobs.
fn read<'a>(todo: &Mutex<Receiver<Job<'a>>>, filled: &Sender<Job<'a>>, fill: Fill<'_>) {
    loop {
        // Nobody panics while it holds the lock.
        let job = todo.lock().map_or(None, |todo| todo.recv().ok());
        let Some(mut job) = job else { return };
        let filling = catch_unwind(AssertUnwindSafe(|| fill(job.at, &mut job.bytes[..job.n_bytes])));
        job.failed = match filling {
            Ok(read) => read.err().map(Failure::Read),
            Err(panic) => Some(Failure::Panic(panic)),
        };
        if filled.send(job).is_err() {
            return;
        }
    }
}

/// Gives free buffers to the readers and full ones to the sink.
fn feed<'a>(
    buffers: Vec<&'a mut [u8]>,
    n_bytes: usize,
    jobs: Sender<Job<'a>>,
    done: &Receiver<Job<'a>>,
    sink: &mut dyn Sink,
) -> Result<()> {
    // In the order in which they will be free: those of an earlier load may still be on their way.
    let mut leaving: VecDeque<(usize, &mut [u8])> = buffers.into_iter().enumerate().collect();
    let (mut at, mut n_out) = (0, 0);
    while at < n_bytes || n_out > 0 {
        while let Some((buffer, _)) = leaving.front().filter(|_| at < n_bytes) {
            if n_out > 0 && !sink.is_fetched(*buffer)? {
                break;
            }
            sink.wait(*buffer)?;
            let Some((buffer, bytes)) = leaving.pop_front() else { break };
            let n_bytes = bytes.len().min(n_bytes - at);
            // The readers end only when `jobs` is gone.
            let sent = jobs.send(Job { buffer, bytes, at, n_bytes, failed: None });
            assert!(sent.is_ok(), "readers wait for jobs");
            (at, n_out) = (at + n_bytes, n_out + 1);
        }
        let Ok(job) = done.recv() else { break };
        n_out -= 1;
        match job.failed {
            None => {}
            Some(Failure::Read(error)) => return Err(CudaError::Unreadable { why: error.to_string() }),
            Some(Failure::Panic(panic)) => {
                drop(jobs);
                resume_unwind(panic);
            }
        }
        sink.fetch(job.buffer, job.at, &job.bytes[..job.n_bytes])?;
        leaving.push_back((job.buffer, job.bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
