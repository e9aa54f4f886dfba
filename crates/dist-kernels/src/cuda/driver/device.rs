//! The driver, the GPUs that it sees, and a thread's context on one of them.

use std::rc::Rc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, ctx, device, primary_ctx, stream};
use cudarc::driver::sys::{CUdevice, CUdevice_attribute_enum as Attribute, CUresult, CUstream};
use serde::{Deserialize, Serialize};

use super::super::libraries::{Libraries, Version};
use super::Result;
use super::error::{CudaError, dropped, failed};

/// The oldest driver that has all functions that are called here.
const VERSION_LEAST: Version = Version { major: 12, minor: 8 };
/// The oldest GPU that kernels are written for.
const CAPABILITY_LEAST: (u32, u32) = (8, 0);

/// How long the driver may look for GPUs: many of them that nobody holds awake take tens of seconds.
const INIT_MAX: Duration = Duration::from_secs(60);
/// More GPUs than a driver can see.
const GPUS_MAX: usize = 1024;
/// The driver's number for what it has no number for.
const UNKNOWN: u32 = CUresult::CUDA_ERROR_UNKNOWN as u32;

/// NVIDIA's driver, open and ready.
#[derive(Clone, Debug)]
pub struct Driver {
    version: Version,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// The driver's number of it, from 0.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub capability: (u32, u32),
    /// Its memory.
    pub total_bytes: usize,
    /// Its multiprocessors.
    pub n_sms: usize,
    /// Shared memory that a block can have at most.
    pub shared_bytes_max: usize,
    /// Its L2 cache.
    pub l2_bytes: usize,
    /// What its memory's clock and width allow; 0 if the driver does not say.
    pub memory_bytes_per_s: u64,
}

impl DeviceInfo {
    /// Whether kernels are written for it.
    pub fn is_supported(&self) -> bool {
        self.capability >= CAPABILITY_LEAST
    }

    /// Whether kernels may overlap with the next one's start, and blocks make clusters.
    pub fn is_hopper_or_later(&self) -> bool {
        self.capability.0 >= 9
    }
}

impl Driver {
    /// Opens the driver; it may see no GPU.
    pub fn open(libraries: &Libraries) -> Result<Self> {
        let version = libraries.driver()?.version;
        if version < VERSION_LEAST {
            return Err(CudaError::DriverTooOld { found: version, least: VERSION_LEAST });
        }
        // Before any other call: without its function it panics.
        libraries.whole_driver()?;
        init(INIT_MAX)?;
        Ok(Self { version })
    }

    /// The newest CUDA that it knows.
    pub fn version(&self) -> Version {
        self.version
    }

    /// All GPUs, those that are too old as well.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>> {
        (0..count()?).map(|ordinal| self.device(ordinal)).collect()
    }

    /// One GPU.
    pub fn device(&self, ordinal: usize) -> Result<DeviceInfo> {
        let handle = Self::handle(ordinal)?;
        let what = || format!("GPU {ordinal}");
        let attribute = |attribute| {
            // SAFETY: the handle is one that the driver has just given.
            let value = unsafe { device::get_attribute(handle, attribute) };
            value.map_err(|error| failed("cuDeviceGetAttribute", what(), error))
        };
        let name = device::get_name(handle).map_err(|error| failed("cuDeviceGetName", what(), error))?;
        // SAFETY: as above.
        let total = unsafe { device::total_mem(handle) };
        let khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bits = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
        // Two transfers a cycle.
        let memory_bytes_per_s = 2 * 1000 * khz.max(0) as u64 * bits.max(0) as u64 / 8;
        Ok(DeviceInfo {
            ordinal,
            name,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
            ),
            total_bytes: total.map_err(|error| failed("cuDeviceTotalMem", what(), error))?,
            n_sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            shared_bytes_max: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            memory_bytes_per_s,
        })
    }

    fn handle(ordinal: usize) -> Result<CUdevice> {
        let n = count()?;
        if n == 0 {
            return Err(CudaError::NoGpu);
        }
        if ordinal >= n {
            return Err(CudaError::NoSuchGpu { ordinal, n });
        }
        device::get(ordinal as i32).map_err(|error| failed("cuDeviceGet", format!("GPU {ordinal}"), error))
    }
}

/// The driver's first call: it looks for GPUs, and one that is stuck keeps it for ever.
fn init(most: Duration) -> Result<()> {
    let answer =
        in_time(most, || result::init().map_err(|error| error.0)).ok_or_else(|| CudaError::Call {
            call: "cuInit",
            what: "this machine".to_owned(),
            name: "no answer".to_owned(),
            meaning: format!("for {} s: a GPU or its driver may be stuck, see nvidia-smi", most.as_secs()),
            status: UNKNOWN,
        })?;
    answer.map_err(|status| match status {
        CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoGpu,
        _ => failed("cuInit", "this machine", DriverError(status)),
    })
}

/// What `call` gives on a thread of its own, which is left behind if it takes too long.
fn in_time<T: Send + 'static>(most: Duration, call: fn() -> T) -> Option<T> {
    let (told, answer) = mpsc::channel();
    let asked = thread::Builder::new().spawn(move || {
        // Nobody listens any more if it took too long.
        let _ = told.send(call());
    });
    if asked.is_ok() { answer.recv_timeout(most).ok() } else { Some(call()) }
}

/// How many GPUs the driver sees, if it says so.
fn count() -> Result<usize> {
    let n = device::get_count().map_err(|error| failed("cuDeviceGetCount", "this machine", error))?;
    usize::try_from(n).ok().filter(|&n| n <= GPUS_MAX).ok_or_else(|| CudaError::Call {
        call: "cuDeviceGetCount",
        what: "this machine".to_owned(),
        name: format!("{n} GPUs"),
        meaning: "which no machine has: the driver is not sound".to_owned(),
        status: UNKNOWN,
    })
}

/// A thread's hold on a GPU; whatever lives there keeps it.
#[derive(Clone, Debug)]
pub struct Context(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    device: CUdevice,
    info: DeviceInfo,
    /// For what is done at once, beside everybody's streams: null until it is there.
    own: CUstream,
    /// Whether the thread had no context before.
    is_first: bool,
}

impl Context {
    /// Takes GPU `ordinal` for this thread. Where it holds the same one already, the first hold must be the last to end.
    pub fn new(driver: &Driver, ordinal: usize) -> Result<Self> {
        let device = Driver::handle(ordinal)?;
        let info = driver.device(ordinal)?;
        if !info.is_supported() {
            return Err(CudaError::Capability { name: info.name, capability: info.capability });
        }
        let what = || format!("GPU {ordinal}");
        let before = ctx::get_current().map_err(|error| failed("cuCtxGetCurrent", what(), error))?;
        // SAFETY: the device is one that the driver has just given; `Inner` gives it back.
        let handle = unsafe { primary_ctx::retain(device) };
        let handle = handle.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                CudaError::OutOfMemory { what: format!("the context on {}", info.name), needed: 0, free: 0 }
            }
            _ => failed("cuDevicePrimaryCtxRetain", what(), error),
        })?;
        let mut inner = Inner { device, info, own: std::ptr::null_mut(), is_first: false };
        inner.is_first = before.is_none();
        if before.is_some_and(|before| before != handle) {
            return Err(CudaError::OtherGpu);
        }
        // SAFETY: retained above.
        unsafe { ctx::set_current(handle) }.map_err(|error| failed("cuCtxSetCurrent", what(), error))?;
        let own = stream::create(stream::StreamKind::NonBlocking);
        inner.own = own.map_err(|error| failed("cuStreamCreate", what(), error))?;
        Ok(Self(Rc::new(inner)))
    }

    /// The GPU.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Bytes that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize)> {
        result::mem_get_info().map_err(|error| failed("cuMemGetInfo", &self.0.info.name, error))
    }

    /// Fills memory with zeros. No other stream is waited for, so that this may happen while one is recorded.
    pub(super) fn zero(&self, address: u64, n_bytes: usize) -> Result<()> {
        let own = self.0.own;
        // SAFETY: the caller has just taken the range; the stream is alive as long as `self`.
        unsafe {
            result::memset_d8_async(address, 0, n_bytes, own)
                .map_err(|error| failed("cuMemsetD8Async", format!("{n_bytes} new bytes"), error))?;
            stream::synchronize(own).map_err(|error| failed("cuStreamSynchronize", "new memory", error))
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: no context is a valid choice; nothing that lived in this one is left, as all of it keeps `Inner`.
        unsafe {
            if !self.own.is_null() {
                dropped("cuStreamDestroy", stream::destroy(self.own));
            }
            if self.is_first {
                dropped("cuCtxSetCurrent", ctx::set_current(std::ptr::null_mut()));
            }
            dropped("cuDevicePrimaryCtxRelease", primary_ctx::release(self.device));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_never_ends_is_not_waited_for() {
        assert_eq!(in_time(INIT_MAX, || 7), Some(7));
        let start = std::time::Instant::now();
        assert_eq!(in_time(Duration::from_millis(20), || thread::sleep(INIT_MAX)), None);
        assert!(start.elapsed() < INIT_MAX / 2, "{:?}", start.elapsed());
    }
}
