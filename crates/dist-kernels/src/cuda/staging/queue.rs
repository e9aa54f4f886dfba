//! What is to be read: jobs of many bytes, handed to readers in pieces, and what became of them. It knows no GPU.
//!
//! Whoever asks for weights goes on while they are read, a bounded number of bytes ahead: readers have something to do
//! while memory is taken for the next weight, and none of them waits for the last piece of another.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::super::driver::CudaError;

/// Writes the bytes from a place on to a buffer; several threads call it at once.
pub type Fill = Box<dyn Fn(usize, &mut [u8]) -> io::Result<()> + Send + Sync>;

/// Bytes that shall come to a place.
pub(super) struct Job<T> {
    pub(super) target: T,
    /// Where the first byte comes to.
    pub(super) at: usize,
    pub(super) n_bytes: usize,
    /// Pieces are whole rows of so many bytes, where a piece has room for one: a row that is cut costs two reads.
    pub(super) row_bytes: usize,
    pub(super) fill: Fill,
}

/// A part of a job: the bytes from `from` on.
pub(super) struct Piece<T> {
    pub(super) job: Arc<Job<T>>,
    pub(super) from: usize,
    pub(super) n_bytes: usize,
}

/// What a reader does next.
pub(super) enum Order<T> {
    /// Reads, and sends what it has read.
    Read(Piece<T>),
    /// Waits until all that it has sent has arrived.
    Drain,
}

/// Why bytes did not come.
pub(super) enum Failure {
    /// A reader panicked.
    Panic(Box<dyn Any + Send>),
    /// They could not be read, or the GPU did not take them.
    Told(CudaError),
}

impl Failure {
    /// What is told of it, as often as somebody asks. There is one panic: who asks later hears that it was.
    fn tell(&mut self) -> Self {
        let again = match self {
            Self::Told(error) => return Self::Told(error.clone()),
            Self::Panic(panic) => {
                let text = panic.downcast_ref::<&str>().copied();
                let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                CudaError::ReaderPanicked { message: text.unwrap_or("it did not say why").to_owned() }
            }
        };
        std::mem::replace(self, Self::Told(again))
    }
}

/// Jobs, and how far they are.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    /// There may be something to do for a reader.
    work: Condvar,
    /// Something was done, for whoever asked for it.
    done: Condvar,
    piece_bytes: usize,
    ahead_bytes: usize,
}

struct State<T> {
    jobs: VecDeque<Arc<Job<T>>>,
    /// Bytes of the first job that were handed out.
    handed_out: usize,
    /// Bytes of all jobs that have not been read and sent.
    n_waiting: usize,
    /// Readers that have sent something and not waited for it.
    n_sending: usize,
    /// Whether somebody waits for all of it to arrive.
    is_finishing: bool,
    is_closed: bool,
    /// The first one. It stays: bytes are missing from then on.
    failed: Option<Failure>,
}

impl<T> State<T> {
    /// The next piece of at most `n_bytes_max`.
    fn piece(&mut self, n_bytes_max: usize) -> Option<Piece<T>> {
        let job = Arc::clone(self.jobs.front()?);
        let from = self.handed_out;
        let n_rows = n_bytes_max / job.row_bytes.max(1);
        let whole = if n_rows > 0 { n_rows * job.row_bytes } else { n_bytes_max };
        let n_bytes = whole.min(job.n_bytes - from);
        self.handed_out += n_bytes;
        if self.handed_out == job.n_bytes {
            self.drop_first();
        }
        Some(Piece { job, from, n_bytes })
    }

    fn drop_first(&mut self) {
        self.jobs.pop_front();
        self.handed_out = 0;
    }

    /// Forgets what was not handed out.
    fn clear(&mut self) {
        while let Some(job) = self.jobs.front() {
            self.n_waiting -= job.n_bytes - self.handed_out;
            self.drop_first();
        }
    }
}

impl<T> Queue<T> {
    /// For pieces of `piece_bytes`; whoever asks waits as long as more than `ahead_bytes` have not been read.
    pub(super) fn new(piece_bytes: usize, ahead_bytes: usize) -> Self {
        let state = State {
            jobs: VecDeque::new(),
            handed_out: 0,
            n_waiting: 0,
            n_sending: 0,
            is_finishing: false,
            is_closed: false,
            failed: None,
        };
        let (work, done) = (Condvar::new(), Condvar::new());
        Self { state: Mutex::new(state), work, done, piece_bytes, ahead_bytes }
    }

    /// Nobody panics while it holds the lock; what is done under it is complete at each step all the same.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for room, and tells what went wrong before: then the job is not taken in.
    pub(super) fn push(&self, job: Job<T>) -> Result<(), Failure> {
        let is_full = |state: &mut State<T>| state.n_waiting > self.ahead_bytes && state.failed.is_none();
        let guard = self.done.wait_while(self.lock(), is_full);
        let mut state = guard.unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = &mut state.failed {
            return Err(failure.tell());
        }
        if job.n_bytes > 0 {
            state.n_waiting += job.n_bytes;
            state.jobs.push_back(Arc::new(job));
            drop(state);
            self.work.notify_all();
        }
        Ok(())
    }

    /// Waits until all bytes have arrived, and tells what went wrong, be it that a push has told it.
    pub(super) fn finish(&self) -> Result<(), Failure> {
        let mut state = self.lock();
        state.is_finishing = true;
        self.work.notify_all();
        let is_under_way = |state: &mut State<T>| state.n_waiting > 0 || state.n_sending > 0;
        let guard = self.done.wait_while(state, is_under_way);
        let mut state = guard.unwrap_or_else(PoisonError::into_inner);
        state.is_finishing = false;
        state.failed.as_mut().map_or(Ok(()), |failure| Err(failure.tell()))
    }

    /// Readers end as soon as they have done what they are at.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.is_closed = true;
        state.clear();
        self.work.notify_all();
    }

    /// What a reader does next; waits for it. `None`: it ends. `is_sending`: whether it has sent something and not waited
    /// for it, which this keeps up to date.
    pub(super) fn next(&self, is_sending: &mut bool) -> Option<Order<T>> {
        let mut state = self.lock();
        loop {
            if state.is_closed {
                return None;
            }
            if let Some(piece) = state.piece(self.piece_bytes) {
                state.n_sending += usize::from(!*is_sending);
                *is_sending = true;
                return Some(Order::Read(piece));
            }
            if state.is_finishing && *is_sending {
                return Some(Order::Drain);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A piece of `n_bytes` was read and sent, or why it was not.
    pub(super) fn sent(&self, n_bytes: usize, sent: Result<(), Failure>) {
        let mut state = self.lock();
        state.n_waiting -= n_bytes;
        self.end(state, sent);
    }

    /// All that a reader has sent has arrived, or why it has not.
    pub(super) fn drained(&self, drained: Result<(), Failure>) {
        let mut state = self.lock();
        state.n_sending -= 1;
        self.end(state, drained);
    }

    fn end(&self, mut state: MutexGuard<'_, State<T>>, result: Result<(), Failure>) {
        if let Err(failure) = result {
            state.failed.get_or_insert(failure);
            state.clear();
        }
        drop(state);
        self.done.notify_all();
    }
}
