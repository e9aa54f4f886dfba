//! The way of the bytes, with sinks that take them as late as they may; and on a GPU.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::ThreadId;

use super::super::test_support::Gpu;
use super::*;

/// Memory that bytes come to.
type Place = Arc<Mutex<Vec<u8>>>;

fn place(n_bytes: usize) -> Place {
    Arc::new(Mutex::new(vec![0xee; n_bytes]))
}

/// Takes a buffer's bytes only when somebody waits for them: what is overwritten too early is lost.
struct Late {
    buffers: Vec<Vec<u8>>,
    sent: Vec<Option<(Place, usize, usize)>>,
    current: usize,
}

impl Late {
    fn open(n_buffers: usize, chunk: usize) -> Self {
        Self { buffers: vec![vec![0; chunk]; n_buffers], sent: vec![None; n_buffers], current: 0 }
    }

    fn take(&mut self, buffer: usize) {
        if let Some((place, at, n_bytes)) = self.sent[buffer].take() {
            let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
            place[at..at + n_bytes].copy_from_slice(&self.buffers[buffer][..n_bytes]);
        }
    }
}

impl Sink for Late {
    type Target = Place;

    fn buffer(&mut self) -> Result<&mut [u8]> {
        self.take(self.current);
        Ok(&mut self.buffers[self.current])
    }

    fn send(&mut self, target: &Place, at: usize, n_bytes: usize) -> Result<()> {
        self.sent[self.current] = Some((Arc::clone(target), at, n_bytes));
        self.current = (self.current + 1) % self.buffers.len();
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        (0..self.buffers.len()).for_each(|buffer| self.take(buffer));
        Ok(())
    }
}

fn team(n_readers: usize, n_buffers: usize, chunk: usize, ahead: usize) -> Team<Late> {
    let open: Open<Late> = Arc::new(move || Ok(Late::open(n_buffers, chunk)));
    Team::start(n_readers, Queue::new(chunk, ahead), &open, Builder::new).unwrap()
}

/// A job of single bytes.
fn job(target: &Place, at: usize, n_bytes: usize, fill: Fill) -> Job<Place> {
    Job { target: Arc::clone(target), at, n_bytes, row_bytes: 1, fill }
}

fn byte(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

/// Bytes that are those of a file from `first` on.
fn filling(first: usize) -> Fill {
    Box::new(move |from, buffer| {
        for (offset, to) in buffer.iter_mut().enumerate() {
            *to = byte(first + from + offset);
        }
        Ok(())
    })
}

#[test]
fn every_byte_arrives_and_no_buffer_is_filled_too_early() {
    for (n_readers, n_buffers, chunk, n_bytes) in [
        (1, 1, 64, 1),
        (1, 2, 64, 64),
        (2, 2, 64, 65),
        (3, 4, 64, 64 * 50 + 7),
        (8, 2, 16, 4001),
        (4, 2, 64, 0),
    ] {
        let team = team(n_readers, n_buffers, chunk, 100);
        let target = place(n_bytes);
        // The second time with readers that have waited.
        for first in [0, 9] {
            told(team.queue.push(job(&target, 0, n_bytes, filling(first)))).unwrap();
            told(team.queue.finish()).unwrap();
        }
        let found = target.lock().unwrap();
        assert!(
            found.iter().enumerate().all(|(at, &found)| found == byte(at + 9)),
            "{n_readers} {n_buffers} {chunk} {n_bytes}"
        );
    }
}

#[test]
fn weights_of_all_sizes_follow_each_other() {
    let sizes: Vec<usize> = (0..200).map(|i| [3, 0, 1000, 17, 64, 65, 4096][i % 7] + i % 5).collect();
    let total: usize = sizes.iter().sum();
    for ahead in [0, 500, usize::MAX] {
        let (team, target) = (team(3, 2, 64, ahead), place(total));
        let mut at = 0;
        for &n_bytes in &sizes {
            told(team.queue.push(job(&target, at, n_bytes, filling(at)))).unwrap();
            at += n_bytes;
        }
        told(team.queue.finish()).unwrap();
        assert!(target.lock().unwrap().iter().enumerate().all(|(at, &found)| found == byte(at)), "{ahead}");
    }
}

#[test]
fn pieces_are_whole_rows_where_they_have_room() {
    let place = place(1200);
    for (row_bytes, expected) in [(1, 64), (24, 48), (64, 64), (65, 64), (300, 64)] {
        let queue = Queue::new(64, 0);
        told(queue.push(Job { row_bytes, ..job(&place, 0, 1200, filling(0)) })).unwrap();
        let (mut at, mut is_sending) = (0, false);
        while at < 1200 {
            let Some(Order::Read(piece)) = queue.next(&mut is_sending) else { panic!("bytes are left") };
            assert_eq!((piece.from, piece.n_bytes), (at, expected.min(1200 - at)), "rows of {row_bytes}");
            at += piece.n_bytes;
        }
    }
}

/// Readers come through when it is opened.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn pass(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |is_open| !*is_open).unwrap());
    }
}

#[test]
fn readers_go_from_one_weight_to_the_next_without_waiting_for_each_other() {
    let (team, target) = (team(2, 2, 64, 1000), place(64 * 40));
    let (gate, others) = (Arc::new(Gate::default()), Arc::new(AtomicUsize::new(0)));
    // One reader is held up; the other one reads the second weight meanwhile, which opens the gate at its end.
    let held = Arc::clone(&gate);
    let slow: Fill = Box::new(move |from, buffer| {
        held.pass();
        filling(0)(from, buffer)
    });
    told(team.queue.push(job(&target, 0, 64, slow))).unwrap();
    let quick: Fill = Box::new(move |from, buffer| {
        if others.fetch_add(1, Ordering::Relaxed) + 1 == 39 {
            gate.open();
        }
        filling(64)(from, buffer)
    });
    told(team.queue.push(job(&target, 64, 64 * 39, quick))).unwrap();
    told(team.queue.finish()).unwrap();
    assert!(target.lock().unwrap().iter().enumerate().all(|(at, &found)| found == byte(at)));
}

#[test]
fn readers_stay() {
    let (team, target) = (team(3, 2, 16, 0), place(16 * 100));
    let seen = Arc::new(Mutex::new(BTreeSet::<String>::new()));
    for _ in 0..50 {
        let seen = Arc::clone(&seen);
        let fill: Fill = Box::new(move |_, _| {
            let id: ThreadId = std::thread::current().id();
            seen.lock().unwrap().insert(format!("{id:?}"));
            Ok(())
        });
        told(team.queue.push(job(&target, 0, 16 * 100, fill))).unwrap();
    }
    told(team.queue.finish()).unwrap();
    assert!(seen.lock().unwrap().len() <= 3);
    drop(team);
    assert_eq!(Arc::strong_count(&target), 1, "readers end, and nothing keeps a place");
}

#[test]
fn a_reader_that_panics_ends_the_load() {
    let team = team(2, 2, 16, 100);
    let bad: Fill = Box::new(|from, _| {
        assert!(from < 500, "the file ends here");
        Ok(())
    });
    told(team.queue.push(job(&place(1000), 0, 1000, bad))).unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| told(team.queue.finish()))).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"the file ends here"));
    // There is one panic to pass on; bytes are missing all the same.
    let expected = CudaError::ReaderPanicked { message: "the file ends here".to_owned() };
    assert_eq!(told(team.queue.finish()), Err(expected.clone()));
    assert_eq!(told(team.queue.push(job(&place(1), 0, 1, filling(0)))), Err(expected));
}

#[test]
fn a_reader_that_cannot_be_started_is_no_damaged_file() {
    let open: Open<Late> = Arc::new(|| Ok(Late::open(2, 16)));
    // No address space has room for such a stack.
    let thread = || Builder::new().stack_size(1 << 60);
    let error = Team::start(2, Queue::new(16, 100), &open, thread).err().expect("no thread");
    assert!(error.to_string().starts_with("no thread could be started to read the weights: "), "{error}");
    let help = error.help().unwrap();
    assert!(help.contains("ulimit -u") && help.contains("container"), "{help}");
}

#[test]
fn bytes_that_cannot_be_read_end_the_load() {
    let team = team(2, 2, 16, 100);
    let short = || -> Fill {
        Box::new(|from, _| if from < 500 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) })
    };
    let load = |n_bytes, fill| told(team.queue.push(job(&place(n_bytes), 0, n_bytes, fill)));
    load(1000, short()).unwrap();
    // Bytes are missing from then on, whoever asks and however often.
    let is_told = |result: Result<()>| {
        assert_eq!(result, Err(CudaError::Unreadable { why: "unexpected end of file".to_owned() }));
    };
    is_told(told(team.queue.finish()));
    is_told(told(team.queue.finish()));
    is_told(load(1, filling(0)));
}

#[test]
fn an_error_that_a_load_told_is_told_at_the_end_too() {
    let team = team(2, 2, 16, 0);
    let unreadable: Fill = Box::new(|_, _| Err(io::ErrorKind::UnexpectedEof.into()));
    told(team.queue.push(job(&place(100_000), 0, 100_000, unreadable))).unwrap();
    let error = told(team.queue.push(job(&place(1), 0, 1, filling(0)))).unwrap_err();
    assert_eq!(error.to_string(), "the weights cannot be read: unexpected end of file");
    assert_eq!(told(team.queue.finish()), Err(error));
}

#[test]
fn a_gpu_that_takes_nothing_ends_the_load() {
    let open: Open<Late> = Arc::new(|| Err(CudaError::NoGpu));
    let team = Team::start(2, Queue::new(16, 100), &open, Builder::new).unwrap();
    told(team.queue.push(job(&place(99), 0, 99, filling(0)))).unwrap();
    assert_eq!(told(team.queue.finish()), Err(CudaError::NoGpu));
}

#[test]
fn a_load_may_be_given_up() {
    let (team, target) = (team(2, 2, 16, usize::MAX), place(1 << 20));
    told(team.queue.push(job(&target, 0, 1 << 20, filling(0)))).unwrap();
    drop(team);
    assert_eq!(Arc::strong_count(&target), 1);
}

#[test]
fn weights_arrive_on_the_gpu() {
    let Some(gpu) = Gpu::find("weights_arrive_on_the_gpu") else { return };
    let options = StagingOptions { n_readers: 3, chunk_bytes: 64 << 10, n_buffers: 2 };
    let driver = Driver::open(&gpu.libraries).unwrap();
    let mut staging = Staging::new(&driver, 0, options).unwrap();
    let stream = gpu.context.stream().unwrap();
    let n = 5_000_001;
    let mut memory = gpu.context.alloc("weights", 2 * n + 3).unwrap();
    // The second load begins while the first is on its way.
    staging.load(&mut memory, 0, (n, 1), filling(0)).unwrap();
    staging.load(&mut memory, n + 3, (n, 1), filling(7)).unwrap();
    staging.finish().unwrap();
    let mut back = vec![0; 2 * n + 3];
    stream.download(&mut back, &memory, 0).unwrap();
    assert!(back[..n].iter().enumerate().all(|(at, &found)| found == byte(at)));
    assert_eq!(back[n..n + 3], [0; 3]);
    assert!(back[n + 3..].iter().enumerate().all(|(at, &found)| found == byte(at + 7)));
}

#[test]
fn memory_of_the_gpu_waits_for_those_who_write_to_it() {
    let Some(gpu) = Gpu::find("memory_of_the_gpu_waits_for_those_who_write_to_it") else { return };
    let options = StagingOptions { n_readers: 2, chunk_bytes: 64 << 10, n_buffers: 2 };
    let mut staging = Staging::new(&Driver::open(&gpu.libraries).unwrap(), 0, options).unwrap();
    for _ in 0..20 {
        let mut memory = gpu.context.alloc("weights", 4 << 20).unwrap();
        staging.load(&mut memory, 0, (1 << 10, 4 << 10), filling(0)).unwrap();
    }
    staging.finish().unwrap();
}
