//! Plain handles that pass between siblings: memory, streams and peers as values without a driver behind them.

use crate::DType;

/// Memory that a collective may read and write.
///
/// Host memory is a borrowed slice, so that collectives over it need no `unsafe`; device memory is an address.
#[derive(Debug)]
pub enum RawBuf<'a> {
    /// Memory of this process.
    Host {
        /// The elements as little-endian bytes.
        bytes: &'a mut [u8],
        /// Type of the elements.
        dtype: DType,
    },
    /// Memory of an accelerator.
    Device {
        /// Device address of the first element.
        ptr: u64,
        /// Size in bytes.
        bytes: usize,
        /// Type of the elements.
        dtype: DType,
    },
}

impl RawBuf<'_> {
    /// Size in bytes.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        match self {
            Self::Host { bytes, .. } => bytes.len(),
            Self::Device { bytes, .. } => *bytes,
        }
    }

    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::Host { dtype, .. } | Self::Device { dtype, .. } => *dtype,
        }
    }
}

/// A queue of device work; zero where there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RawStream(pub u64);

/// Opaque bytes by which another process opens this process' device memory (64 bytes, as CUDA IPC handles have).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerHandle(pub [u8; 64]);

/// Mailboxes of all peers as seen from one of them: `peers[idx]` is mailbox `idx` of `n`, `me` is our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerWindow {
    /// Which mailbox is ours.
    pub me: usize,
    /// Device address of each mailbox in our address space.
    pub peers: Vec<u64>,
    /// Size of each mailbox in bytes.
    pub bytes: usize,
}
