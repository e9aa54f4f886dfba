//! Finding and opening NVIDIA's libraries by path. What is not there is a value that says where it was looked for;
//! nothing of cudarc may be called before [`Libraries::whole_driver`] has succeeded, because it panics on a missing
//! library, and on a function ([`symbols`]) that a library lacks.
//!
//! Where to look is the caller's to say ([`LibraryDirs`]): this crate reads no environment.

pub mod symbols;

use std::ffi::c_int;
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;
use serde::{Deserialize, Serialize};

use super::nvrtc::Nvrtc;

/// Folders to look through, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LibraryDirs {
    /// What the user named.
    pub first: Vec<PathBuf>,
    /// Whether the loader is asked then: its cache, its path, the program's own.
    pub asks_loader: bool,
    /// Where Python packages and toolkits put them.
    pub last: Vec<PathBuf>,
}

/// A version, as libraries tell their own: 13.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The number whose change breaks what others rely on.
    pub major: u32,
    /// The other one.
    pub minor: u32,
}

impl Version {
    /// Of the driver's and cuBLASLt's single number, whose last digits are the minor version's.
    fn of_number(number: usize, per_major: usize, per_minor: usize) -> Self {
        Self { major: (number / per_major) as u32, minor: (number % per_major / per_minor) as u32 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Why a library cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    /// No file of its name is there.
    #[error("{name} ({file}) was not found{}", places(.searched))]
    NotFound {
        /// For people.
        name: &'static str,
        /// The file's name.
        file: &'static str,
        /// Folders that were looked through.
        searched: Vec<PathBuf>,
    },
    /// Files of its name are there, and none of them can be used.
    #[error("{name} at {} cannot be used: {why}", .path.display())]
    Unusable {
        /// For people.
        name: &'static str,
        /// The first of them.
        path: PathBuf,
        /// What the loader says.
        why: String,
    },
    /// It opens, and functions that are called are not in it.
    #[error("{name} at {} cannot be used: it lacks {}", .path.display(), listed(.symbols))]
    Incomplete {
        /// For people.
        name: &'static str,
        /// The file.
        path: PathBuf,
        /// What it lacks.
        symbols: Vec<&'static str>,
    },
}

impl LibraryError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::NotFound { file, .. } if file.starts_with("libcuda.") => {
                "install NVIDIA's driver, or name the folder of libcuda.so.1 in DIST_CUDA_LIB".to_owned()
            }
            Self::NotFound { file, .. } => {
                format!("pip install {}, or name the folder of {file} in DIST_CUDA_LIB", package(file))
            }
            Self::Unusable { path, .. } => {
                format!("repair or remove {}, or name another folder in DIST_CUDA_LIB", path.display())
            }
            Self::Incomplete { name, path, .. } if *name == DRIVER.name => format!(
                "it is too old or not NVIDIA's own: install NVIDIA's driver 580 or later, and see what {} is",
                path.display()
            ),
            Self::Incomplete { .. } => format!(
                "it is too old or not NVIDIA's own: pip install {}, and name its folder in DIST_CUDA_LIB",
                package("")
            ),
        }
    }
}

fn package(file: &str) -> &'static str {
    match file {
        _ if file.starts_with("libnvrtc") => "nvidia-cuda-nvrtc==13.0.88",
        _ if file.starts_with("libnccl") => "nvidia-nccl-cu13==2.28.9",
        _ => "nvidia-cublas==13.1.0.3",
    }
}

/// The first few of them.
fn listed(symbols: &[&str]) -> String {
    const MOST: usize = 4;
    let first = symbols[..symbols.len().min(MOST)].join(", ");
    if symbols.len() <= MOST { first } else { format!("{first} and {} more", symbols.len() - MOST) }
}

fn places(searched: &[PathBuf]) -> String {
    if searched.is_empty() {
        return String::new();
    }
    let dirs: Vec<_> = searched.iter().map(|dir| dir.display().to_string()).collect();
    format!(" by the loader nor in {}", dirs.join(", "))
}

/// A library that is open, and stays so until the process ends: NVIDIA's libraries do not like to be closed.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub path: PathBuf,
    /// What it says of itself.
    pub version: Version,
    pub(super) library: ManuallyDrop<Library>,
}

/// What each library is called, by people and in the file system, best first.
struct Kind {
    name: &'static str,
    files: &'static [&'static str],
    /// The beginning of a file's name that must be opened before it, from the same folder.
    before: Option<&'static str>,
    version: fn(&Library) -> Result<Version, libloading::Error>,
}

const DRIVER: Kind =
    Kind { name: "the CUDA driver", files: &["libcuda.so.1"], before: None, version: driver_version };
const NVRTC: Kind = Kind {
    name: "NVRTC",
    files: &["libnvrtc.so.13", "libnvrtc.so.12"],
    before: Some("libnvrtc-builtins.so."),
    version: nvrtc_version,
};
const CUBLAS_LT: Kind = Kind {
    name: "cuBLASLt",
    files: &["libcublasLt.so.13", "libcublasLt.so.12"],
    before: None,
    version: cublas_lt_version,
};

const NCCL: Kind = Kind { name: "NCCL", files: &["libnccl.so.2"], before: None, version: nccl_version };

/// NVIDIA's libraries, each opened when it is first asked for.
#[derive(Debug)]
pub struct Libraries {
    dirs: LibraryDirs,
    driver: OnceLock<Result<Opened, LibraryError>>,
    whole_driver: OnceLock<Result<(), LibraryError>>,
    nvrtc: OnceLock<Result<Nvrtc, LibraryError>>,
    cublas_lt: OnceLock<Result<Opened, LibraryError>>,
    nccl: OnceLock<Result<Opened, LibraryError>>,
}

impl Libraries {
    /// Opens nothing yet.
    pub fn new(dirs: LibraryDirs) -> Self {
        let (driver, cublas_lt, nccl) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self { dirs, driver, whole_driver: OnceLock::new(), nvrtc: OnceLock::new(), cublas_lt, nccl }
    }

    /// The driver, libcuda, as a file that tells its version.
    pub fn driver(&self) -> Result<&Opened, LibraryError> {
        let driver = self.driver.get_or_init(|| {
            let opened = open(&DRIVER, &self.dirs)?;
            // SAFETY: this only opens libraries by name, which `open` has just done with this one.
            let is_seen = unsafe { cudarc::driver::sys::is_culib_present() };
            if is_seen { Ok(opened) } else { Err(hidden(DRIVER.name, opened.path)) }
        });
        driver.as_ref().map_err(Clone::clone)
    }

    /// The driver with all functions that are called. One that is too old is better told by its version: look at that
    /// first.
    pub fn whole_driver(&self) -> Result<(), LibraryError> {
        let opened = self.driver()?;
        let looked_up = self.whole_driver.get_or_init(|| {
            // SAFETY: cudarc finds the library, which `driver` has seen to.
            let library = unsafe { cudarc::driver::sys::culib() };
            has_all(DRIVER.name, opened, library, symbols::of_driver())
        });
        looked_up.clone()
    }

    /// The compiler of kernels.
    pub fn nvrtc(&self) -> Result<&Nvrtc, LibraryError> {
        let nvrtc = self.nvrtc.get_or_init(|| {
            let opened = open(&NVRTC, &self.dirs)?;
            let path = opened.path.clone();
            let why = |error| LibraryError::Unusable { name: NVRTC.name, path, why: told(&error) };
            Nvrtc::new(opened).map_err(why)
        });
        nvrtc.as_ref().map_err(Clone::clone)
    }

    /// NVIDIA's matrix products, with all functions that are called.
    pub fn cublas_lt(&self) -> Result<&Opened, LibraryError> {
        let cublas_lt = self.cublas_lt.get_or_init(|| {
            let opened = open(&CUBLAS_LT, &self.dirs)?;
            // SAFETY: as for the driver.
            if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
                return Err(hidden(CUBLAS_LT.name, opened.path));
            }
            // SAFETY: cudarc finds the library, as it has just said.
            let library = unsafe { cudarc::cublaslt::sys::culib() };
            has_all(CUBLAS_LT.name, &opened, library, symbols::of_cublas_lt()).map(|()| opened)
        });
        cublas_lt.as_ref().map_err(Clone::clone)
    }

    /// NVIDIA's collectives.
    pub fn nccl(&self) -> Result<&Opened, LibraryError> {
        self.nccl.get_or_init(|| open(&NCCL, &self.dirs)).as_ref().map_err(Clone::clone)
    }

    /// Folders that are looked through beside what the loader knows.
    pub fn searched(&self) -> impl Iterator<Item = &Path> {
        self.dirs.first.iter().chain(&self.dirs.last).map(PathBuf::as_path)
    }
}

/// A library that we have opened and that cudarc would not find: its file has a name of its own.
fn hidden(name: &'static str, path: PathBuf) -> LibraryError {
    let why = "it does not carry the name that its file has".to_owned();
    LibraryError::Unusable { name, path, why }
}

/// Whether `library`, which is the one that cudarc calls, has all of `symbols`.
fn has_all(
    name: &'static str,
    opened: &Opened,
    library: &Library,
    symbols: impl Iterator<Item = &'static str>,
) -> Result<(), LibraryError> {
    // SAFETY: a function that is looked up and not called.
    let lacks = |symbol: &&str| unsafe { library.get::<unsafe extern "C" fn()>(*symbol).is_err() };
    let symbols: Vec<_> = symbols.filter(lacks).collect();
    if symbols.is_empty() {
        return Ok(());
    }
    Err(LibraryError::Incomplete { name, path: opened.path.clone(), symbols })
}

fn open(kind: &Kind, dirs: &LibraryDirs) -> Result<Opened, LibraryError> {
    let mut failed = None;
    let mut from_dirs = |dirs: &[PathBuf]| {
        let paths = dirs.iter().flat_map(|dir| kind.files.iter().map(move |file| dir.join(file)));
        paths.filter(|path| path.is_file()).find_map(|path| match open_at(kind, &path) {
            Ok(opened) => Some(opened),
            Err(error) => {
                failed.get_or_insert((path, told(&error)));
                None
            }
        })
    };
    let found = from_dirs(&dirs.first);
    let found = found.or_else(|| dirs.asks_loader.then(|| from_loader(kind)).flatten());
    if let Some(opened) = found.or_else(|| from_dirs(&dirs.last)) {
        return Ok(opened);
    }
    let name = kind.name;
    if let Some((path, why)) = failed {
        return Err(LibraryError::Unusable { name, path, why });
    }
    let searched = dirs.first.iter().chain(&dirs.last).cloned().collect();
    Err(LibraryError::NotFound { name, file: kind.files[0], searched })
}

fn open_at(kind: &Kind, path: &Path) -> Result<Opened, libloading::Error> {
    if let (Some(before), Some(dir)) = (kind.before, path.parent()) {
        for beside in beside(dir, before) {
            // SAFETY: a library of NVIDIA's, which needs it; its initialisers ask nothing of us.
            let library = unsafe { Library::new(&beside)? };
            let _stays = ManuallyDrop::new(library);
        }
    }
    // SAFETY: a library of NVIDIA's; its initialisers ask nothing of us.
    let library = ManuallyDrop::new(unsafe { Library::new(path)? });
    let version = (kind.version)(&library)?;
    Ok(Opened { path: path.to_owned(), version, library })
}

fn from_loader(kind: &Kind) -> Option<Opened> {
    kind.files.iter().find_map(|file| {
        // SAFETY: as in `open_at`.
        let library = ManuallyDrop::new(unsafe { Library::new(*file).ok()? });
        let version = (kind.version)(&library).ok()?;
        Some(Opened { path: mapped(file).unwrap_or_else(|| PathBuf::from(file)), version, library })
    })
}

/// Files of a folder whose names begin so, without NVIDIA's alternative builds.
fn beside(dir: &Path, start: &str) -> Vec<PathBuf> {
    let read = std::fs::read_dir(dir).into_iter().flatten();
    let mut found: Vec<_> = read.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.retain(|path| file_name(path).starts_with(start) && !file_name(path).contains(".alt."));
    found.sort();
    found
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The file that the loader took for `file`, as the system lists what this process has mapped.
fn mapped(file: &str) -> Option<PathBuf> {
    let start = file.trim_end_matches(|c: char| c.is_ascii_digit());
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let mut paths = maps.lines().filter_map(|line| Some(Path::new(&line[line.find('/')?..])));
    paths.find(|path| file_name(path).starts_with(start)).map(Path::to_owned)
}

fn driver_version(library: &Library) -> Result<Version, libloading::Error> {
    let mut number: c_int = 0;
    // SAFETY: the driver's documented signature; it may be called before all others.
    let status = unsafe {
        library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion")?(&raw mut number)
    };
    Ok(Version::of_number(if status == 0 { number as usize } else { 0 }, 1000, 10))
}

fn nvrtc_version(library: &Library) -> Result<Version, libloading::Error> {
    type NvrtcVersion = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC's documented signature.
    unsafe { library.get::<NvrtcVersion>(b"nvrtcVersion")?(&raw mut major, &raw mut minor) };
    Ok(Version { major: major as u32, minor: minor as u32 })
}

fn cublas_lt_version(library: &Library) -> Result<Version, libloading::Error> {
    // SAFETY: cuBLASLt's documented signature.
    let number = unsafe { library.get::<unsafe extern "C" fn() -> usize>(b"cublasLtGetVersion")?() };
    Ok(Version::of_number(number, 10_000, 100))
}

fn nccl_version(library: &Library) -> Result<Version, libloading::Error> {
    let mut number: c_int = 0;
    // SAFETY: NCCL's documented signature.
    unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion")?(&raw mut number) };
    Ok(Version::of_number(number as usize, 10_000, 100))
}

/// libloading's own sentence leaves out what the loader said.
fn told(error: &libloading::Error) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    source.unwrap_or_else(|| format!("{error:?}"))
}

#[cfg(test)]
mod tests;
