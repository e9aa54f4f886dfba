//! Launching a kernel with the attributes that a graph keeps: blocks that make clusters, and a start that overlaps with
//! the end of the kernel before.

use std::ffi::c_void;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{
    self, CUlaunchAttribute, CUlaunchAttributeID as Id, CUlaunchAttributeValue, CUlaunchConfig, CUresult,
};

use super::error::failed;
use super::{Function, Result, Stream, TensorMap};

/// Tensor maps that a kernel takes beside its arguments.
const MAPS_MAX: usize = 3;

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks, in three dimensions.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory that a block has beside what the kernel declares.
    pub shared_bytes: usize,
    /// Neighbours in the first dimension that make a cluster. More than one need Hopper.
    pub cluster: u32,
    /// Whether it may start before the kernel before it is done (programmatic dependent launch): for kernels that wait
    /// by themselves. GPUs before Hopper do not know it, and start it afterwards.
    pub overlaps: bool,
}

impl Function {
    /// A launch of `grid` blocks of `threads` threads, with the shared memory that the kernel says it needs.
    pub fn over(&self, grid: [u32; 3], threads: u32) -> Launch {
        Launch { grid, threads, shared_bytes: self.shared_bytes, cluster: 1, overlaps: true }
    }

    /// Clusters that the GPU holds at once.
    pub fn clusters_at_once(&self, launch: &Launch) -> Result<usize> {
        let mut attributes = [attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE, empty()); 2];
        // Which stream does not matter here.
        let mut config = launch.config(&mut attributes, std::ptr::null_mut(), false);
        let mut n = 0;
        // SAFETY: the kernel's module is alive, and so are the attributes.
        let status = unsafe { sys::cuOccupancyMaxActiveClusters(&raw mut n, self.handle, &raw mut config) };
        status.result().map_err(|error| failed("cuOccupancyMaxActiveClusters", &self.name, error))?;
        Ok(n as usize)
    }

    /// Asks for the kernel. `args` is its first parameter, by value, and `maps` are the others; that they have the sizes
    /// that the kernel declares is checked here, that addresses in them lead to memory that is there is the caller's to
    /// know.
    #[allow(dead_code, reason = "for the backend")]
    pub(crate) fn launch<A: Copy>(
        &self,
        stream: &Stream,
        launch: &Launch,
        args: &A,
        maps: &[&TensorMap],
    ) -> Result<()> {
        let sizes = || std::iter::once(size_of::<A>()).chain(maps.iter().map(|_| size_of::<TensorMap>()));
        assert!(
            maps.len() <= MAPS_MAX && sizes().eq(self.params.iter().copied()),
            "{}: {:?}",
            self.name,
            self.params
        );
        assert!(launch.shared_bytes <= self.shared_bytes.max(48 << 10), "{}: {launch:?}", self.name);
        let is_hopper = stream.context.info().is_hopper_or_later();
        assert!(is_hopper || launch.cluster == 1, "{}: clusters need Hopper", self.name);
        let mut params = [std::ptr::null_mut::<c_void>(); 1 + MAPS_MAX];
        params[0] = std::ptr::from_ref(args).cast_mut().cast();
        for (param, map) in params[1..].iter_mut().zip(maps) {
            *param = std::ptr::from_ref(*map).cast_mut().cast();
        }
        let mut attributes = [attribute(Id::CU_LAUNCH_ATTRIBUTE_IGNORE, empty()); 2];
        let config = launch.config(&mut attributes, stream.handle, is_hopper);
        // SAFETY: the parameters are as many and as long as the kernel declares (checked above) and are copied before
        // the call returns. Their addresses come from buffers that the ops of this crate hold: those are freed by
        // `cuMemFree`, which waits for the GPU, and what the op reads and writes of them is checked by its args.
        let status = unsafe {
            sys::cuLaunchKernelEx(&raw const config, self.handle, params.as_mut_ptr(), std::ptr::null_mut())
        };
        match status {
            CUresult::CUDA_SUCCESS => Ok(()),
            other => Err(failed("cuLaunchKernelEx", format!("{} {launch:?}", self.name), DriverError(other))),
        }
    }
}

impl Launch {
    /// Its form for the driver; it points to `attributes`.
    fn config(
        &self,
        attributes: &mut [CUlaunchAttribute; 2],
        stream: sys::CUstream,
        knows_overlap: bool,
    ) -> CUlaunchConfig {
        let mut n = 0;
        if self.cluster > 1 {
            let mut value = empty();
            value.clusterDim.x = self.cluster;
            value.clusterDim.y = 1;
            value.clusterDim.z = 1;
            attributes[n] = attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value);
            n += 1;
        }
        if self.overlaps && knows_overlap {
            let mut value = empty();
            value.programmaticStreamSerializationAllowed = 1;
            attributes[n] = attribute(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value);
            n += 1;
        }
        CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: n as u32,
        }
    }
}

fn empty() -> CUlaunchAttributeValue {
    CUlaunchAttributeValue { pad: [0; 64] }
}

fn attribute(id: Id, value: CUlaunchAttributeValue) -> CUlaunchAttribute {
    CUlaunchAttribute { id, pad: [0; 4], value }
}
