//! Large tensors are hashed by threads of their own while others are taken in: whoever loads asks at the end whether
//! all were what the manifest says.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;

use dist_kernels::weight::HostBytes;
use sha2::{Digest as _, Sha256};

use crate::manifest::Digest;

/// From this size on a thread is worth it.
pub(super) const LARGE: usize = 256 << 10;
/// More threads are faster than any disk or bus.
const THREADS_MAX: usize = 32;
/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// A tensor of a file, and what it is made of: bytes, the first one and how many, in order of the file.
pub(in crate::checkpoint) struct Job {
    pub(super) file: usize,
    pub(super) tensor: String,
    pub(super) pieces: Vec<(HostBytes, usize, usize)>,
}

/// What became of a job.
pub(in crate::checkpoint) struct Hashed {
    pub(super) file: usize,
    pub(super) tensor: String,
    pub(super) digest: io::Result<Digest>,
}

/// The threads and what they have not told yet. They end with this value.
#[derive(Debug, Default)]
pub(in crate::checkpoint) struct Hashing {
    running: Option<Running>,
    n_out: usize,
}

#[derive(Debug)]
struct Running {
    jobs: Sender<Job>,
    hashed: Receiver<Hashed>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.tensor)
    }
}

impl Hashing {
    /// Takes a job in; gives it back where there is no thread to take it.
    pub(super) fn push(&mut self, job: Job) -> Result<(), Job> {
        let running = self.running.get_or_insert_with(|| start(Builder::new));
        running.jobs.send(job).map_err(|refused| refused.0)?;
        self.n_out += 1;
        Ok(())
    }

    /// Waits for the next tensor that was pushed; `None`: all were told.
    pub(super) fn next(&mut self) -> Option<Hashed> {
        let running = self.running.as_ref().filter(|_| self.n_out > 0)?;
        let hashed = running.hashed.recv().ok()?;
        self.n_out -= 1;
        Some(hashed)
    }

    /// Tensors that were pushed and not told.
    pub(super) fn n_out(&self) -> usize {
        self.n_out
    }
}

/// `thread` begins each of them.
fn start(thread: fn() -> Builder) -> Running {
    let (jobs, todo) = channel::<Job>();
    let (done, hashed) = channel();
    let todo = Arc::new(Mutex::new(todo));
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    for _ in 0..n_threads {
        let (todo, done) = (Arc::clone(&todo), done.clone());
        // A thread that cannot be started leaves its work to the others; without any, `push` gives jobs back.
        let _ = thread().name("hashing".to_owned()).spawn(move || work(&todo, &done));
    }
    Running { jobs, hashed }
}

fn work(todo: &Mutex<Receiver<Job>>, done: &Sender<Hashed>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let job = todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { file, tensor, pieces }) = job else { return };
        let digest = hash(&pieces, &mut chunk);
        if done.send(Hashed { file, tensor, digest }).is_err() {
            return;
        }
    }
}

/// The hash of all pieces together, read to `chunk`, whatever its size.
pub(super) fn hash(pieces: &[(HostBytes, usize, usize)], chunk: &mut [u8]) -> io::Result<Digest> {
    let mut hasher = Sha256::new();
    for (bytes, at, len) in pieces {
        for first in (0..*len).step_by(chunk.len()) {
            let n = chunk.len().min(len - first);
            let chunk = &mut chunk[..n];
            bytes.copy_to(at + first, chunk)?;
            hasher.update(&chunk);
        }
    }
    Ok(Digest(hasher.finalize().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_thread_can_be_started_the_job_comes_back_and_any_buffer_will_do() {
        let bytes: Vec<u8> = (0..CHUNK as u32 + 77).map(|i| (i * 31) as u8).collect();
        let expected = Digest(Sha256::digest(&bytes[3..]).into());
        // No address space has room for such a stack.
        let running = start(|| Builder::new().stack_size(1 << 60));
        let mut hashing = Hashing { running: Some(running), n_out: 0 };
        let whole = HostBytes::new(bytes.clone());
        let pieces = vec![(whole.clone(), 3, LARGE), (whole, 3 + LARGE, bytes.len() - 3 - LARGE)];
        let Job { pieces, .. } = hashing.push(Job { file: 0, tensor: "t".to_owned(), pieces }).unwrap_err();
        for n_bytes in [1000, LARGE, CHUNK, 4 * CHUNK] {
            assert_eq!(hash(&pieces, &mut vec![0; n_bytes]).unwrap(), expected, "{n_bytes}");
        }
        assert!(hashing.next().is_none());
    }

    #[test]
    fn every_tensor_is_told_with_its_hash() {
        let bytes: Vec<u8> = (0..3 * CHUNK as u32 + 77).map(|i| (i * 31) as u8).collect();
        let whole = HostBytes::new(bytes.clone());
        let mut hashing = Hashing::default();
        for i in 0..9_usize {
            let pieces = vec![(whole.clone(), i, CHUNK + i), (whole.clone(), 2 * CHUNK, 5)];
            hashing.push(Job { file: i, tensor: format!("t{i}"), pieces }).unwrap();
        }
        let mut found = Vec::new();
        while let Some(hashed) = hashing.next() {
            let i = hashed.file;
            let mut expected = Sha256::new();
            expected.update(&bytes[i..CHUNK + 2 * i]);
            expected.update(&bytes[2 * CHUNK..2 * CHUNK + 5]);
            assert_eq!(hashed.digest.unwrap(), Digest(expected.finalize().into()), "{}", hashed.tensor);
            found.push(i);
        }
        found.sort_unstable();
        assert_eq!((found, hashing.n_out()), ((0..9).collect(), 0));
    }
}
