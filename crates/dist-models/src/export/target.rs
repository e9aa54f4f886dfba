//! Where a checkpoint is written: beside its place, and renamed when all of it is on the disk.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with, statvfs};
use rustix::io::Errno;

use super::ExportError;
use crate::manifest;

/// Room for manifests and the tokenizer beside the weights.
const BESIDE_BYTES: u64 = 16 << 20;

/// A directory that is being written. Dropped before it is [committed](Self::commit), it leaves nothing behind.
pub(super) struct Target {
    place: PathBuf,
    /// Beside the place, on the same file system.
    dir: PathBuf,
    /// Locked while the run lives, so that what a killed run left is told from what another run writes.
    lock: Option<File>,
    /// Directories above it that were made for it, innermost first.
    made: Vec<PathBuf>,
    is_done: bool,
}

impl Target {
    /// Makes room beside `place`. What an earlier run left there when it was killed is removed.
    pub(super) fn begin(place: &Path, overwrite: bool, n_bytes: u64) -> Result<Self, ExportError> {
        let place = std::path::absolute(place).map_err(ExportError::write(place))?;
        check_place(&place, overwrite)?;
        let parent = place.parent().unwrap_or(&place).to_owned();
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let dir = parent.join(format!(".{name}.partial"));
        let made = missing_above(&place);
        let mut target = Self { place, dir, lock: None, made, is_done: false };
        fs::create_dir_all(&parent).map_err(ExportError::write(&parent))?;
        target.take()?;
        let free = statvfs(&parent).map_err(|error| ExportError::write(&parent)(error.into()))?;
        let available = free.f_bavail.saturating_mul(free.f_frsize);
        let needed = n_bytes.saturating_add(BESIDE_BYTES);
        if available < needed {
            return Err(ExportError::NoSpace { dir: target.place.clone(), needed, available });
        }
        Ok(target)
    }

    /// Takes the directory beside the place for this run alone, empty.
    fn take(&mut self) -> Result<(), ExportError> {
        let dir = self.dir.clone();
        let cannot = || ExportError::write(&dir);
        if let Err(error) = fs::create_dir(&dir)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(cannot()(error));
        }
        let lock = File::open(&dir).map_err(cannot())?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(ExportError::Busy { dir: self.place.clone() }),
            Err(error) => return Err(cannot()(error.into())),
        }
        self.lock = Some(lock);
        for entry in fs::read_dir(&dir).map_err(cannot())? {
            let path = entry.map_err(cannot())?.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(ExportError::write(&path))?;
        }
        Ok(())
    }

    /// Where to write.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the directory that will hold the file at `path`.
    pub(super) fn create_parent(&self, path: &Path) -> Result<(), ExportError> {
        let parent = path.parent().unwrap_or(&self.dir);
        fs::create_dir_all(parent).map_err(ExportError::write(parent))
    }

    /// Writes a small file, to the disk.
    pub(super) fn write(&self, name: &Path, bytes: &[u8]) -> Result<(), ExportError> {
        let path = self.dir.join(name);
        let write = || {
            let mut file = File::create(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(ExportError::write(&path))
    }

    /// Puts it in its place, in one step.
    pub(super) fn commit(mut self) -> Result<PathBuf, ExportError> {
        let cannot = ExportError::write;
        for entry in fs::read_dir(&self.dir).map_err(cannot(&self.dir))?.flatten() {
            if entry.path().is_dir() {
                sync_dir(&entry.path()).map_err(cannot(&entry.path()))?;
            }
        }
        sync_dir(&self.dir).map_err(cannot(&self.dir))?;
        if self.place.exists() {
            self.exchange().map_err(cannot(&self.place))?;
        } else {
            fs::rename(&self.dir, &self.place).map_err(cannot(&self.place))?;
        }
        self.is_done = true;
        let parent = self.place.parent().unwrap_or(&self.place);
        sync_dir(parent).map_err(cannot(parent))?;
        // What was replaced; nothing where the place was free.
        let _ = fs::remove_dir_all(&self.dir);
        Ok(self.place.clone())
    }

    /// Swaps with what is in the place. File systems that cannot do it in one step do it in two.
    fn exchange(&self) -> io::Result<()> {
        match renameat_with(CWD, &self.dir, CWD, &self.place, RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                let old = self.dir.with_extension("old");
                fs::rename(&self.place, &old)?;
                fs::rename(&self.dir, &self.place).inspect_err(|_| {
                    let _ = fs::rename(&old, &self.place);
                })?;
                fs::rename(&old, &self.dir)
            }
            result => Ok(result?),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Without the lock it is another run's.
        if self.is_done || self.lock.is_none() {
            return;
        }
        let _ = fs::remove_dir_all(&self.dir);
        for dir in &self.made {
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
    }
}

/// An empty directory may be filled; a checkpoint of ours may be replaced where that was asked for; nothing else.
fn check_place(place: &Path, overwrite: bool) -> Result<(), ExportError> {
    let dir = || place.to_owned();
    if !place.exists() {
        return Ok(());
    }
    if !place.is_dir() {
        return Err(ExportError::Foreign { dir: dir() });
    }
    let is_empty = fs::read_dir(place).map_err(ExportError::write(place))?.next().is_none();
    match (is_empty, place.join(manifest::FILE).exists(), overwrite) {
        (true, _, _) | (_, true, true) => Ok(()),
        (_, true, false) => Err(ExportError::Exists { dir: dir() }),
        (_, false, _) => Err(ExportError::Foreign { dir: dir() }),
    }
}

/// Directories above `place` that are not there, innermost first.
fn missing_above(place: &Path) -> Vec<PathBuf> {
    place.ancestors().skip(1).take_while(|dir| !dir.exists()).map(Path::to_owned).collect()
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
