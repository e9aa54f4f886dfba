//! What a module's first line and a file's name must say.

use super::source::Source;

/// Names that say nothing about what a file holds.
const EMPTY_NAMES: [&str; 4] = ["utils", "common", "helpers", "types"];

pub(crate) fn without_purpose(sources: &[Source]) -> Vec<String> {
    let rust = sources.iter().filter(|source| source.is_rust() && !source.text.starts_with("//!"));
    let cure = "begin with a `//!` line that says what the module owns";
    rust.map(|source| format!("{}:1: no purpose: {cure}", source.path)).collect()
}

pub(crate) fn empty_names(sources: &[Source]) -> Vec<String> {
    let rust = sources.iter().filter(|source| source.is_rust());
    let named = rust.filter_map(|source| {
        let path = source.path.trim_end_matches(".rs");
        let name = path.split('/').find(|part| EMPTY_NAMES.contains(part))?;
        Some(format!("{}:1: `{name}` names nothing: name the one noun that the file holds", source.path))
    });
    named.collect()
}

#[test]
fn a_module_without_purpose_is_caught() {
    let sources = [Source::new("a.rs", "// What.\n"), Source::new("b.rs", "//! What.\n")];
    let findings = without_purpose(&sources);
    assert_eq!(findings.len(), 1);
    assert!(findings[0].starts_with("a.rs:1"));
}

#[test]
fn empty_names_are_caught_for_files_and_folders() {
    for path in ["src/utils.rs", "src/common.rs", "tests/common/mod.rs", "src/helpers.rs", "src/types.rs"] {
        assert_eq!(empty_names(&[Source::new(path, "")]).len(), 1, "{path}");
    }
    assert!(empty_names(&[Source::new("src/dtypes.rs", "")]).is_empty());
}
