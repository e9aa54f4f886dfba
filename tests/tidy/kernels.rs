//! The list of kernels, `crates/dist-kernels/KERNELS.md`, held against the code in both directions, and the width of
//! the `Backend` trait.
//!
//! The list is a Markdown table with a row per op. The back-quoted words of its `symbol` column are function names; the
//! back-quoted `.rs` and `.cu` names of a row, relative to the crate or its `src/`, are where they must be found. A kernel
//! of a `.cu` file stands in one of the file's rows by its own name or by what it begins with: `embed` for
//! `embed_odd_bf16`. Kernels that a macro makes have their names in `cuda/units.rs`, which is looked through as well.

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
        let of_file: Vec<&Row> = rows.iter().filter(|row| row.files.iter().any(names_it)).collect();
        if of_file.is_empty() {
            findings.push(format!("{}:1: in no row of {list_path}: add its kernels there", source.path));
            continue;
        }
        findings
            .extend(kernels_of_gpus(source).filter_map(|found| missing(found, &of_file, source, &list_path)));
    }
    let is_cu = |file: &String| file.rsplit_once('.').is_some_and(|(_, end)| end == "cu");
    let with_cu = |row: &&Row| row.files.iter().any(is_cu);
    let of_gpus: Vec<&Row> = rows.iter().filter(with_cu).collect();
    for source in sources.iter().filter(|source| source.path == format!("{CRATE}src/cuda/units.rs")) {
        findings.extend(variants(source).filter_map(|found| missing(found, &of_gpus, source, &list_path)));
    }
    findings
}

/// The finding about a kernel that is in none of `rows`.
fn missing((kernel, at): (&str, usize), rows: &[&Row], source: &Source, list_path: &str) -> Option<String> {
    let is_its = |symbol: &String| {
        let rest = kernel.strip_prefix(symbol.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
    };
    let is_listed = rows.iter().any(|row| row.symbols.iter().any(is_its));
    (!is_listed).then(|| format!("{}: `{kernel}` is a kernel: add it to {list_path}", source.place(at)))
}

/// The kernels of a `.cu` file, with their places, without those whose names a macro is given.
fn kernels_of_gpus(source: &Source) -> impl Iterator<Item = (&str, usize)> {
    let code = source.code.as_str();
    let starts = words(code, "KERNEL").chain(words(code, "__global__"));
    let kernels = starts.filter(|&at| !logical_line(code, at).starts_with("#define"));
    kernels.filter_map(|at| {
        // The name is what stands before the first parenthesis that is not the bounds'.
        let bounds =
            code[at..].find("__launch_bounds__").filter(|&bounds| !code[at..at + bounds].contains('('));
        let from = bounds.map_or(at, |bounds| at + bounds);
        let open = from + code[from..].find('(')?;
        let open = if bounds.is_some() { parenthesis_end(code, open)? } else { at };
        let end = open + code[open..].find('(')?;
        let name = code[open..end].trim_end();
        let len = name.bytes().rev().take_while(|&byte| is_ident(byte)).count();
        Some((&name[name.len() - len..], at))
    })
}

/// The line of `at`, from where a line begins that is not the next of one that ends in a backslash.
fn logical_line(code: &str, at: usize) -> &str {
    let mut start = code[..at].rfind('\n').map_or(0, |newline| newline + 1);
    while code[..start].trim_end_matches('\n').ends_with('\\') {
        start = code[..start - 1].rfind('\n').map_or(0, |newline| newline + 1);
    }
    &code[start..]
}

/// The offset after the parenthesis that closes the one at `open`.
fn parenthesis_end(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'(' => depth += 1,
            b')' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// The names that `units.rs` gives to kernels which macros make: `variant("MACRO", "NAME", …)`, with their places.
fn variants(source: &Source) -> impl Iterator<Item = (&str, usize)> {
    let tests = source.test_ranges();
    let calls =
        words(&source.code, "variant").filter(move |at| !tests.iter().any(|range| range.contains(at)));
    calls.filter_map(|at| {
        let call = source.text[at..].strip_prefix("variant(")?;
        Some((call.split('"').nth(3).filter(|_| call.trim_start().starts_with('"'))?, at))
    })
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
        Source::new(&path("kernels/embed.cu"), "__global__ void embed_f32_bf16() {}"),
    ])
}

/// What is found where `embed` is listed, and a `.cu` file and the units hold this.
#[cfg(test)]
fn of_gpus(kernels: &str, units: &str) -> Vec<String> {
    let list = LIST.replace("embed_f32", "embed").replace("cpu/embed.rs", "cuda/units.rs");
    let path = |end: &str| format!("{CRATE}{end}");
    let units = format!("fn embed() {{}}\n{units}");
    unlisted(&[
        Source::new(&path("KERNELS.md"), &list),
        Source::new(&path("src/cuda/units.rs"), &units),
        Source::new(&path("kernels/embed.cu"), kernels),
    ])
}

#[test]
fn a_kernel_of_a_gpu_that_is_not_listed_is_caught() {
    let listed = "#define KERNEL extern \"C\" __global__ void\n#define EMBED(name, n) \\\n  KERNEL \\\n  name(Args a) {}\n\
                  KERNEL embed(Args a) {}\nKERNEL __launch_bounds__(f(1) ? 2 : 3, 1)\n  embed_odd_16(Args a) {}\n";
    assert_eq!(of_gpus(listed, "variant(\"EMBED\", \"embed_d64\", &[64])"), Vec::<String>::new());
    for (name, line) in [("copy_pieces", 8), ("embedded", 8)] {
        for bounds in ["", "__launch_bounds__(512, N(2)) "] {
            let found = of_gpus(&format!("{listed}KERNEL {bounds}{name}(const Args a) {{}}\n"), "");
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(&format!("embed.cu:{line}: `{name}` is a kernel")), "{found:?}");
        }
    }
    let found = of_gpus(listed, "const A: u8 = 1;\nvariant(\n  \"EMBED\",\n  \"norm_d64\", &[64])");
    assert!(found.len() == 1 && found[0].contains("units.rs:3: `norm_d64` is a kernel"), "{found:?}");
}

#[test]
fn a_true_list_passes() {
    let rust = "// kernel\n#[inline]\npub(crate) fn embed_f32() {}\n// kernel of truth\nfn other() {}\n";
    assert_eq!(findings(LIST, rust), Vec::<String>::new());
    assert!(findings(&LIST.replace("embed_f32", "embed_f32_bf16"), "fn a() {}").is_empty());
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
