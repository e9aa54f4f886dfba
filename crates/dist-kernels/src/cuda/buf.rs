//! Memory of the CUDA backend.

use dist_core::DType;

use super::driver::DeviceMemory;
use crate::weight::Buffer;

/// A run of elements of one type in a GPU's memory.
#[derive(Debug)]
pub struct CudaBuf {
    pub(super) memory: DeviceMemory,
    pub(super) dtype: DType,
    pub(super) len: usize,
}

impl CudaBuf {
    /// The device address of the first element.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }
}

impl Buffer for CudaBuf {
    fn dtype(&self) -> DType {
        self.dtype
    }

    fn len(&self) -> usize {
        self.len
    }
}
