//! Folders of libraries and of compiled kernels, from the environment.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use dist_kernels::cuda::cache::KernelCache;
use dist_kernels::cuda::libraries::{Libraries, LibraryDirs};

use crate::problem::Problem;

/// Where toolkits and drivers put libraries, if the loader does not know it.
const SYSTEM_DIRS: [&str; 5] =
    ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib", "/usr/lib64", "/usr/local/lib"];

/// NVIDIA's libraries; none is opened yet.
pub fn libraries() -> Libraries {
    Libraries::new(dirs_of(&|name| std::env::var_os(name).filter(|value| !value.is_empty())))
}

/// `DIST_CUDA_LIB`, the loader, packages of Python's environments, toolkits.
fn dirs_of(var: &dyn Fn(&str) -> Option<OsString>) -> LibraryDirs {
    let listed = |name: &str| var(name).map_or_else(Vec::new, |dirs| std::env::split_paths(&dirs).collect());
    let mut roots: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(var).map(PathBuf::from).collect();
    // The first Python of the path: where it is tells where its packages are.
    let python = listed("PATH").into_iter().find(|dir: &PathBuf| dir.join("python3").is_file());
    roots.extend(python.as_deref().and_then(Path::parent).map(Path::to_owned));
    roots.extend(var("HOME").map(|home| Path::new(&home).join(".local")));
    roots.extend(["/usr/local", "/usr"].map(PathBuf::from));
    let mut seen = BTreeSet::new();
    let packages = roots.iter().flat_map(|root| python_dirs(root));
    let last = packages.chain(SYSTEM_DIRS.map(PathBuf::from));
    let last = last.filter(|dir| dir.is_dir() && seen.insert(dir.clone())).collect();
    LibraryDirs { first: listed("DIST_CUDA_LIB"), asks_loader: true, last }
}

/// `nvidia/*/lib` of a Python installation's packages: `nvidia/cu13/lib`, or a folder a library as older ones have it.
fn python_dirs(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for python in entries(&root.join("lib")) {
        if !python.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")) {
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

/// Where compiled kernels are kept: `DIST_KERNEL_CACHE`, or the user's cache folder.
pub fn kernel_cache() -> anyhow::Result<KernelCache> {
    let dir = cache_dir_of(&|name| std::env::var_os(name).filter(|value| !value.is_empty()));
    let dir = dir.ok_or_else(|| {
        Problem::usage("neither HOME nor XDG_CACHE_HOME is set: no folder for compiled kernels")
            .help("set DIST_KERNEL_CACHE to a folder")
    })?;
    Ok(KernelCache::new(dir))
}

fn cache_dir_of(var: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let dir = |name| var(name).map(PathBuf::from);
    let user = || dir("XDG_CACHE_HOME").or_else(|| Some(dir("HOME")?.join(".cache")));
    dir("DIST_KERNEL_CACHE").or_else(|| Some(user()?.join("dist/kernels")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        let pairs: Vec<_> =
            pairs.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        move |name: &str| pairs.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    #[test]
    fn packages_of_pythons_environments_are_looked_through_in_order() {
        let root = tempfile::tempdir().unwrap();
        let dir = |path: &str| {
            let dir = root.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            dir
        };
        let new = dir("venv/lib/python3.12/site-packages/nvidia/cu13/lib");
        let old = dir("conda/lib/python3.11/site-packages/nvidia/cuda_nvrtc/lib");
        let of_path = dir("else/lib/python3.10/dist-packages/nvidia/cublas/lib");
        fs::write(dir("else/bin").join("python3"), "").unwrap();
        let at = |path: &str| root.path().join(path).display().to_string();
        let (venv, conda, path) = (at("venv"), at("conda"), format!("{}:{}", at("nowhere"), at("else/bin")));
        let own = format!("{}:{}", at("a"), at("b"));
        let set = [
            ("VIRTUAL_ENV", venv.as_str()),
            ("CONDA_PREFIX", &conda),
            ("PATH", &path),
            ("DIST_CUDA_LIB", &own),
        ];
        let dirs = dirs_of(&environment(&set));
        assert_eq!(dirs.first, [root.path().join("a"), root.path().join("b")]);
        assert!(dirs.asks_loader);
        assert_eq!(dirs.last[..3], [new, old, of_path]);
    }

    #[test]
    fn kernels_are_kept_where_the_user_says() {
        let told = |pairs: &[(&str, &str)]| cache_dir_of(&environment(pairs));
        let all = [("DIST_KERNEL_CACHE", "/k"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(told(&all), Some(PathBuf::from("/k")));
        assert_eq!(told(&all[1..]), Some(PathBuf::from("/x/dist/kernels")));
        assert_eq!(told(&all[2..]), Some(PathBuf::from("/h/.cache/dist/kernels")));
        assert_eq!(told(&[]), None);
    }
}
