//! Threads that help with a piece of work, as many as the system gives.

use std::thread::Builder;

/// Runs `own` on this thread and `help` on up to `n` others, and waits for all. What helpers that cannot be started
/// would have done is left to those that are there: `own` must come to an end alone. `thread` begins each helper's.
pub(crate) fn with_helpers(n: usize, thread: fn() -> Builder, help: impl Fn() + Sync, own: impl FnOnce()) {
    let help = &help;
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..n).map_while(|_| thread().spawn_scoped(scope, help).ok()).collect();
        own();
        for helper in helpers {
            helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn all_is_done_with_helpers_and_without() {
        // No address space has room for such a stack.
        let none: fn() -> Builder = || Builder::new().stack_size(1 << 60);
        for (n, thread, n_threads) in
            [(0, Builder::new as fn() -> Builder, 1), (3, Builder::new, 4), (3, none, 1)]
        {
            let (next, done, began) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
            let work = || {
                began.fetch_add(1, Ordering::Relaxed);
                while next.fetch_add(1, Ordering::Relaxed) < 1000 {
                    done.fetch_add(1, Ordering::Relaxed);
                }
            };
            with_helpers(n, thread, work, work);
            assert_eq!((done.into_inner(), began.into_inner()), (1000, n_threads), "{n}");
        }
    }
}
