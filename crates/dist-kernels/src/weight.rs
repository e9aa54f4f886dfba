//! Buffers and weights: where the bytes are, in which type and layout; no arithmetic.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use dist_core::DType;

use crate::error::{KernelError, Result};

/// Memory of a backend: a run of elements of one type.
pub trait Buffer: std::fmt::Debug {
    /// Type of the elements.
    fn dtype(&self) -> DType;
    /// Number of elements.
    fn len(&self) -> usize;
    /// Whether there is no element.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Host bytes with shared ownership: a mapped file or a vector.
#[derive(Clone)]
pub struct HostBytes {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    file: Option<Arc<File>>,
}

impl HostBytes {
    /// Shares `bytes`; nothing is copied.
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self { bytes: Arc::new(bytes), file: None }
    }

    /// The same for the mapped bytes of all of `file`.
    pub fn of_file(bytes: impl AsRef<[u8]> + Send + Sync + 'static, file: File) -> Self {
        Self { bytes: Arc::new(bytes), file: Some(Arc::new(file)) }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// Copies the bytes from `at` on. Those of a file are read from it: pages that are used once are not worth mapping,
    /// which takes a fault and a lock for each.
    pub fn copy_to(&self, at: usize, dst: &mut [u8]) -> io::Result<()> {
        if let Some(file) = &self.file {
            return file.read_exact_at(dst, at as u64);
        }
        dst.copy_from_slice(&self.as_slice()[at..at + dst.len()]);
        Ok(())
    }
}

impl std::fmt::Debug for HostBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostBytes({} bytes)", self.as_slice().len())
    }
}

/// How a weight of `n` outputs and `k` inputs lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[n, k]`, inputs contiguous: `PyTorch`'s `Linear`, embeddings.
    Nk,
    /// `[k, n]`, outputs contiguous: GPT-2's `Conv1D`.
    Kn,
}

/// A strided view of host bytes: `n` outputs of a weight.
#[derive(Clone, Debug)]
pub struct HostPart {
    /// The bytes that hold it.
    pub bytes: HostBytes,
    /// Byte offset of element (0, 0).
    pub offset: usize,
    /// Outputs of this part.
    pub n: usize,
    /// Elements from one row to the next: rows are outputs in `Nk`, inputs in `Kn`.
    pub ld: usize,
}

/// A weight as the checkpoint holds it: parts stacked along the outputs (q, k and v; or a rank's cuts of them).
#[derive(Clone, Debug)]
pub struct HostWeight {
    /// The parts, in order of their outputs.
    pub parts: Vec<HostPart>,
    /// Stored type.
    pub dtype: DType,
    /// Stored layout.
    pub layout: Layout,
    /// Inputs.
    pub k: usize,
}

impl HostWeight {
    /// Outputs of all parts.
    pub fn n(&self) -> usize {
        self.parts.iter().map(|part| part.n).sum()
    }

    /// Checks that every part lies within its bytes.
    pub fn check(&self) -> Result<()> {
        for part in &self.parts {
            let (rows, cols) = match self.layout {
                Layout::Nk => (part.n, self.k),
                Layout::Kn => (self.k, part.n),
            };
            let len = part.bytes.as_slice().len();
            let end = rows.checked_sub(1).map_or(Some(0), |last| {
                last.checked_mul(part.ld)?.checked_add(cols)?.checked_mul(self.dtype.bytes())
            });
            let end = end.and_then(|size| size.checked_add(part.offset)).unwrap_or(usize::MAX);
            if end > len || (rows > 1 && part.ld < cols) {
                return Err(KernelError::HostRange { start: part.offset, end, len });
            }
        }
        Ok(())
    }
}

/// A part of a weight in a backend's memory.
#[derive(Debug)]
pub struct WeightPart<Buf> {
    /// The elements, from (0, 0) to the last one that is used.
    pub data: Buf,
    /// Outputs of this part.
    pub n: usize,
    /// Elements from one row to the next.
    pub ld: usize,
}

/// A weight that a backend has taken in: `n` outputs, `k` inputs.
#[derive(Debug)]
pub struct Weight<Buf> {
    /// The parts, in order of their outputs. A backend may join them into one.
    pub parts: Vec<WeightPart<Buf>>,
    /// Type of the elements.
    pub dtype: DType,
    /// Layout of every part.
    pub layout: Layout,
    /// Outputs of all parts.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}
