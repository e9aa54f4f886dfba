//! Memory for weights: files mapped as they are, and anonymous memory in huge pages. The one `unsafe` of this crate.

use std::fs::File;
use std::io;

use dist_kernels::weight::HostBytes;
use memmap2::{Mmap, MmapMut};

/// Memory from this size on is worth a mapping of its own.
const MAP_FROM_BYTES: usize = 1 << 20;

/// The whole of `file`, mapped. Nothing is read before it is used, and the pages are shared by all processes.
///
/// A file that another process truncates while it is mapped kills this one; reading (`--no-mmap`) does not.
#[expect(unsafe_code, reason = "a map of a file cannot be made safe by any wrapper")]
pub(super) fn file(file: &File) -> io::Result<Mmap> {
    // SAFETY: The map is read-only and its bytes are only ever read as numbers of which every bit pattern is valid, so
    // a writer elsewhere can change results but not break memory. Truncation raises SIGBUS, which ends the process
    // without harm to memory; this is documented at `OpenOptions::mmap`.
    unsafe { Mmap::map(file) }
}

/// Bytes that are filled once and then shared.
pub(super) enum Fresh {
    Small(Vec<u8>),
    Mapped(MmapMut),
}

impl Fresh {
    /// `len` zeros; large ones in huge pages where the system has them.
    pub(super) fn zeroed(len: usize) -> io::Result<Self> {
        if len < MAP_FROM_BYTES {
            return Ok(Self::Small(vec![0; len]));
        }
        let map = MmapMut::map_anon(len)?;
        // Without huge pages it is slower, not wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self::Mapped(map))
    }

    /// The bytes, to be filled.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }

    /// The bytes, shared from now on.
    pub(super) fn share(self) -> HostBytes {
        match self {
            Self::Small(bytes) => HostBytes::new(bytes),
            Self::Mapped(map) => HostBytes::new(map),
        }
    }
}
