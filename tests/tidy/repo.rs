//! Finds the repository and reads its text files. The place is found at run time, because test binaries are carried
//! to machines where the checkout lies elsewhere.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use super::source::Source;

/// Every text file that git would track, in order of path.
pub(crate) fn read() -> Vec<Source> {
    let root = root();
    let ignored = ignored(&fs::read_to_string(root.join(".gitignore")).unwrap_or_default());
    let mut sources = Vec::new();
    walk(&root, "", &ignored, &mut sources);
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(sources.len() > 20, "{} holds almost no files; set DIST_REPO to the checkout", root.display());
    sources
}

/// `DIST_REPO`, or the nearest folder upwards that holds `crates/`.
fn root() -> PathBuf {
    if let Some(root) = env::var_os("DIST_REPO") {
        return root.into();
    }
    let start = env::current_dir().expect("tests run in a folder");
    let found = start.ancestors().find(|dir| dir.join("crates").is_dir());
    found.expect("no folder upwards holds crates/; set DIST_REPO to the checkout").to_owned()
}

/// The rooted entries of `.gitignore`; other forms are not used in this repository.
fn ignored(gitignore: &str) -> Vec<String> {
    let rooted = gitignore.lines().filter_map(|line| line.trim().strip_prefix('/'));
    rooted.map(|entry| entry.trim_end_matches('/').to_owned()).collect()
}

fn walk(root: &Path, dir: &str, ignored: &[String], sources: &mut Vec<Source>) {
    let entries = fs::read_dir(root.join(dir)).unwrap_or_else(|error| panic!("read {dir}: {error}"));
    for entry in entries {
        let entry = entry.expect("a folder that opens can be listed");
        let name = entry.file_name().into_string().expect("names in the repository are UTF-8");
        let path = if dir.is_empty() { name.clone() } else { format!("{dir}/{name}") };
        let kind = entry.file_type().expect("a listed entry has a type");
        if name == ".git" || ignored.contains(&path) {
            continue;
        }
        if kind.is_dir() {
            walk(root, &path, ignored, sources);
        } else if kind.is_file() && is_text(&path) {
            let text = fs::read(entry.path()).unwrap_or_else(|error| panic!("read {path}: {error}"));
            let text =
                String::from_utf8(text).unwrap_or_else(|_| panic!("{path}: not UTF-8; save it as UTF-8"));
            sources.push(Source::new(&path, &text));
        }
    }
}

fn is_text(path: &str) -> bool {
    const EXTENSIONS: [&str; 7] = ["rs", "md", "toml", "sh", "py", "cu", "yml"];
    path == ".ci/run" || path.rsplit_once('.').is_some_and(|(_, end)| EXTENSIONS.contains(&end))
}

#[test]
fn gitignore_gives_its_rooted_entries() {
    assert_eq!(ignored("/target\n# note\n/fuzz/corpus/\n"), ["target", "fuzz/corpus"]);
}

#[test]
fn text_is_known_by_its_name() {
    assert!(is_text(".ci/run") && is_text("a/b.cu") && !is_text("a/model.safetensors"));
}
