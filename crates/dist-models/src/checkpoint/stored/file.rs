//! One file of tensors: mapped, in memory, or read piece by piece; ours are looked at when they are first needed, and
//! each of their tensors is compared to its hash when it is first taken whole.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use dist_core::{DType, Rank};
use dist_kernels::weight::HostBytes;
use sha2::{Digest as _, Sha256};

use super::Touched;
use crate::checkpoint::directory::{open_file, read_bounded};
use crate::checkpoint::error::{CheckpointError, Findings};
use crate::checkpoint::{map, own};
use crate::manifest::layout::FileLayout;
use crate::manifest::{self, Digest, RankManifest};

/// Where a file's bytes are.
pub(in crate::checkpoint) enum Storage {
    /// In memory or mapped; parts of weights are views of it.
    Memory(HostBytes),
    /// In the file; what a rank needs is read when it is asked for.
    File(File),
}

/// A file of our own, and what it must be before a byte of it is used.
pub(in crate::checkpoint) struct Seal {
    /// The manifest that vouches for it.
    pub(in crate::checkpoint) whole: std::sync::Arc<manifest::Manifest>,
    /// Its [`manifest::Manifest::identity`].
    pub(in crate::checkpoint) identity: Digest,
    /// Whose file it is, and where every tensor of it is.
    pub(in crate::checkpoint) rank: Rank,
    pub(in crate::checkpoint) layout: FileLayout,
    pub(in crate::checkpoint) mmap: bool,
    /// Whether tensors that are taken whole are compared to their hashes.
    pub(in crate::checkpoint) compares: bool,
}

/// A file of tensors.
pub(in crate::checkpoint) struct TensorFile {
    path: PathBuf,
    storage: OnceLock<Storage>,
    seal: Option<Seal>,
    /// Hashes of the tensors in the file, by canonical name; known with the storage.
    digests: OnceLock<HashMap<String, Digest>>,
    /// Tensors that were compared to their hashes.
    compared: Mutex<HashSet<String>>,
    touched: AtomicU64,
}

/// A rectangle of a stored matrix: rows and columns as they lie in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rect {
    pub(super) offset: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Elements from one row to the next.
    pub(super) ld: usize,
}

impl TensorFile {
    /// A file that is open and whose header was checked.
    pub(in crate::checkpoint) fn new(path: PathBuf, storage: Storage) -> Self {
        let file = Self::sealed(path, None);
        let _ = file.storage.set(storage);
        file
    }

    /// A file of our own, opened when it is first needed.
    pub(in crate::checkpoint) fn lazy(path: PathBuf, seal: Seal) -> Self {
        Self::sealed(path, Some(seal))
    }

    fn sealed(path: PathBuf, seal: Option<Seal>) -> Self {
        let (storage, digests, touched) = (OnceLock::new(), OnceLock::new(), AtomicU64::new(0));
        Self { path, storage, seal, digests, compared: Mutex::default(), touched }
    }

    pub(in crate::checkpoint) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn touched(&self) -> Touched {
        Touched { path: self.path.clone(), n_bytes: self.touched.load(Ordering::Relaxed) }
    }

    /// Counts bytes that were read or lent out.
    pub(super) fn touch(&self, n_bytes: usize) {
        self.touched.fetch_add(n_bytes as u64, Ordering::Relaxed);
    }

    /// The bytes; a file of our own is opened and checked first.
    pub(in crate::checkpoint) fn storage(&self) -> Result<&Storage, CheckpointError> {
        if let Some(storage) = self.storage.get() {
            return Ok(storage);
        }
        let seal = self.seal.as_ref().expect("a file without a seal is open from the beginning");
        let storage = self.open(seal)?;
        let digests = if seal.compares { self.read_digests(seal)? } else { HashMap::new() };
        // Another thread may have been first; both have found the same.
        let _ = self.digests.set(digests);
        Ok(self.storage.get_or_init(|| storage))
    }

    fn open(&self, seal: &Seal) -> Result<Storage, CheckpointError> {
        let cannot_read = |source| CheckpointError::Read { path: self.path.clone(), source };
        if !self.path.exists() {
            own::check_present(&self.path, &seal.whole)?;
        }
        let (file, len) = open_file(&self.path)?;
        let mut findings = Findings::default();
        let expected = seal.layout.length;
        if len == expected {
            let mut header = vec![0; seal.layout.header.len()];
            file.read_exact_at(&mut header, 0).map_err(cannot_read)?;
            if header != seal.layout.header {
                findings.add("(header)", "the one that the manifest makes", "another (a byte has changed)");
            }
        } else {
            findings.add("(file)", format!("{expected} bytes"), format!("{len} bytes"));
        }
        if !findings.is_empty() {
            return Err(CheckpointError::Malformed { file: self.path.display().to_string(), findings });
        }
        if !seal.mmap {
            return Ok(Storage::File(file));
        }
        let bytes = HostBytes::of_file(map::file(&file).map_err(cannot_read)?, file);
        if (bytes.as_slice().len() as u64) < expected {
            let error = io::Error::new(io::ErrorKind::UnexpectedEof, "the file shrank");
            return Err(cannot_read(error));
        }
        Ok(Storage::Memory(bytes))
    }

    /// The hashes of what is in the file: from the rank's own manifest where there is one.
    fn read_digests(&self, seal: &Seal) -> Result<HashMap<String, Digest>, CheckpointError> {
        if seal.whole.split.is_none() {
            let rows = seal.whole.tensors.iter();
            return Ok(rows.map(|row| (row.name.clone(), row.sha256)).collect());
        }
        let path = self.path.with_file_name(manifest::FILE);
        let file = path.display().to_string();
        let found = RankManifest::parse(&file, &read_bounded(&path, manifest::MAX_BYTES)?)?;
        found.expect(&file, (&seal.whole, seal.identity), seal.rank, &seal.layout)?;
        Ok(found.tensors.into_iter().map(|row| (row.name, row.sha256)).collect())
    }

    /// Reads a rectangle without gaps.
    pub(super) fn read(&self, rect: Rect, dtype: DType, out: &mut [u8]) -> Result<(), CheckpointError> {
        let (row_bytes, stride) = (rect.cols * dtype.bytes(), rect.ld * dtype.bytes());
        self.touch(out.len());
        if out.is_empty() {
            return Ok(());
        }
        let (out, row_bytes) =
            if rect.cols == rect.ld { (out, rect.rows * row_bytes) } else { (out, row_bytes) };
        let rows = out.chunks_exact_mut(row_bytes).enumerate();
        match self.storage()? {
            Storage::Memory(bytes) => {
                let bytes = bytes.as_slice();
                for (row, out) in rows {
                    let start = rect.offset + row * stride;
                    out.copy_from_slice(&bytes[start..start + row_bytes]);
                }
            }
            Storage::File(file) => {
                for (row, out) in rows {
                    let start = (rect.offset + row * stride) as u64;
                    file.read_exact_at(out, start)
                        .map_err(|source| CheckpointError::Read { path: self.path.clone(), source })?;
                }
            }
        }
        Ok(())
    }

    /// Compares a tensor of the file to its hash if `pieces`, in order of the file, are all of it. Once is enough.
    pub(super) fn compare<'a>(
        &self,
        tensor: &str,
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), CheckpointError> {
        if !self.wants_comparing(tensor, pieces.clone().map(<[u8]>::len).sum()) {
            return Ok(());
        }
        let mut hasher = Sha256::new();
        pieces.for_each(|piece| hasher.update(piece));
        self.compared(tensor, Ok(Digest(hasher.finalize().into())))
    }

    /// Whether so many bytes are all of a tensor of the file, which has not been compared to its hash.
    pub(super) fn wants_comparing(&self, tensor: &str, n_bytes: usize) -> bool {
        let slot = self.seal.as_ref().filter(|seal| seal.compares).and_then(|seal| seal.layout.slot(tensor));
        let compared = || self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        slot.is_some_and(|slot| n_bytes as u64 == slot.length) && !compared().contains(tensor)
    }

    /// Takes in what a tensor's hash was found to be.
    pub(super) fn compared(&self, tensor: &str, digest: io::Result<Digest>) -> Result<(), CheckpointError> {
        let digest = digest.map_err(|source| CheckpointError::Read { path: self.path.clone(), source })?;
        self.expect(tensor, digest)?;
        self.compared.lock().unwrap_or_else(PoisonError::into_inner).insert(tensor.to_owned());
        Ok(())
    }

    /// Whether `found` is the hash of a tensor of the file.
    pub(in crate::checkpoint) fn expect(&self, tensor: &str, found: Digest) -> Result<(), CheckpointError> {
        self.storage()?;
        match self.digests.get().and_then(|digests| digests.get(tensor)) {
            Some(expected) if *expected != found => Err(CheckpointError::Hash {
                file: self.path.display().to_string(),
                what: tensor.to_owned(),
                expected: expected.to_string(),
                found: found.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Bytes of the file from `at` on, for hashing; not counted as touched.
    pub(in crate::checkpoint) fn read_at(&self, at: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        match self.storage()? {
            Storage::Memory(bytes) => {
                let at = at as usize;
                out.copy_from_slice(&bytes.as_slice()[at..at + out.len()]);
                Ok(())
            }
            Storage::File(file) => file
                .read_exact_at(out, at)
                .map_err(|source| CheckpointError::Read { path: self.path.clone(), source }),
        }
    }
}
