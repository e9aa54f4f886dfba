//! Streams: what is asked of one is done in order. Events: places in that order.

use cudarc::driver::result::{self, event, stream};
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUevent_wait_flags, CUresult, CUstream};

use super::error::{dropped, failed};
use super::{Context, DeviceMemory, PinnedMemory, Result, Target};

/// Work that is done in order, beside other streams.
#[derive(Debug)]
pub struct Stream {
    pub(super) handle: CUstream,
    pub(super) context: Context,
}

impl Context {
    /// A stream that waits for no other.
    pub fn stream(&self) -> Result<Stream> {
        let handle = stream::create(stream::StreamKind::NonBlocking);
        let handle = handle.map_err(|error| failed("cuStreamCreate", &self.info().name, error))?;
        Ok(Stream { handle, context: self.clone() })
    }

    /// An event that tells its time.
    pub fn timed_event(&self) -> Result<Event> {
        self.event_of(CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// An event that tells no time, which costs less.
    pub fn event(&self) -> Result<Event> {
        self.event_of(CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn event_of(&self, flags: CUevent_flags) -> Result<Event> {
        let handle = event::create(flags);
        let handle = handle.map_err(|error| failed("cuEventCreate", &self.info().name, error))?;
        Ok(Event { handle, _context: self.clone() })
    }
}

impl Stream {
    /// The context that it is of.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Waits until all that was asked of it is done. An error of a kernel comes to light here.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive as long as `self`.
        unsafe { stream::synchronize(self.handle) }
            .map_err(|error| failed("cuStreamSynchronize", "what was asked before", error))
    }

    /// Copies `src` to the bytes from `at` on, after what was asked before; it is done when this returns.
    pub fn upload(&self, dst: &mut DeviceMemory, at: usize, src: &[u8]) -> Result<()> {
        let to = dst.range(at, src.len());
        // SAFETY: both ranges are there, and `src` stays borrowed until the copy is done.
        unsafe { result::memcpy_htod_async(to, src, self.handle) }
            .map_err(|error| failed("cuMemcpyHtoDAsync", format!("{} bytes", src.len()), error))?;
        self.synchronize()
    }

    /// Copies the bytes from `at` on to `dst`, after what was asked before; it is done when this returns.
    pub fn download(&self, dst: &mut [u8], src: &DeviceMemory, at: usize) -> Result<()> {
        let from = src.range(at, dst.len());
        let n_bytes = dst.len();
        // SAFETY: both ranges are there, and `dst` stays borrowed until the copy is done.
        unsafe { result::memcpy_dtoh_async(dst, from, self.handle) }
            .map_err(|error| failed("cuMemcpyDtoHAsync", format!("{n_bytes} bytes"), error))?;
        self.synchronize()
    }

    /// Asks for a copy of `n_bytes` of `src` from `src_at` on. Neither may be touched or dropped before it is done.
    #[allow(dead_code, reason = "for the backend")]
    pub(crate) fn copy_in(
        &self,
        dst: &DeviceMemory,
        at: usize,
        src: &PinnedMemory,
        src_at: usize,
        n_bytes: usize,
    ) -> Result<()> {
        self.copy_from_pinned(dst.range(at, n_bytes), &src.bytes()[src_at..src_at + n_bytes])
    }

    /// The same with bytes of pinned memory, to memory that another thread holds.
    pub(crate) fn copy_to_target(&self, dst: &Target, at: usize, src: &[u8]) -> Result<()> {
        self.copy_from_pinned(dst.range(at, src.len()), src)
    }

    fn copy_from_pinned(&self, to: u64, src: &[u8]) -> Result<()> {
        // SAFETY: both ranges are there; this crate keeps them until it has waited, as is said above, and memory of the
        // GPU waits for its targets, and as it is freed for the copies.
        unsafe { result::memcpy_htod_async(to, src, self.handle) }
            .map_err(|error| failed("cuMemcpyHtoDAsync", format!("{} bytes", src.len()), error))
    }

    /// Asks for a copy of `n_bytes` of `src` from `src_at` on. Neither may be touched or dropped before it is done.
    #[allow(dead_code, reason = "for the backend")]
    pub(crate) fn copy_out(
        &self,
        dst: &mut PinnedMemory,
        at: usize,
        src: &DeviceMemory,
        src_at: usize,
        n_bytes: usize,
    ) -> Result<()> {
        let (to, from) = (&mut dst.bytes_mut()[at..at + n_bytes], src.range(src_at, n_bytes));
        // SAFETY: both ranges are there; this crate keeps them until it has waited, as is said above.
        unsafe { result::memcpy_dtoh_async(to, from, self.handle) }
            .map_err(|error| failed("cuMemcpyDtoHAsync", format!("{n_bytes} bytes"), error))
    }

    /// Asks for a copy on the GPU.
    pub fn copy(
        &self,
        dst: &mut DeviceMemory,
        at: usize,
        src: &DeviceMemory,
        src_at: usize,
        n_bytes: usize,
    ) -> Result<()> {
        let (to, from) = (dst.range(at, n_bytes), src.range(src_at, n_bytes));
        // SAFETY: both ranges are there; freeing one waits for the GPU.
        unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.handle) }
            .map_err(|error| failed("cuMemcpyDtoDAsync", format!("{n_bytes} bytes"), error))
    }

    /// Asks for `n_bytes` from `at` on to be `byte`.
    pub fn fill(&self, dst: &mut DeviceMemory, at: usize, byte: u8, n_bytes: usize) -> Result<()> {
        let to = dst.range(at, n_bytes);
        // SAFETY: the range is there; freeing it waits for the GPU.
        unsafe { result::memset_d8_async(to, byte, n_bytes, self.handle) }
            .map_err(|error| failed("cuMemsetD8Async", format!("{n_bytes} bytes"), error))
    }

    /// Sets `event` after what was asked before.
    pub fn record(&self, event: &Event) -> Result<()> {
        // SAFETY: both are alive.
        unsafe { event::record(event.handle, self.handle) }
            .map_err(|error| failed("cuEventRecord", "a stream", error))
    }

    /// What is asked from now on waits for `event`.
    pub fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: both are alive.
        unsafe { stream::wait_event(self.handle, event.handle, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(|error| failed("cuStreamWaitEvent", "a stream", error))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `Context::stream`, ended here only; the driver finishes what was asked.
        dropped("cuStreamDestroy", unsafe { stream::destroy(self.handle) });
    }
}

/// A place in a stream's order.
#[derive(Debug)]
pub struct Event {
    handle: CUevent,
    _context: Context,
}

impl Event {
    /// Waits until what was asked before it is done.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: alive as long as `self`.
        unsafe { event::synchronize(self.handle) }
            .map_err(|error| failed("cuEventSynchronize", "what was asked before", error))
    }

    /// Whether what was asked before it is done.
    pub fn is_done(&self) -> Result<bool> {
        // SAFETY: alive as long as `self`.
        match unsafe { sys::cuEventQuery(self.handle) } {
            CUresult::CUDA_SUCCESS => Ok(true),
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => {
                let error = cudarc::driver::DriverError(other);
                Err(failed("cuEventQuery", "what was asked before", error))
            }
        }
    }

    /// Milliseconds from `start` to this; both must be timed and done.
    pub fn ms_since(&self, start: &Self) -> Result<f32> {
        // SAFETY: both are alive.
        unsafe { event::elapsed(start.handle, self.handle) }
            .map_err(|error| failed("cuEventElapsedTime", "two events", error))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `Context::event_of`, ended here only.
        dropped("cuEventDestroy", unsafe { event::destroy(self.handle) });
    }
}
