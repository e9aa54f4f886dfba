//! Memory of the GPU, and memory of the host that the GPU can reach.

use std::convert::Infallible;
use std::ffi::c_void;
use std::slice;
use std::sync::mpsc::{Receiver, Sender, channel};

use cudarc::driver::result;
use cudarc::driver::sys::CUresult;

use super::error::{CudaError, dropped, failed};
use super::{Context, Result};

/// Memory that every context may use; reading it on the host is as fast as any.
const PORTABLE: u32 = 1;

/// Memory of the GPU, aligned to 256 bytes.
#[derive(Debug)]
pub struct DeviceMemory {
    address: u64,
    n_bytes: usize,
    /// Nothing is ever sent: receiving ends when the last [`Target`] is gone.
    targets: Option<(Sender<Infallible>, Receiver<Infallible>)>,
    // The context outlives what is in it.
    _context: Context,
}

/// Memory of the GPU as a place to copy to, for other threads that hold the GPU. Where it ends before they are done, the
/// memory waits for them.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    address: u64,
    n_bytes: usize,
    _held: Sender<Infallible>,
}

impl Context {
    /// Takes memory and fills it with zeros. `what` names its purpose in an error.
    pub fn alloc(&self, what: &str, n_bytes: usize) -> Result<DeviceMemory> {
        // The driver refuses to give nothing.
        let taken = n_bytes.max(1);
        // SAFETY: memory without a content; it is filled below.
        let address = unsafe { result::malloc_sync(taken) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = self.memory().map_or(0, |(free, _)| free);
                CudaError::OutOfMemory { what: what.to_owned(), needed: n_bytes, free }
            }
            _ => failed("cuMemAlloc", what, error),
        })?;
        let memory = DeviceMemory { address, n_bytes, targets: None, _context: self.clone() };
        self.zero(address, taken)?;
        Ok(memory)
    }

    /// Takes host memory that the GPU copies from and to by itself, and fills it with zeros.
    pub fn alloc_pinned(&self, what: &str, n_bytes: usize) -> Result<PinnedMemory> {
        // SAFETY: memory without a content; it is filled below.
        let start = unsafe { result::malloc_host(n_bytes.max(1), PORTABLE) };
        let start = start.map_err(|error| failed("cuMemHostAlloc", what, error))?.cast::<u8>();
        // SAFETY: as many bytes were taken, and nobody else knows them yet.
        unsafe { start.write_bytes(0, n_bytes) };
        Ok(PinnedMemory { start, n_bytes, _context: self.clone() })
    }
}

impl DeviceMemory {
    /// Its first byte, as kernels know it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The address of byte `at`, after a check that `n_bytes` are there.
    pub(super) fn range(&self, at: usize, n_bytes: usize) -> u64 {
        range((self.address, self.n_bytes), at, n_bytes)
    }

    /// The same memory for other threads to copy to.
    pub(crate) fn target(&mut self) -> Target {
        let (held, _) = self.targets.get_or_insert_with(channel);
        Target { address: self.address, n_bytes: self.n_bytes, _held: held.clone() }
    }
}

impl Target {
    /// The address of byte `at`, after a check that `n_bytes` are there.
    pub(super) fn range(&self, at: usize, n_bytes: usize) -> u64 {
        range((self.address, self.n_bytes), at, n_bytes)
    }
}

fn range((address, len): (u64, usize), at: usize, n_bytes: usize) -> u64 {
    let is_inside = at.checked_add(n_bytes).is_some_and(|end| end <= len);
    assert!(is_inside, "bytes {at}.. (+{n_bytes}) of {len} bytes of GPU memory");
    address + at as u64
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if let Some((held, others)) = self.targets.take() {
            drop(held);
            // An error is all that can come: nobody holds a target any more.
            let _ = others.recv();
        }
        // SAFETY: taken by `alloc`, given back here only. The driver waits for work that still uses it.
        dropped("cuMemFree", unsafe { result::free_sync(self.address) });
    }
}

/// Host memory that stays in place, so that the GPU copies from and to it by itself.
///
/// While a copy that was only asked for is under way, its bytes are the GPU's: wait for the stream or for an event after
/// the copy before they are touched.
#[derive(Debug)]
pub struct PinnedMemory {
    start: *mut u8,
    n_bytes: usize,
    _context: Context,
}

impl PinnedMemory {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: as many bytes were taken and filled, and live as long as `self`.
        unsafe { slice::from_raw_parts(self.start, self.n_bytes) }
    }

    /// Its bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else of this process has them.
        unsafe { slice::from_raw_parts_mut(self.start, self.n_bytes) }
    }

    /// Its first byte, as kernels know it.
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: taken by `alloc_pinned`, given back here only. The driver waits for work that still uses it.
        dropped("cuMemFreeHost", unsafe { result::free_host(self.start.cast::<c_void>()) });
    }
}
