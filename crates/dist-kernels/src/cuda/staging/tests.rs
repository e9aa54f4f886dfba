//! The way of the bytes, with a sink that is slow to take them; and on a GPU.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::test_support::Gpu;
use super::*;

/// Says of a buffer that it has been taken only every third time, or when somebody waits for it.
struct Slow<'a> {
    bytes: Vec<u8>,
    /// Where the buffers begin that were asked for and are not taken yet.
    busy: &'a Mutex<BTreeSet<usize>>,
    starts: Vec<usize>,
    n_asked: usize,
}

impl Sink for Slow<'_> {
    fn fetch(&mut self, buffer: usize, at: usize, bytes: &[u8]) -> Result<()> {
        self.starts[buffer] = bytes.as_ptr() as usize;
        assert!(self.busy.lock().unwrap().insert(self.starts[buffer]), "buffer {buffer} was not free");
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn is_fetched(&mut self, buffer: usize) -> Result<bool> {
        self.n_asked += 1;
        if self.n_asked.is_multiple_of(3) {
            self.wait(buffer)?;
        }
        Ok(!self.busy.lock().unwrap().contains(&self.starts[buffer]))
    }

    fn wait(&mut self, buffer: usize) -> Result<()> {
        self.busy.lock().unwrap().remove(&self.starts[buffer]);
        Ok(())
    }
}

fn byte(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 13) as u8
}

#[expect(clippy::unnecessary_wraps, reason = "as a load wants it")]
fn fill(from: usize, buffer: &mut [u8]) -> io::Result<()> {
    for (offset, to) in buffer.iter_mut().enumerate() {
        *to = byte(from + offset);
    }
    Ok(())
}

#[test]
fn every_byte_arrives_and_no_buffer_is_filled_too_early() {
    for (n_readers, chunk, n_bytes) in
        [(1, 64, 1), (1, 64, 64), (2, 64, 65), (3, 64, 64 * 50 + 7), (8, 16, 4001), (4, 64, 0)]
    {
        let mut memory = vec![0; 2 * n_readers * chunk];
        let (busy, n_filled) = (Mutex::new(BTreeSet::new()), AtomicUsize::new(0));
        let careful = |from: usize, buffer: &mut [u8]| {
            let start = buffer.as_ptr() as usize;
            assert!(!busy.lock().unwrap().contains(&start), "it is still being taken");
            n_filled.fetch_add(buffer.len(), Ordering::Relaxed);
            fill(from, buffer)
        };
        let mut sink =
            Slow { bytes: vec![0xee; n_bytes], busy: &busy, starts: vec![0; 2 * n_readers], n_asked: 0 };
        carry(memory.chunks_mut(chunk).collect(), n_readers, n_bytes, &careful, &mut sink).unwrap();
        assert_eq!(n_filled.into_inner(), n_bytes);
        assert!(
            sink.bytes.iter().enumerate().all(|(at, &found)| found == byte(at)),
            "{n_readers} {chunk} {n_bytes}"
        );
    }
}

#[test]
fn a_reader_that_panics_ends_the_load() {
    let mut memory = [0; 4 * 16];
    let busy = Mutex::new(BTreeSet::new());
    let mut sink = Slow { bytes: vec![0; 1000], busy: &busy, starts: vec![0; 4], n_asked: 0 };
    let bad = |from: usize, _: &mut [u8]| {
        assert!(from < 500, "the file ends here");
        Ok(())
    };
    let load = || carry(memory.chunks_mut(16).collect(), 2, 1000, &bad, &mut sink);
    let panic = catch_unwind(AssertUnwindSafe(load)).unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"the file ends here"));
}

#[test]
fn bytes_that_cannot_be_read_end_the_load() {
    let mut memory = [0; 4 * 16];
    let busy = Mutex::new(BTreeSet::new());
    let mut sink = Slow { bytes: vec![0; 1000], busy: &busy, starts: vec![0; 4], n_asked: 0 };
    let short = |from: usize, _: &mut [u8]| {
        if from < 500 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    };
    let error = carry(memory.chunks_mut(16).collect(), 2, 1000, &short, &mut sink).unwrap_err();
    assert_eq!(error.to_string(), "the weights cannot be read: unexpected end of file");
}

#[test]
fn weights_arrive_on_the_gpu() {
    let Some(gpu) = Gpu::find("weights_arrive_on_the_gpu") else { return };
    let options = StagingOptions { n_readers: 3, chunk_bytes: 64 << 10 };
    let mut staging = Staging::new(&gpu.context, options).unwrap();
    let stream = gpu.context.stream().unwrap();
    let n = 5_000_001;
    let mut memory = gpu.context.alloc("weights", 2 * n + 3).unwrap();
    // The second load begins while the first is on its way.
    staging.load(&mut memory, 0, n, &fill).unwrap();
    staging.load(&mut memory, n + 3, n, &|from, buffer| fill(from + 7, buffer)).unwrap();
    staging.finish().unwrap();
    let mut back = vec![0; 2 * n + 3];
    stream.download(&mut back, &memory, 0).unwrap();
    assert!(back[..n].iter().enumerate().all(|(at, &found)| found == byte(at)));
    assert_eq!(back[n..n + 3], [0; 3]);
    assert!(back[n + 3..].iter().enumerate().all(|(at, &found)| found == byte(at + 7)));
}
