//! Threads of our own that stay warm: they spin for a moment after a job, then sleep until the next one.
//!
//! A job is a number of tasks. Each thread, the caller among them, has a run of consecutive ones, so that it walks
//! through memory; who is done takes from the others' runs. Tasks write disjoint outputs and never add into each
//! other's, so who runs which task is without influence on the result.
//! A worker that wakes up too late for a job simply misses it: ranks that share cores never wait for a sleeper.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dist_core::shape::split_even;

/// A job is open to workers while this bit of the state is set.
const OPEN: u64 = 1 << 32;
/// Jobs are counted above it, workers inside the job below it.
const EPOCH: u64 = 1 << 33;
/// The bits that count the workers inside.
const INSIDE: u64 = OPEN - 1;

/// A fixed set of threads.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    caller: Mutex<()>,
    /// One for each thread.
    taken: Vec<Padded<AtomicUsize>>,
}

#[derive(Debug)]
struct Shared {
    /// Epoch, open bit and workers inside, changed together.
    state: Padded<AtomicU64>,
    /// The job of this epoch; valid while it is open or somebody is inside.
    job: AtomicPtr<Job<'static>>,
    /// Threads that sleep or are about to.
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    spin: Duration,
}

/// Keeps neighbours out of a cache line that changes hands often.
#[derive(Debug)]
#[repr(align(128))]
struct Padded<T>(T);

struct Job<'a> {
    task: &'a (dyn Fn(usize, usize) + Sync),
    n_tasks: usize,
    /// How far each thread's run of tasks has come.
    taken: &'a [Padded<AtomicUsize>],
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    /// Does the thread's own run of tasks, then what is left of the others'.
    fn work(&self, thread: usize) {
        let n_runs = self.taken.len();
        for run in (thread..n_runs).chain(0..thread) {
            let (first, len) = split_even(self.n_tasks, n_runs, run);
            loop {
                let idx = self.taken[run].0.fetch_add(1, Ordering::Relaxed);
                if idx >= len {
                    break;
                }
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.task)(first + idx, thread))) {
                    self.taken.iter().for_each(|taken| taken.0.store(self.n_tasks, Ordering::Relaxed));
                    locked(&self.panic).get_or_insert(panic);
                }
            }
        }
    }
}

impl Pool {
    /// Starts `n_threads − 1` threads, the caller being the other one; idle threads spin for `spin` before they sleep.
    pub(crate) fn new(n_threads: usize, spin: Duration) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Padded(AtomicU64::new(0)),
            job: AtomicPtr::new(std::ptr::null_mut()),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            spin,
        });
        let taken = (0..n_threads.max(1)).map(|_| Padded(AtomicUsize::new(0))).collect();
        let mut pool = Self { shared, workers: Vec::new(), caller: Mutex::new(()), taken };
        for idx in 1..n_threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("kernel-{idx}"));
            pool.workers.push(builder.spawn(move || shared.serve(idx))?);
        }
        Ok(pool)
    }

    /// Threads that work, the caller included.
    pub(crate) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0) … task(n_tasks − 1)`, in any order and on any thread, and returns when all are done.
    pub(crate) fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.run_with_thread(n_tasks, &|idx, _| task(idx));
    }

    /// As [`Pool::run`]; the second argument of `task` is the number of the thread, below [`Pool::n_threads`].
    ///
    /// A thread's number is its own as long as the job runs. A panic in a task is raised here, after all tasks that had
    /// begun are over. A call while another job runs, such as from within a task, is a bug and panics.
    pub(crate) fn run_with_thread(&self, n_tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        let caller = match self.caller.try_lock() {
            Err(TryLockError::WouldBlock) => panic!("a job while another job runs"),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Ok(guard) => guard,
        };
        if n_tasks <= 1 || self.workers.is_empty() {
            return (0..n_tasks).for_each(|idx| task(idx, 0));
        }
        self.taken.iter().for_each(|taken| taken.0.store(0, Ordering::Relaxed));
        let job = Job { task, n_tasks, taken: &self.taken, panic: Mutex::new(None) };
        self.shared.publish(&job);
        job.work(0);
        self.shared.close();
        drop(caller);
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for worker in self.workers.drain(..) {
            // Panics of tasks were caught and raised in `run`; the worker's own loop has none.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Opens a job. The previous one is closed and empty: `run_with_thread` holds `caller` and ends with `close`.
    fn publish(&self, job: &Job<'_>) {
        self.job.store(std::ptr::from_ref(job).cast_mut().cast(), Ordering::Relaxed);
        let state = self.state.0.load(Ordering::Relaxed);
        self.state.0.store((state & !(EPOCH - 1)).wrapping_add(EPOCH) | OPEN, Ordering::SeqCst);
        self.wake_all();
    }

    /// Lets nobody in any more and waits until everybody is out.
    fn close(&self) {
        self.state.0.fetch_and(!OPEN, Ordering::SeqCst);
        self.wait_until(|| self.state.0.load(Ordering::SeqCst) & INSIDE == 0);
    }

    /// A worker's life.
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            self.wait_until(|| {
                let state = self.state.0.load(Ordering::SeqCst);
                (state & OPEN != 0 && state / EPOCH != seen) || self.stop.load(Ordering::SeqCst)
            });
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let state = self.state.0.load(Ordering::SeqCst);
            if state & OPEN == 0 || state / EPOCH == seen || !self.enter(state) {
                continue;
            }
            seen = state / EPOCH;
            // SAFETY: `enter` counted us in while the job was open, and `run_with_thread`, which owns the job, does not
            // return before the count is back at zero.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            job.work(thread);
            let before = self.state.0.fetch_sub(1, Ordering::SeqCst);
            if before & INSIDE == 1 && before & OPEN == 0 {
                self.wake_all();
            }
        }
    }

    /// Counts this worker in, if the state is still `state`.
    fn enter(&self, state: u64) -> bool {
        self.state.0.compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Spins for a moment, then sleeps, until `done`.
    fn wait_until(&self, done: impl Fn() -> bool) {
        let mut deadline = None;
        while !done() {
            for _ in 0..32 {
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now >= *deadline.get_or_insert(now + self.spin) {
                let mut guard = locked(&self.lock);
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                while !done() {
                    guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Wakes whoever sleeps. Who is about to sleep counts itself first and then looks at the state, in one order with
    /// the change of state and the look at the count here, so one of the two sees the other.
    fn wake_all(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(locked(&self.lock));
            self.wake.notify_all();
        }
    }
}

/// Locks; a panic while it was held left nothing half done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice that tasks write in disjoint pieces.
pub(crate) struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out pieces of a `&mut [T]`, which may be sent where `T` may; that no two overlap is the promise of
// whoever calls `piece`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    /// Borrows the slice for as long as pieces are used.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), owner: std::marker::PhantomData }
    }

    /// Elements `start .. start + len`; panics if they lie outside.
    ///
    /// # Safety
    /// No other piece that is alive overlaps it.
    #[allow(clippy::mut_from_ref)] // Disjoint pieces of one slice are what this type is for.
    pub(crate) unsafe fn piece(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "piece {start}+{len} of {}", self.len);
        // SAFETY: in range by the check above, borrowed for 'a, and unique by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(start), len) }
    }
}

#[cfg(test)]
mod tests;
