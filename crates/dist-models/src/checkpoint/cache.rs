//! Finds `org/model` in the local Hugging Face cache. Nothing is ever downloaded.

use std::path::{Path, PathBuf};

use super::error::CheckpointError;

/// Where the local cache is.
#[derive(Clone, Debug)]
pub struct HfCache {
    /// The folder with `models--ORG--NAME`: `$HF_HOME/hub`, or `~/.cache/huggingface/hub`.
    pub hub_dir: PathBuf,
}

/// Whether `name` is spelled as `org/model`.
pub fn is_repo_name(name: &str) -> bool {
    let is_word = |word: &str| {
        !word.is_empty()
            && !word.starts_with('.')
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    name.split_once('/').is_some_and(|(org, model)| is_word(org) && is_word(model))
}

/// The directory of `org/model` in the cache: the snapshot that `refs/main` names, or the only one.
pub fn find(name: &str, cache: &HfCache) -> Result<PathBuf, CheckpointError> {
    let not_cached = || CheckpointError::NotCached { name: name.to_owned(), dir: cache.hub_dir.clone() };
    if !is_repo_name(name) {
        return Err(CheckpointError::NotFound { path: name.into() });
    }
    let repo = cache.hub_dir.join(format!("models--{}", name.replacen('/', "--", 1)));
    let snapshots = repo.join("snapshots");
    let main = std::fs::read_to_string(repo.join("refs").join("main")).ok();
    // A revision is a hash; anything else in that file could lead out of the cache.
    let revision = main.as_deref().map(str::trim).filter(|rev| !rev.is_empty());
    if let Some(revision) = revision.filter(|rev| rev.bytes().all(|byte| byte.is_ascii_hexdigit())) {
        let dir = snapshots.join(revision);
        if dir.is_dir() {
            return Ok(dir);
        }
    }
    only_folder(&snapshots).ok_or_else(not_cached)
}

fn only_folder(dir: &Path) -> Option<PathBuf> {
    let mut folders =
        std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    let first = folders.next()?;
    folders.next().is_none().then_some(first)
}
