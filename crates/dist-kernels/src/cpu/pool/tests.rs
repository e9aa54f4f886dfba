//! Every task runs once, panics arrive, threads sleep and wake, and nothing is left behind.

use super::*;

fn pool(n_threads: usize, spin_us: u64) -> Pool {
    Pool::new(n_threads, Duration::from_micros(spin_us)).unwrap()
}

#[test]
fn every_task_runs_once() {
    for n_threads in 1..=5 {
        for spin_us in [0, 50] {
            let pool = pool(n_threads, spin_us);
            for n_tasks in [0, 1, 2, 3, 7, 64, 501] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run_with_thread(n_tasks, &|idx, thread| {
                    assert!(thread < n_threads);
                    counts[idx].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }
}

#[test]
fn thousands_of_short_jobs_leave_no_one_asleep() {
    for spin_us in [0, 1, 20] {
        let pool = pool(4, spin_us);
        let sum = AtomicUsize::new(0);
        for round in 0..5000 {
            pool.run(3, &|idx| {
                sum.fetch_add(idx + 1, Ordering::Relaxed);
            });
            assert_eq!(sum.load(Ordering::Relaxed), 6 * (round + 1));
            if round % 1000 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

#[test]
fn a_panic_arrives_at_the_caller_and_the_pool_lives_on() {
    let pool = pool(3, 10);
    for _ in 0..20 {
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(16, &|idx| assert!(idx != 7, "task seven"));
        }));
        let message = *caught.unwrap_err().downcast::<&str>().unwrap();
        assert_eq!(message, "task seven");
        let ran = AtomicUsize::new(0);
        pool.run(16, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 16);
    }
}

#[test]
#[should_panic(expected = "a job while another job runs")]
fn a_job_within_a_task_is_a_bug() {
    let pool = pool(3, 10);
    pool.run(4, &|_| pool.run(5, &|_| {}));
}

#[test]
fn tasks_write_disjoint_pieces() {
    let mut out = vec![0_u32; 1000];
    let pieces = Disjoint::new(&mut out);
    pool(4, 10).run(10, &|idx| {
        // SAFETY: each task has its own hundred elements.
        unsafe { pieces.piece(100 * idx, 100) }.fill(idx as u32);
    });
    assert!(out.iter().enumerate().all(|(i, &x)| x == i as u32 / 100));
}

#[test]
#[should_panic(expected = "piece 6+5 of 10")]
fn a_piece_stays_inside() {
    let mut out = [0_u8; 10];
    // SAFETY: there is one piece only, and it panics.
    unsafe { Disjoint::new(&mut out).piece(6, 5) };
}
