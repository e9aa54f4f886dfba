//! NVIDIA's driver, GPUs and libraries, as far as files tell. Nothing is opened, so nothing can go wrong by looking.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Name for people, and how the file's name begins.
const LIBRARIES: [(&str, &str); 4] = [
    ("CUDA driver", "libcuda.so."),
    ("NVRTC", "libnvrtc.so."),
    ("cuBLASLt", "libcublasLt.so."),
    ("NCCL", "libnccl.so."),
];

/// Where distributions keep libraries.
const SYSTEM_DIRS: [&str; 8] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/usr/lib/wsl/lib",
    "/usr/local/cuda/lib64",
    "/usr/local/lib",
];

/// A library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    /// Its name.
    pub name: String,
    /// Where it was found first.
    pub path: Option<PathBuf>,
    /// What its file's name says of its version.
    pub version: Option<String>,
}

/// GPUs of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// The kernel driver's version.
    pub driver: Option<String>,
    /// Names.
    pub devices: Vec<String>,
    /// What is used of NVIDIA's libraries, found or not.
    pub libraries: Vec<Library>,
    /// Folders that were looked through.
    pub searched: Vec<PathBuf>,
}

impl Gpu {
    /// Of this machine.
    pub fn of_this() -> Self {
        let driver = fs::read_to_string("/proc/driver/nvidia/version").ok();
        let var = |name: &str| std::env::var_os(name);
        let listed =
            |name: &str| var(name).map_or_else(Vec::new, |dirs| std::env::split_paths(&dirs).collect());
        let mut dirs: Vec<PathBuf> = listed("DIST_CUDA_LIB");
        dirs.extend(listed("LD_LIBRARY_PATH"));
        for root in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(var) {
            dirs.extend(python_dirs(Path::new(&root)));
        }
        dirs.extend(SYSTEM_DIRS.map(PathBuf::from));
        dirs.extend(["/usr/local", "/usr"].into_iter().flat_map(|root| python_dirs(Path::new(root))));
        let mut seen = BTreeSet::new();
        dirs.retain(|dir| dir.is_dir() && seen.insert(dir.clone()));
        Self {
            driver: driver.and_then(|text| driver_version(&text)),
            devices: devices(Path::new("/proc/driver/nvidia/gpus")),
            libraries: LIBRARIES.map(|(name, start)| find(name, start, &dirs)).to_vec(),
            searched: dirs,
        }
    }
}

/// `nvidia/*/lib` of a Python installation's packages.
fn python_dirs(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in entries(&root.join("lib")) {
        if !file_name(&python).starts_with("python3") {
            continue;
        }
        for packages in ["site-packages", "dist-packages"] {
            let vendor = python.join(packages).join("nvidia");
            found.extend(entries(&vendor).into_iter().map(|dir| dir.join("lib")).filter(|dir| dir.is_dir()));
        }
    }
    found
}

/// What a folder holds, in order; nothing if it cannot be read.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let read = fs::read_dir(dir).into_iter().flatten();
    let mut found: Vec<_> = read.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn devices(dir: &Path) -> Vec<String> {
    let model = |gpu: PathBuf| {
        let text = fs::read_to_string(gpu.join("information")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
        Some(line.trim().to_owned())
    };
    entries(dir).into_iter().filter_map(model).collect()
}

fn find(name: &str, start: &str, dirs: &[PathBuf]) -> Library {
    let in_dir = |dir: &PathBuf| entries(dir).into_iter().find(|path| file_name(path).starts_with(start));
    let path = dirs.iter().find_map(in_dir);
    // The name with which links end has the whole version.
    let real = path.as_ref().and_then(|path| fs::canonicalize(path).ok()).map(|path| file_name(&path));
    let version = real.and_then(|real| Some(real.split_once(".so.")?.1.to_owned()));
    Library { name: name.to_owned(), path, version }
}

/// The version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  …`.
fn driver_version(text: &str) -> Option<String> {
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_driver_says() {
        let text =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27 2025\nGCC version:  12\n";
        assert_eq!(driver_version(text).as_deref(), Some("580.82.07"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.1  Release Build\n";
        assert_eq!(driver_version(open).as_deref(), Some("570.1"));
        assert_eq!(driver_version(""), None);
    }

    #[test]
    fn libraries_of_a_python_installation_are_found() {
        let root = tempfile::tempdir().unwrap();
        let lib = root.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::write(lib.join("libnvrtc-builtins.so.13.0"), "").unwrap();
        fs::write(lib.join("libnvrtc.so.13"), "").unwrap();
        let dirs = python_dirs(root.path());
        assert_eq!(dirs, std::slice::from_ref(&lib));
        let found = find("NVRTC", "libnvrtc.so.", &dirs);
        assert_eq!((found.path, found.version.as_deref()), (Some(lib.join("libnvrtc.so.13")), Some("13")));
        assert_eq!(find("NCCL", "libnccl.so.", &dirs).path, None);
    }
}
