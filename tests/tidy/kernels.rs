//! The list of kernels, `crates/dist-kernels/KERNELS.md`, held against the code in both directions, and the width of
//! the `Backend` trait.
//!
//! The list is a Markdown table with a row per op. The back-quoted words of its `symbol` column are function names; the
//! back-quoted `.rs` and `.cu` names of a row, relative to the crate or its `src/`, are where they must be found.

use super::source::{Source, body_start, brace_end, is_ident, words};

const CRATE: &str = "crates/dist-kernels/";
const BACKEND_METHODS: usize = 21;

pub(crate) fn unlisted(sources: &[Source]) -> Vec<String> {
    let list_path = format!("{CRATE}KERNELS.md");
    let Some(list) = sources.iter().find(|source| source.path == list_path) else {
        return vec![format!(
            "{list_path}:1: missing: list every kernel: op, Rust file, symbol, .cu file, layout, bound"
        )];
    };
    let mut findings = Vec::new();
    let rows = rows(&list.text);
    if rows.is_empty() {
        findings.push(format!("{list_path}:1: no table with a `symbol` column: add one, with a row per op"));
    }
    for row in &rows {
        findings.extend(row.findings(&list_path, sources));
    }
    let is_listed = |symbol: &str| rows.iter().any(|row| row.symbols.iter().any(|listed| listed == symbol));
    for source in sources.iter().filter(|source| source.path.starts_with(&format!("{CRATE}src/cpu"))) {
        for (symbol, at) in marked_kernels(source) {
            if !is_listed(symbol) {
                findings.push(format!("{}: `{symbol}` is a kernel: add it to {list_path}", source.place(at)));
            }
        }
    }
    for source in sources.iter().filter(|source| source.path.starts_with(CRATE) && source.has_extension("cu"))
    {
        let names_it = |file: &String| source.path.ends_with(&format!("/{file}"));
        if !rows.iter().any(|row| row.files.iter().any(names_it)) {
            findings.push(format!("{}:1: in no row of {list_path}: add its kernels there", source.path));
        }
    }
    findings
}

struct Row {
    line: usize,
    symbols: Vec<String>,
    files: Vec<String>,
}

impl Row {
    fn findings(&self, list_path: &str, sources: &[Source]) -> Vec<String> {
        let place = format!("{list_path}:{}", self.line);
        let mut findings = Vec::new();
        let mut named = Vec::new();
        for file in &self.files {
            let candidates =
                [format!("{CRATE}src/{file}"), format!("{CRATE}{file}"), format!("{CRATE}kernels/{file}")];
            match sources.iter().find(|source| candidates.contains(&source.path)) {
                Some(source) => named.push(source),
                None => findings.push(format!("{place}: no file `{file}` under {CRATE}: correct its name")),
            }
        }
        for symbol in &self.symbols {
            if !named.iter().any(|source| words(&source.code, symbol).next().is_some()) {
                let files = &self.files;
                findings
                    .push(format!("{place}: `{symbol}` is not in {files:?}: correct the row or remove it"));
            }
        }
        findings
    }
}

/// The rows of every table that has a column of symbols.
fn rows(markdown: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut symbol_column = None;
    let mut is_in_table = false;
    for (index, line) in markdown.lines().enumerate() {
        let Some(inner) = line.trim().strip_prefix('|') else {
            is_in_table = false;
            continue;
        };
        let cells: Vec<&str> = inner.trim_end_matches('|').split('|').collect();
        let is_header = !is_in_table;
        is_in_table = true;
        if is_header {
            symbol_column = cells.iter().position(|cell| cell.to_lowercase().contains("symbol"));
        } else if let Some(column) = symbol_column
            && !inner.trim_start().starts_with(['-', ':'])
        {
            let quoted =
                |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
            let files = quoted(inner)
                .into_iter()
                .filter(|name| matches!(name.rsplit_once('.'), Some((_, "rs" | "cu"))));
            let symbols = cells.get(column).map(|cell| quoted(cell)).unwrap_or_default();
            rows.push(Row { line: index + 1, symbols, files: files.collect() });
        }
    }
    rows
}

/// The functions under a `// kernel` line, with their places.
fn marked_kernels(source: &Source) -> Vec<(&str, usize)> {
    let marks = source.comments.match_indices("// kernel").filter(|&(at, mark)| {
        let is_whole_line =
            source.comments[at + mark.len()..].lines().next().is_none_or(|rest| rest.trim().is_empty());
        is_whole_line && !source.comments[..at].ends_with('/')
    });
    let functions = marks.filter_map(|(at, _)| {
        let function = at + words(&source.code[at..], "fn").next()?;
        let name = source.code[function + 2..].trim_start();
        let len = name.bytes().take_while(|&byte| is_ident(byte)).count();
        Some((&name[..len], function))
    });
    functions.collect()
}

pub(crate) fn backend_is_narrow(sources: &[Source]) -> Vec<String> {
    let path = format!("{CRATE}src/backend.rs");
    let source = sources.iter().find(|source| source.path == path);
    let Some((source, at)) = source.and_then(|source| Some((source, source.code.find("trait Backend")?)))
    else {
        return vec![format!("{path}:1: no `trait Backend`: keep the one seam to the hardware there")];
    };
    let body = body_start(&source.code, at).unwrap_or(at);
    let end = brace_end(&source.code, body).unwrap_or(source.code.len());
    let methods = words(&source.code[body..end], "fn").count();
    if methods <= BACKEND_METHODS {
        return Vec::new();
    }
    let cure = "make the variant a value in an args struct";
    vec![format!("{}: {methods} methods, at most {BACKEND_METHODS}: {cure}", source.place(at))]
}

#[cfg(test)]
const LIST: &str = "| op | Rust file | symbol | .cu file |\n|---|---|---|---|\n\
                    | embed | `cpu/embed.rs` | `embed_f32` | `embed.cu` |\n";

#[cfg(test)]
fn findings(list: &str, rust: &str) -> Vec<String> {
    let path = |end: &str| format!("{CRATE}{end}");
    unlisted(&[
        Source::new(&path("KERNELS.md"), list),
        Source::new(&path("src/cpu/embed.rs"), rust),
        Source::new(&path("kernels/embed.cu"), "__global__ void embed_bf16() {}"),
    ])
}

#[test]
fn a_true_list_passes() {
    let rust = "// kernel\n#[inline]\npub(crate) fn embed_f32() {}\n// kernel of truth\nfn other() {}\n";
    assert_eq!(findings(LIST, rust), Vec::<String>::new());
    assert!(findings(&LIST.replace("embed_f32", "embed_bf16"), "fn a() {}").is_empty());
}

#[test]
fn a_kernel_that_is_not_listed_is_caught() {
    let rust = "fn embed_f32() {}\n// kernel\npub fn embed_f16() {}\n";
    let findings = findings(LIST, rust);
    assert_eq!(findings.len(), 1);
    assert!(findings[0].contains("embed.rs:3: `embed_f16` is a kernel"), "{findings:?}");
}

#[test]
fn a_listed_symbol_that_is_gone_is_caught() {
    let findings = findings(LIST, "// embed_f32 was here\n");
    assert!(findings[0].contains("KERNELS.md:3: `embed_f32` is not in"), "{findings:?}");
}

#[test]
fn a_listed_file_that_is_gone_is_caught() {
    let list = LIST.replace("| `embed.cu` |", "| `gone.cu` |");
    let findings = findings(&list, "fn embed_f32() {}\n");
    assert!(findings.iter().any(|finding| finding.contains("no file `gone.cu`")), "{findings:?}");
    assert!(findings.iter().any(|finding| finding.contains("embed.cu:1: in no row")), "{findings:?}");
}

#[test]
fn a_missing_or_empty_list_is_caught() {
    assert!(unlisted(&[])[0].contains("missing"));
    assert!(findings("# Kernels\n", "")[0].contains("no table"));
}

#[test]
fn a_wide_backend_is_caught() {
    let backend = |n: usize| {
        let text = format!("pub trait Backend: Sized {{ {} }}\nfn f() {{}}\n", "fn a(b: fn(u8));".repeat(n));
        backend_is_narrow(&[Source::new(&format!("{CRATE}src/backend.rs"), &text)])
    };
    assert!(backend(BACKEND_METHODS / 2).is_empty());
    assert_eq!(backend(BACKEND_METHODS + 1).len(), 1);
    assert_eq!(backend_is_narrow(&[]).len(), 1);
}
