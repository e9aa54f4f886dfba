//! Weights on their way to the GPU: several threads copy them (out of their file, as a rule) to pinned memory of their
//! own, from where the GPU fetches one buffer while the next is filled. There is no second copy of a weight on the host.
//!
//! A reader has buffers, a stream and events for itself, so that nobody hands it anything but the places to read: it
//! fills a buffer, asks for its copy and takes the next one. All buffers together are small enough to stay in the
//! processor's last cache, so that a byte crosses the host's memory once, when it is read. Readers stay from the first
//! weight to the last; `queue.rs` says why.

mod queue;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use super::driver::{Context, CudaError, DeviceMemory, Driver, Event, PinnedMemory, Result, Stream, Target};
pub use queue::Fill;
use queue::{Failure, Job, Order, Piece, Queue};

/// More readers than this are no faster than the bus.
const READERS_MAX: usize = 16;
/// Bytes that may wait to be read when the next weight is asked for: the readers' work for the time that it takes to get
/// memory for a large one, and little enough for weights that lie in memory and not in a file.
const AHEAD_BYTES: usize = 256 << 20;

/// How weights travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingOptions {
    /// Threads that fill buffers.
    pub n_readers: usize,
    /// Bytes of a buffer.
    pub chunk_bytes: usize,
    /// Buffers of a reader: it fills one while others are on their way.
    pub n_buffers: usize,
}

impl StagingOptions {
    /// For a machine with so many cores.
    pub fn of_cores(n_cores: usize) -> Self {
        // Measured: fewer do not read as much as the bus carries, and more are in each other's way.
        Self { n_readers: (n_cores * 3 / 4).clamp(1, READERS_MAX), chunk_bytes: 2 << 20, n_buffers: 2 }
    }
}

/// The readers.
pub struct Staging(Team<Lane>);

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Staging({} readers)", self.0.readers.len())
    }
}

impl Staging {
    /// Starts the readers, each of which takes its buffers: that takes tens of milliseconds, in which nobody waits for it.
    pub fn new(driver: &Driver, ordinal: usize, options: StagingOptions) -> Result<Self> {
        let driver = driver.clone();
        let open: Open<Lane> = Arc::new(move || Lane::open(&Context::new(&driver, ordinal)?, options));
        let queue = Queue::new(options.chunk_bytes, AHEAD_BYTES);
        Ok(Self(Team::start(options.n_readers, queue, &open, Builder::new)?))
    }

    /// Brings rows, how many and of how many bytes, to the bytes of `dst` from `at` on. `fill(from, buffer)` writes those
    /// from `from` on to a buffer. When this returns most may still have to be read, and the error may be of an earlier
    /// load: see [`Self::finish`]. After an error nothing more is read.
    pub fn load(
        &mut self,
        dst: &mut DeviceMemory,
        at: usize,
        (n_rows, row_bytes): (usize, usize),
        fill: Fill,
    ) -> Result<()> {
        let job = Job { target: dst.target(), at, n_bytes: n_rows * row_bytes, row_bytes, fill };
        told(self.0.queue.push(job))
    }

    /// Waits until everything has arrived; bytes that are missing are told whenever it is asked.
    pub fn finish(&self) -> Result<()> {
        told(self.0.queue.finish())
    }
}

/// A panic of a reader goes on in the thread that asked.
fn told(result: std::result::Result<(), Failure>) -> Result<()> {
    match result {
        Ok(()) => Ok(()),
        Err(Failure::Told(error)) => Err(error),
        Err(Failure::Panic(panic)) => resume_unwind(panic),
    }
}

/// A reader's buffers, and who takes the bytes out of them, later. It lives on the reader's thread.
trait Sink: Sized + 'static {
    /// Where bytes come to.
    type Target: Send + Sync;
    /// The next buffer, as soon as its bytes have been taken.
    fn buffer(&mut self) -> Result<&mut [u8]>;
    /// Asks for the first `n_bytes` of that buffer to be taken to the place from `at` on.
    fn send(&mut self, target: &Self::Target, at: usize, n_bytes: usize) -> Result<()>;
    /// Waits until all that was asked for has been taken.
    fn drain(&mut self) -> Result<()>;
}

/// Makes a reader's sink on its thread.
type Open<S> = Arc<dyn Fn() -> Result<S> + Send + Sync>;

/// Threads that read what is in the queue. They end with this value, which waits for them.
struct Team<S: Sink> {
    queue: Arc<Queue<S::Target>>,
    readers: Vec<JoinHandle<()>>,
}

impl<S: Sink> Team<S> {
    /// `thread` begins each reader's.
    fn start(
        n_readers: usize,
        queue: Queue<S::Target>,
        open: &Open<S>,
        thread: fn() -> Builder,
    ) -> Result<Self> {
        let mut team = Self { queue: Arc::new(queue), readers: Vec::with_capacity(n_readers) };
        for _ in 0..n_readers.max(1) {
            let (queue, open) = (Arc::clone(&team.queue), Arc::clone(open));
            match thread().name("weights".to_owned()).spawn(move || read(&queue, &*open)) {
                Ok(reader) => team.readers.push(reader),
                // Its work is left to those that are there.
                Err(error) if team.readers.is_empty() => {
                    return Err(CudaError::NoThread { why: error.to_string() });
                }
                Err(_) => break,
            }
        }
        Ok(team)
    }
}

impl<S: Sink> Drop for Team<S> {
    fn drop(&mut self) {
        self.queue.close();
        for reader in self.readers.drain(..) {
            // A panic was told by whoever waited for the weights.
            let _ = reader.join();
        }
    }
}

/// A reader.
fn read<S: Sink>(queue: &Queue<S::Target>, open: &dyn Fn() -> Result<S>) {
    // If this fails so does the first piece, which tries again, and then somebody is there to be told.
    let mut sink = catch_unwind(AssertUnwindSafe(open)).ok().and_then(Result::ok);
    let mut is_sending = false;
    while let Some(order) = queue.next(&mut is_sending) {
        match order {
            Order::Read(piece) => {
                let n_bytes = piece.n_bytes;
                let sent = caught(|| pass(&mut sink, piece, open));
                queue.sent(n_bytes, sent);
            }
            Order::Drain => {
                let drained = caught(|| match &mut sink {
                    Some(sink) => sink.drain().map_err(Failure::Told),
                    None => Ok(()),
                });
                is_sending = false;
                queue.drained(drained);
            }
        }
    }
}

fn caught(work: impl FnOnce() -> std::result::Result<(), Failure>) -> std::result::Result<(), Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Failure::Panic(panic)))
}

/// Reads a piece and sends it.
fn pass<S: Sink>(
    sink: &mut Option<S>,
    piece: Piece<S::Target>,
    open: &dyn Fn() -> Result<S>,
) -> std::result::Result<(), Failure> {
    let Piece { job, from, n_bytes } = piece;
    let sink = match sink {
        Some(sink) => sink,
        None => sink.insert(open().map_err(Failure::Told)?),
    };
    let buffer = sink.buffer().map_err(Failure::Told)?;
    let unreadable = |error: std::io::Error| CudaError::Unreadable { why: error.to_string() };
    (job.fill)(from, &mut buffer[..n_bytes]).map_err(unreadable).map_err(Failure::Told)?;
    sink.send(&job.target, job.at + from, n_bytes).map_err(Failure::Told)
}

/// A reader's way to the GPU.
struct Lane {
    stream: Stream,
    /// After each buffer's last copy.
    fetched: Vec<Event>,
    pinned: PinnedMemory,
    chunk_bytes: usize,
    current: usize,
}

impl Lane {
    fn open(context: &Context, options: StagingOptions) -> Result<Self> {
        let StagingOptions { chunk_bytes, n_buffers, .. } = options;
        let pinned = context.alloc_pinned("staging of weights", n_buffers * chunk_bytes)?;
        let fetched = (0..n_buffers).map(|_| context.event()).collect::<Result<_>>()?;
        Ok(Self { stream: context.stream()?, fetched, pinned, chunk_bytes, current: 0 })
    }
}

impl Sink for Lane {
    type Target = Target;

    fn buffer(&mut self) -> Result<&mut [u8]> {
        self.fetched[self.current].synchronize()?;
        Ok(&mut self.pinned.bytes_mut()[self.current * self.chunk_bytes..][..self.chunk_bytes])
    }

    fn send(&mut self, target: &Target, at: usize, n_bytes: usize) -> Result<()> {
        let bytes = &self.pinned.bytes()[self.current * self.chunk_bytes..][..n_bytes];
        self.stream.copy_to_target(target, at, bytes)?;
        self.stream.record(&self.fetched[self.current])?;
        self.current = (self.current + 1) % self.fetched.len();
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        self.stream.synchronize()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // The buffers go next. An error was told by whoever waited for the weights.
        let _ = self.stream.synchronize();
    }
}

#[cfg(test)]
mod tests;
