//! GPUs as the command line sees them: where the user's environment says that NVIDIA's libraries and compiled kernels
//! are, and which device a run takes.

mod choice;
mod places;

pub use choice::{DeviceChoice, GpuAsked, Usable, choose, usable};
pub use places::{kernel_cache, libraries};

/// Whether models run on GPUs in this version.
pub const HAS_BACKEND: bool = true;
