//! GPUs as the command line sees them: where the user's environment says that NVIDIA's libraries and compiled kernels
//! are, and which device a run takes.

mod choice;
mod places;

pub use choice::{DeviceChoice, GpuAsked, choose, usable};
pub use places::{kernel_cache, libraries};
