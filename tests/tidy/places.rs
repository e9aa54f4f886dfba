//! Where a construct may stand, and what to write elsewhere. That every `unsafe` carries a SAFETY comment is clippy's
//! to say (`undocumented_unsafe_blocks`), so it is not said twice here.

use super::source::{Source, words};

/// A construct, the places where it may stand, and what replaces it elsewhere.
struct Rule {
    /// The first word of the construct.
    word: &'static str,
    /// What follows the word at once: `!` for macros, `::` for paths, or nothing.
    then: &'static str,
    /// Folders, which end with `/`, and files.
    allowed: &'static [&'static str],
    /// Whether code that only tests, benches, examples and build scripts compile is free.
    tests_free: bool,
    cure: &'static str,
}

const PRINT_CURE: &str = "return the value; only dist-cli prints, other crates have `tracing`";
const CLI: &[&str] = &["crates/dist-cli/src/"];

const RULES: [Rule; 8] = [
    Rule {
        word: "unsafe",
        then: "",
        allowed: &[
            "crates/dist-kernels/src/cpu/",
            "crates/dist-kernels/src/cuda/driver/",
            "crates/dist-kernels/src/cuda/libraries.rs",
            "crates/dist-kernels/src/cuda/nvrtc.rs",
            "crates/dist-comm/src/nccl.rs",
            "crates/dist-comm/src/shm.rs",
            "crates/dist-models/src/checkpoint/map.rs",
        ],
        tests_free: false,
        cure: "move it behind a safe function in dist-kernels' cpu/ or cuda/driver/, dist-comm's nccl.rs or shm.rs, or \
               dist-models' checkpoint/map.rs",
    },
    Rule {
        word: "env",
        then: "::var",
        allowed: CLI,
        tests_free: true,
        cure: "take the value as an argument; only dist-cli reads the environment",
    },
    Rule { word: "print", then: "!", allowed: CLI, tests_free: true, cure: PRINT_CURE },
    Rule { word: "println", then: "!", allowed: CLI, tests_free: true, cure: PRINT_CURE },
    Rule { word: "eprint", then: "!", allowed: CLI, tests_free: true, cure: PRINT_CURE },
    Rule { word: "eprintln", then: "!", allowed: CLI, tests_free: true, cure: PRINT_CURE },
    Rule {
        word: "static",
        then: " mut ",
        allowed: &[],
        tests_free: false,
        cure: "pass the state as a value, or use an atomic or a `OnceLock`",
    },
    Rule {
        word: "thread_local",
        then: "!",
        allowed: &["crates/dist-kernels/src/cpu/"],
        tests_free: false,
        cure: "own the state in the rank that uses it; only the CPU kernels' threads keep some of their own",
    },
];

pub(crate) fn misplaced(sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources.iter().filter(|source| source.is_rust()) {
        for rule in &RULES {
            findings.extend(rule.findings(source));
        }
    }
    findings
}

impl Rule {
    fn findings(&self, source: &Source) -> Vec<String> {
        let allowed = |place: &&str| match place.strip_suffix('/') {
            Some(_) => source.path.starts_with(*place),
            None => source.path == *place,
        };
        if self.allowed.iter().any(allowed) || self.tests_free && source.is_test_support() {
            return Vec::new();
        }
        let tests = if self.tests_free { source.test_ranges() } else { Vec::new() };
        let stands = words(&source.code, self.word).filter(|&at| {
            let after = &source.code[at + self.word.len()..];
            // `'static` is a lifetime.
            let is_lifetime = source.code[..at].ends_with('\'');
            !is_lifetime && after.starts_with(self.then) && !tests.iter().any(|range| range.contains(&at))
        });
        let Self { word, then, cure, .. } = self;
        stands
            .map(|at| format!("{}: `{word}{}` may not stand here: {cure}", source.place(at), then.trim_end()))
            .collect()
    }
}

/// Words that promise work instead of doing it. They are put together here so that this file may name them.
pub(crate) fn promises(sources: &[Source]) -> Vec<String> {
    let banned = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let mut findings = Vec::new();
    for source in sources {
        for word in banned {
            let cure = "do it now or open an issue, and say here what is";
            findings
                .extend(words(&source.text, word).map(|at| format!("{}: {word}: {cure}", source.place(at))));
        }
    }
    findings
}

/// Paths of one machine, which no other has.
pub(crate) fn machine_paths(sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        for path in [concat!("/wo", "rk/"), concat!("/ro", "ot/")] {
            for (at, _) in source.text.match_indices(path) {
                // In `crates/root/` the same letters are a folder of ours.
                let before = source.text[..at].bytes().next_back();
                if !before.is_some_and(|byte| byte.is_ascii_alphanumeric() || b"_-.})".contains(&byte)) {
                    let cure = "write it relative to the repository, or take it as an argument";
                    findings.push(format!("{}: {path} is on one machine only: {cure}", source.place(at)));
                }
            }
        }
    }
    findings
}

/// Paths of the building machine inside a binary; test binaries also run elsewhere. dist-cli embeds the demo model.
pub(crate) fn baked_paths(sources: &[Source]) -> Vec<String> {
    let baked = concat!("env!(\"CARGO_MANIFEST", "_DIR\")");
    let judged = sources.iter().filter(|source| source.is_rust() && !source.path.starts_with(CLI[0]));
    let found = judged.flat_map(|source| {
        let cure = "find files at run time: `DIST_REPO`, or upwards from the current folder";
        source.text.match_indices(baked).map(move |(at, _)| format!("{}: {baked}: {cure}", source.place(at)))
    });
    found.collect()
}

#[cfg(test)]
fn findings(path: &str, text: &str) -> Vec<String> {
    misplaced(&[Source::new(path, text)])
}

#[test]
fn unsafe_is_caught_outside_its_places() {
    let text = "//! a\nfn f() { unsafe { g() } }\n";
    for path in ["crates/dist-cli/src/launch/run.rs", "crates/dist-kernels/src/cuda/cache.rs", "tests/a.rs"] {
        assert!(findings(path, text)[0].starts_with(&format!("{path}:2: `unsafe`")));
    }
    assert!(findings("crates/dist-kernels/src/cpu/simd.rs", text).is_empty());
    assert!(findings("crates/dist-comm/src/shm.rs", text).is_empty());
    assert!(findings("a.rs", "#![forbid(unsafe_code)] // unsafe\nconst A: &str = \"unsafe\";\n").is_empty());
}

#[test]
fn the_environment_is_read_in_the_cli_and_in_tests() {
    let text = "fn f() { std::env::var_os(\"A\"); }\n";
    let library = "crates/dist-models/src/a.rs";
    assert_eq!(findings(library, text).len(), 1);
    assert!(findings("crates/dist-cli/src/a.rs", text).is_empty());
    assert!(findings("crates/dist-comm/tests/a.rs", text).is_empty());
    assert!(findings("crates/dist-cli/build.rs", text).is_empty());
    assert!(findings(library, &format!("#[cfg(test)]\nmod tests {{\n{text}}}\n")).is_empty());
    assert_eq!(findings(library, &format!("#[cfg(test)]\nmod tests {{}}\n{text}")).len(), 1);
}

#[test]
fn printing_is_caught_in_libraries() {
    for print in ["print!", "println!", "eprint!", "eprintln!"] {
        let text = format!("fn f() {{ {print}(\"a\"); }}\n");
        assert_eq!(findings("crates/dist-core/src/a.rs", &text).len(), 1, "{print}");
        assert!(findings("crates/dist-cli/src/a.rs", &text).is_empty());
        assert!(findings("crates/dist-core/examples/a.rs", &text).is_empty());
    }
}

#[test]
fn hidden_state_is_caught() {
    assert_eq!(findings("tests/a.rs", "static mut A: u8 = 0;\n").len(), 1);
    assert!(findings("a.rs", "fn f(a: &'static mut u8) {}\nstatic A: u8 = 0;\n").is_empty());
    assert_eq!(findings("crates/dist-comm/src/a.rs", "thread_local! {}\n").len(), 1);
    assert!(findings("crates/dist-kernels/src/cpu/pool.rs", "thread_local! {}\n").is_empty());
}

#[test]
fn promises_are_caught_in_comments_too() {
    let text = format!("// {}: later\n", concat!("TO", "DO"));
    assert_eq!(promises(&[Source::new("a.rs", &text)]).len(), 1);
    assert!(promises(&[Source::new("a.sh", "mktemp a.XXXXXX # todo!\n")]).is_empty());
}

#[test]
fn machine_paths_are_caught() {
    let path = concat!("/wo", "rk/main");
    assert_eq!(machine_paths(&[Source::new("a.md", &format!("see {path}\n"))]).len(), 1);
    assert!(machine_paths(&[Source::new("a.md", &format!("net{path} a.b{path}\n"))]).is_empty());
}

#[test]
fn baked_paths_are_caught() {
    let text = format!("const A: &str = {};\n", concat!("env!(\"CARGO_MANIFEST", "_DIR\")"));
    assert_eq!(baked_paths(&[Source::new("tests/a.rs", &text)]).len(), 1);
    assert!(baked_paths(&[Source::new("crates/dist-cli/src/a.rs", &text)]).is_empty());
}
