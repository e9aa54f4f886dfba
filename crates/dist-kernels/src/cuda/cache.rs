//! Compiled kernels on disk. An entry's name holds a hash of source and options, the architecture and the compiler's
//! version; the entry holds a checksum, so that one that is damaged is made anew. Entries are written beside their
//! place and renamed, so that nobody reads half of one.

use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::compile::{CompileError, Compiler, Program, Usage, usages, warnings};
use super::libraries::Version;
use super::regular_file;

/// What an entry begins with; its number changes with the entry's form.
const MAGIC: &[u8] = b"dist-cubin 1\n";
const DIGITS: &[u8; 16] = b"0123456789abcdef";
const CHECKSUM_LEN: usize = 64;
/// Bytes of an entry at most: the largest of ours are a few MB.
const ENTRY_BYTES_MAX: u64 = 64 << 20;

/// Machine code of a unit, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cubin {
    /// Machine code.
    pub bytes: Vec<u8>,
    /// What each kernel takes.
    pub usages: Vec<Usage>,
    /// What the compiler warned of.
    pub warnings: Vec<String>,
    /// The compiler's version.
    pub compiler: Version,
    /// Where it comes from.
    pub origin: Origin,
}

/// Where kernels come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An entry of the cache.
    Cache(PathBuf),
    /// Compiled now and stored there.
    Compiled(PathBuf),
    /// Compiled now; they could not be stored.
    NotStored(String),
}

/// What is known of a program without compiling it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// A sound entry is there, whatever version of the compiler has made it.
    Sound,
    /// What is there cannot be used, and why.
    Damaged(String),
    /// Nothing is there.
    Nothing,
}

/// What stands before the machine code of an entry.
#[derive(Serialize, Deserialize)]
struct Head {
    compiler: Version,
    usages: Vec<Usage>,
    warnings: Vec<String>,
    n_bytes: usize,
}

/// A folder of compiled kernels.
#[derive(Clone, Debug)]
pub struct KernelCache {
    dir: PathBuf,
}

impl KernelCache {
    /// In `dir`, which is made when the first entry is written.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernels of `program`: those of the cache, or compiled and stored. Without a compiler, those that any version
    /// of it has made will do.
    pub fn get(
        &self,
        program: &Program,
        compiler: Result<&dyn Compiler, &dyn std::fmt::Display>,
    ) -> Result<Cubin, CompileError> {
        let compiler = match compiler {
            Ok(compiler) => compiler,
            Err(why) => return self.without_compiler(program, why),
        };
        let path = self.path(program, compiler.version());
        match read(&path) {
            Ok(Some(cubin)) => return Ok(cubin),
            Ok(None) => {}
            Err(why) => tracing::warn!("{} is damaged ({why}) and is made anew", path.display()),
        }
        let compiled = compiler.compile(program)?;
        let mut cubin = Cubin {
            usages: usages(&compiled.log),
            warnings: warnings(&compiled.log),
            bytes: compiled.cubin,
            compiler: compiler.version(),
            origin: Origin::Compiled(path.clone()),
        };
        if let Err(error) = encode(&cubin).and_then(|entry| write_beside(&path, &entry)) {
            let why = format!("{}: {error}", path.display());
            tracing::warn!("compiled kernels cannot be stored: {why}");
            cubin.origin = Origin::NotStored(why);
        }
        Ok(cubin)
    }

    /// `get` for all of `programs`, as many at a time as there are cores, and how long each took. `begins` is told of each
    /// when its turn comes.
    pub fn get_all(
        &self,
        programs: &[Program],
        compiler: &dyn Compiler,
        begins: &(dyn Fn(&Program) + Sync),
    ) -> Vec<(Result<Cubin, CompileError>, Duration)> {
        let n_threads = std::thread::available_parallelism().map_or(1, usize::from).min(programs.len());
        let (next, (done, results)) = (&AtomicUsize::new(0), mpsc::channel());
        let work = move |done: &mpsc::Sender<_>| {
            while let idx = next.fetch_add(1, Ordering::Relaxed)
                && let Some(program) = programs.get(idx)
            {
                begins(program);
                let start = Instant::now();
                let outcome = self.get(program, Ok(compiler));
                done.send((idx, outcome, start.elapsed())).expect("results are taken after all are there");
            }
        };
        std::thread::scope(|scope| {
            // A thread that cannot be had leaves its work to the others, and to this one.
            for _ in 1..n_threads {
                let done = done.clone();
                let _ = std::thread::Builder::new().spawn_scoped(scope, move || work(&done));
            }
            work(&done);
        });
        drop(done);
        let mut all: Vec<_> = results.iter().collect();
        all.sort_by_key(|result| result.0);
        all.into_iter().map(|(_, outcome, took)| (outcome, took)).collect()
    }

    /// The kernels of `program`, if they are there by that version of the compiler.
    pub(super) fn kept_by(&self, program: &Program, compiler: Version) -> Option<Cubin> {
        read(&self.path(program, compiler)).ok().flatten()
    }

    /// Whether this version of the compiler need not compile `program` again.
    pub fn holds_of(&self, program: &Program, compiler: Version) -> bool {
        self.kept_by(program, compiler).is_some()
    }

    /// Makes the folder, and writes a file to it and removes it again: whether entries can be stored.
    pub fn try_to_write(&self) -> io::Result<()> {
        let path = self.dir.join(format!("try-{:016x}", random()));
        write_beside(&path, b"")?;
        fs::remove_file(path)
    }

    fn path(&self, program: &Program, compiler: Version) -> PathBuf {
        self.dir.join(format!("{}-nvrtc{compiler}.cubin", stem(program)))
    }

    /// Whether `program` is there, whatever version has made it.
    pub fn holds(&self, program: &Program) -> bool {
        self.look(program) == Kept::Sound
    }

    /// What is there of `program`.
    pub fn look(&self, program: &Program) -> Kept {
        let mut found = Kept::Nothing;
        for path in self.entries(program) {
            match read(&path) {
                Ok(Some(_)) => return Kept::Sound,
                Ok(None) => {}
                Err(why) => found = Kept::Damaged(why),
            }
        }
        found
    }

    fn without_compiler(
        &self,
        program: &Program,
        why: &dyn std::fmt::Display,
    ) -> Result<Cubin, CompileError> {
        let found = self.entries(program).iter().find_map(|path| read(path).ok().flatten());
        found.ok_or_else(|| CompileError::NoCompiler {
            unit: program.unit.to_owned(),
            arch: program.arch.to_string(),
            why: why.to_string(),
        })
    }

    /// Entries of `program` by any version, the newest version first.
    fn entries(&self, program: &Program) -> Vec<PathBuf> {
        let start = format!("{}-nvrtc", stem(program));
        let version = |path: &PathBuf| {
            let name = path.file_name()?.to_str()?;
            let (major, minor) = name.strip_prefix(&start)?.strip_suffix(".cubin")?.split_once('.')?;
            Some(Version { major: major.parse().ok()?, minor: minor.parse().ok()? })
        };
        let read = fs::read_dir(&self.dir).into_iter().flatten();
        let mut found: Vec<_> = read
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter_map(|path| Some((version(&path)?, path)))
            .collect();
        found.sort();
        found.into_iter().rev().map(|(_, path)| path).collect()
    }
}

/// Writes a file beside its place and renames it, so that nobody reads half of it.
pub(super) fn write_beside(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    // Other threads, and processes with the same number in other containers, may write the same file.
    let beside = path.with_extension(format!("{:016x}.part", random()));
    let mut file = fs::File::create_new(&beside)?;
    let written =
        file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // What is left is of no use; that it cannot be removed is told by the error itself.
        let _ = fs::remove_file(&beside);
    }
    written
}

/// A number that nobody else has, most likely: the keys of the library's hash are random.
fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// An entry's name without the compiler's version.
fn stem(program: &Program) -> String {
    let mut hash = Sha256::new();
    for option in program.options() {
        hash.update(option.as_bytes());
        hash.update([0]);
    }
    hash.update(program.source.as_bytes());
    format!("{}-{}-{}", program.unit, program.arch, &hex(&hash.finalize())[..32])
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| DIGITS[usize::from(digit)] as char)
        .collect()
}

fn encode(cubin: &Cubin) -> io::Result<Vec<u8>> {
    let head = Head {
        compiler: cubin.compiler,
        usages: cubin.usages.clone(),
        warnings: cubin.warnings.clone(),
        n_bytes: cubin.bytes.len(),
    };
    let mut body = serde_json::to_vec(&head)?;
    body.push(b'\n');
    body.extend_from_slice(&cubin.bytes);
    let checksum = hex(&Sha256::digest(&body));
    Ok([MAGIC, checksum.as_bytes(), b"\n", &body].concat())
}

/// An entry; `None` if there is none, and why it cannot be used if there is.
fn read(path: &Path) -> Result<Option<Cubin>, String> {
    let Some(bytes) = regular_file::read(path, ENTRY_BYTES_MAX)? else { return Ok(None) };
    let rest = bytes.strip_prefix(MAGIC).ok_or("it does not begin as an entry does")?;
    let (checksum, rest) = rest.split_at_checked(CHECKSUM_LEN).ok_or("it is too short")?;
    let body = rest.strip_prefix(b"\n").ok_or("it is too short")?;
    if hex(&Sha256::digest(body)).as_bytes() != checksum {
        return Err("its checksum is another".to_owned());
    }
    let end = body.iter().position(|&byte| byte == b'\n').ok_or("it has no head")?;
    let head: Head = serde_json::from_slice(&body[..end]).map_err(|error| error.to_string())?;
    let code = &body[end + 1..];
    if code.len() != head.n_bytes || code.is_empty() {
        return Err("its machine code has another length".to_owned());
    }
    let Head { compiler, usages, warnings, .. } = head;
    Ok(Some(Cubin {
        bytes: code.to_vec(),
        usages,
        warnings,
        compiler,
        origin: Origin::Cache(path.to_owned()),
    }))
}

#[cfg(test)]
mod tests;
