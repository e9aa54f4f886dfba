//! Which crate may depend on which, read from each `Cargo.toml`; the picture is in ARCHITECTURE.md.

use super::source::Source;

/// What one of our crates may name under `[dependencies]`.
struct Arrows {
    name: &'static str,
    /// Our own crates.
    ours: &'static [&'static str],
    others: Others,
}

enum Others {
    Any,
    Only(&'static [&'static str]),
    Not(&'static [&'static str]),
}

const ARROWS: [Arrows; 5] = [
    Arrows {
        name: "dist-core",
        ours: &[],
        others: Others::Only(&["serde", "half", "thiserror", "sha2", "libm"]),
    },
    Arrows { name: "dist-comm", ours: &["dist-core"], others: Others::Any },
    Arrows { name: "dist-kernels", ours: &["dist-core"], others: Others::Any },
    Arrows {
        name: "dist-models",
        ours: &["dist-core", "dist-comm", "dist-kernels"],
        others: Others::Not(&["cudarc", "tokio", "clap"]),
    },
    Arrows {
        name: "dist-cli",
        ours: &["dist-core", "dist-comm", "dist-kernels", "dist-models"],
        others: Others::Any,
    },
];

/// A dependency, and whether only tests and benches have it.
struct Dependency {
    name: String,
    line: usize,
    is_dev: bool,
}

pub(crate) fn wrong(sources: &[Source]) -> Vec<String> {
    let manifests = sources.iter().filter(|source| source.path.ends_with("Cargo.toml"));
    let mut findings = Vec::new();
    for manifest in manifests {
        let krate = manifest.path.strip_prefix("crates/").and_then(|path| path.strip_suffix("/Cargo.toml"));
        let arrows = ARROWS.iter().find(|arrows| Some(arrows.name) == krate);
        if krate.is_some() && arrows.is_none() {
            findings.push(format!(
                "{}:1: a crate without arrows: add its row to ARROWS in tests/tidy",
                manifest.path
            ));
        }
        for dependency in dependencies(&manifest.text) {
            if let Some(why) = objection(arrows, &dependency) {
                findings.push(format!("{}:{}: `{}`: {why}", manifest.path, dependency.line, dependency.name));
            }
        }
    }
    findings
}

fn objection(arrows: Option<&Arrows>, dependency: &Dependency) -> Option<String> {
    let name = dependency.name.as_str();
    if name == "dist-cli" {
        return Some("nothing depends on dist-cli: move what is shared down a crate".to_owned());
    }
    let arrows = arrows.filter(|_| !dependency.is_dev)?;
    if name.starts_with("dist-") {
        let cure =
            format!("{} may use {:?} of ours: pass a plain value of dist-core", arrows.name, arrows.ours);
        return (!arrows.ours.contains(&name)).then_some(cure);
    }
    match arrows.others {
        Others::Only(only) if !only.contains(&name) => {
            Some(format!("{} is pure and uses only {only:?}: move the code up a crate", arrows.name))
        }
        Others::Not(not) if not.contains(&name) => {
            Some(format!("{} must not know {not:?}: leave it to dist-kernels or dist-cli", arrows.name))
        }
        _ => None,
    }
}

/// Reads the dependency tables of a manifest, those of targets and builds included.
fn dependencies(manifest: &str) -> Vec<Dependency> {
    let mut found: Vec<Dependency> = Vec::new();
    let mut kind = None;
    for (index, line) in manifest.lines().enumerate() {
        let (line, line_no) = (line.trim(), index + 1);
        if line.starts_with('[') {
            let header = line.trim_matches(['[', ']']);
            kind = table_kind(header);
            if let Some((is_dev, Some(name))) = &kind {
                found.push(Dependency { name: name.clone(), line: line_no, is_dev: *is_dev });
            }
            continue;
        }
        let Some((is_dev, table_name)) = &kind else { continue };
        let key = line.split(['=', '.', ' ']).next().unwrap_or_default().trim_matches('"');
        if table_name.is_none() && !key.is_empty() && !key.starts_with('#') && line.contains('=') {
            found.push(Dependency { name: key.to_owned(), line: line_no, is_dev: *is_dev });
        }
        // A renamed crate is judged by its real name.
        let renamed = line.split_once("package").and_then(|(_, rest)| rest.trim_start().strip_prefix('='));
        if let Some(name) = renamed.and_then(|rest| rest.split('"').nth(1)) {
            found.push(Dependency { name: name.to_owned(), line: line_no, is_dev: *is_dev });
        }
    }
    found
}

/// Whether a table holds dependencies: (only for tests, the one crate it is about if it is about one).
fn table_kind(header: &str) -> Option<(bool, Option<String>)> {
    // `workspace.dependencies` only shares versions.
    if header.starts_with("workspace") {
        return None;
    }
    let (before, after) = header.split_once("dependencies")?;
    let name = after.strip_prefix('.').map(|name| name.trim_matches('"').to_owned());
    Some((before.ends_with("dev-"), name))
}

#[cfg(test)]
fn findings(krate: &str, manifest: &str) -> Vec<String> {
    wrong(&[Source::new(&format!("crates/{krate}/Cargo.toml"), manifest)])
}

#[test]
fn wrong_arrows_are_caught() {
    let bad = [
        ("dist-core", "dist-comm.workspace = true"),
        ("dist-core", "tokio = \"1\""),
        ("dist-comm", "dist-kernels = { path = \"../dist-kernels\" }"),
        ("dist-kernels", "dist-comm.workspace = true"),
        ("dist-models", "clap.workspace = true"),
        ("dist-models", "cuda = { package = \"cudarc\", version = \"1\" }"),
        ("dist-models", "dist-cli.workspace = true"),
        ("dist-new", "dist-cli.workspace = true"),
    ];
    for (krate, line) in bad {
        let manifest = format!("[package]\nname = \"{krate}\"\n\n[dependencies]\n{line}\n");
        let findings = findings(krate, &manifest);
        assert!(
            findings.iter().any(|finding| finding.contains("Cargo.toml:5: `")),
            "{krate} {line}: {findings:?}"
        );
    }
}

#[test]
fn every_kind_of_table_is_read() {
    for header in ["build-dependencies", "target.'cfg(unix)'.dependencies"] {
        assert_eq!(findings("dist-core", &format!("[{header}]\ntokio = \"1\"\n")).len(), 1, "{header}");
    }
    assert_eq!(findings("dist-core", "[dependencies.tokio]\nversion = \"1\"\n").len(), 1);
    assert_eq!(findings("dist-core", "[dev-dependencies]\ndist-cli.workspace = true\n").len(), 1);
}

#[test]
fn right_arrows_pass() {
    let manifest = "[dependencies]\n# Why.\nserde.workspace = true\n[dev-dependencies]\nproptest = \"1\"\n";
    assert!(findings("dist-core", manifest).is_empty());
    assert!(
        findings("dist-models", "[dependencies]\ndist-comm.workspace = true\n[features]\nclap = []\n")
            .is_empty()
    );
}

#[test]
fn a_crate_without_arrows_is_caught() {
    assert!(findings("dist-new", "")[0].contains("add its row"));
}
