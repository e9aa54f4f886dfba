//! The functions of NVIDIA's libraries that the code calls through cudarc, held against the lists of
//! `cuda/libraries/symbols.rs`: cudarc panics on a function that its library lacks, so all are looked up before, and a
//! call that is not listed would be one that can panic. What each one looks up is read in cudarc's own source.

use std::collections::BTreeMap;

use super::source::{Source, body_start, brace_end, is_ident, words};

const SYMBOLS: &str = "crates/dist-kernels/src/cuda/libraries/symbols.rs";
/// Layers of cudarc whose functions look up one symbol each.
const LAYERS: [&str; 4] = ["driver::result", "driver::sys", "cublaslt::result", "cublaslt::sys"];
/// What finds the libraries and looks up no symbol.
const FINDERS: [&str; 2] = ["is_culib_present", "culib"];
const METHODS: [&str; 2] = ["error_name", "error_string"];

/// Calls without a symbol, symbols without a call, and uses of cudarc that cannot be followed.
pub(crate) fn unlisted(sources: &[Source]) -> Vec<String> {
    let Some(list) = sources.iter().find(|source| source.path == SYMBOLS) else {
        return vec![format!("{SYMBOLS}:1: missing: list every function that is called through cudarc")];
    };
    let listed = listed(list);
    let mut findings = Vec::new();
    let mut called = BTreeMap::new();
    for source in sources.iter().filter(|source| source.is_rust() && source.path.starts_with("crates/")) {
        for (path, at) in calls(source, &mut findings) {
            called.entry(path).or_insert_with(|| source.place(at));
        }
    }
    for (path, place) in &called {
        if !listed.contains_key(path) {
            findings.push(format!("{place}: cudarc's {path} is not in {SYMBOLS}: add it with its symbol"));
        }
    }
    for (path, (_, line)) in &listed {
        if !called.contains_key(path) {
            findings.push(format!("{SYMBOLS}:{line}: nobody calls {path}: remove it"));
        }
    }
    findings
}

/// The pairs of the lists: a call, its symbol and its line.
fn listed(list: &Source) -> BTreeMap<String, (String, usize)> {
    let quoted: Vec<(&str, usize)> = list
        .text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .flat_map(|(idx, line)| line.split('"').skip(1).step_by(2).map(move |text| (text, idx + 1)))
        .collect();
    quoted.chunks_exact(2).map(|pair| (pair[0].0.to_owned(), (pair[1].0.to_owned(), pair[0].1))).collect()
}

/// The functions of cudarc that a file calls, by their paths in cudarc, and where.
fn calls(source: &Source, findings: &mut Vec<String>) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    let mut modules = BTreeMap::new();
    for at in words(&source.code, "cudarc") {
        let Some(path) = source.code[at..].strip_prefix("cudarc::") else { continue };
        if source.code[..at].ends_with("use ") {
            let statement = &path[..path.find(';').unwrap_or(path.len())];
            modules.extend(imports(statement));
        } else if let Some(path) = path_of_call(path) {
            found.push((path, at));
        }
    }
    if modules.is_empty() && found.is_empty() {
        return found;
    }
    for (name, path) in &modules {
        let is_followed = LAYERS.iter().any(|layer| path == layer || path.starts_with(&format!("{layer}::")));
        if !is_followed && !path.ends_with("Error") {
            findings.push(format!("{}:1: cudarc::{path}: use only {LAYERS:?}", source.path));
        }
        for at in words(&source.code, name).filter(|&at| !source.code[..at].ends_with(':')) {
            let rest = &source.code[at + name.len()..];
            if let Some(path) = path_of_call(&format!("{path}{rest}")).filter(|_| rest.starts_with("::")) {
                found.push((path, at));
            }
        }
    }
    for method in METHODS {
        let called = words(&source.code, method).filter(|&at| source.code[..at].ends_with('.'));
        found.extend(called.map(|at| (format!("driver::DriverError::{method}"), at)));
    }
    found
}

/// What a `use` of cudarc brings in: each name, and its path in cudarc.
fn imports(statement: &str) -> Vec<(String, String)> {
    let (prefix, items) = match statement.split_once('{') {
        Some((prefix, items)) => (prefix.trim_end_matches("::"), items.trim_end_matches('}')),
        None => statement.rsplit_once("::").unwrap_or(("", statement)),
    };
    let item = |item: &str| {
        let (path, name) = item.split_once(" as ").unwrap_or((item, item));
        let path = if path == "self" { prefix.to_owned() } else { format!("{prefix}::{path}") };
        let name = if name == "self" { path.rsplit("::").next().unwrap_or_default() } else { name };
        (name.to_owned(), path)
    };
    items.split(',').map(str::trim).filter(|text| !text.is_empty()).map(item).collect()
}

/// The path that `code` begins with, if it is a function's: neither a type's nor a constant's.
fn path_of_call(code: &str) -> Option<String> {
    let len = code.bytes().take_while(|&byte| is_ident(byte) || byte == b':').count();
    let path = code[..len].trim_end_matches(':');
    let is_type = |part: &str| part.starts_with(|c: char| c.is_ascii_uppercase()) || part.ends_with("_t");
    let last = path.rsplit("::").next()?;
    (!path.split("::").any(is_type) && !FINDERS.contains(&last)).then(|| path.to_owned())
}

/// The symbols that a function of cudarc looks up; `module` is its path in the file.
#[cfg(test)]
fn looked_up<'a>(source: &'a Source, module: &[&str], function: &str) -> Option<Vec<&'a str>> {
    let mut from = 0;
    for name in module {
        from += source.code[from..].find(&format!("\npub mod {name} {{"))?;
    }
    let starts = [format!("fn {function}("), format!("fn {function}<")];
    let at = from + starts.iter().filter_map(|start| source.code[from..].find(start.as_str())).min()?;
    let body = &source.text[at..brace_end(&source.code, body_start(&source.code, at)?)?];
    let mut symbols = Vec::new();
    for (at, call) in body.match_indices("sys::cu") {
        let rest = &body[at + call.len() - 2..];
        let name = &rest[..rest.bytes().take_while(|&byte| is_ident(byte)).count()];
        // What is for other versions of CUDA than 13.0 is not compiled.
        let attribute = body[..at].rfind("#[cfg(").map_or("", |from| &body[from..at]);
        let is_for_others = attribute.starts_with("#[cfg(not(any(") && attribute.contains("cuda-13000");
        if rest[name.len()..].starts_with('(') && (!is_for_others || attribute.contains(';')) {
            symbols.push(name);
        }
    }
    Some(symbols)
}

/// Where cargo has put cudarc's source; `None` without cargo, as on a machine to which tests were carried.
#[cfg(test)]
fn source_of_cudarc(version: &str) -> Option<std::path::PathBuf> {
    use std::path::PathBuf;
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
    let registries = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)?.join("registry/src");
    let registries = std::fs::read_dir(registries).ok()?;
    let mut packages = registries.flatten().filter_map(|dir| std::fs::read_dir(dir.path()).ok()).flatten();
    let name = format!("cudarc-{version}");
    let is_cudarc = |path: &PathBuf| path.file_name().is_some_and(|found| *found == *name);
    let found = packages.find_map(|package| Some(package.ok()?.path()).filter(is_cudarc));
    Some(found.expect("cudarc's version in Cargo.toml").join("src"))
}

#[test]
fn listed_symbols_are_those_that_cudarc_looks_up() {
    let sources = super::repo::read();
    let list = sources.iter().find(|source| source.path == SYMBOLS).expect("the lists");
    let manifest = &sources.iter().find(|source| source.path == "Cargo.toml").expect("the workspace's").text;
    let version = manifest.split_once("cudarc = { version = \"=").expect("an exact version").1;
    let Some(src) = source_of_cudarc(version.split('"').next().unwrap_or_default()) else { return };
    let read =
        |file: &str| Source::new(file, &std::fs::read_to_string(src.join(file)).expect("cudarc's source"));
    let texts = [("driver", read("driver/result.rs")), ("cublaslt", read("cublaslt/result.rs"))];
    for (path, (symbol, line)) in listed(list) {
        let parts: Vec<&str> = path.split("::").collect();
        let function = parts[parts.len() - 1];
        if parts[1] == "sys" {
            assert_eq!(function, symbol, "{SYMBOLS}:{line}");
            continue;
        }
        let (_, text) = texts.iter().find(|(library, _)| *library == parts[0]).expect("a library");
        let module = if parts[1] == "result" { &parts[2..parts.len() - 1] } else { &[] };
        assert_eq!(looked_up(text, module, function), Some(vec![&symbol[..]]), "{SYMBOLS}:{line}: {path}");
    }
}

#[cfg(test)]
fn findings(list: &str, code: &str) -> Vec<String> {
    unlisted(&[
        Source::new(SYMBOLS, list),
        Source::new("crates/dist-kernels/src/cuda/driver/stream.rs", code),
    ])
}

#[test]
fn what_is_called_is_listed_and_the_other_way_round() {
    let code = "use cudarc::driver::result::{self, stream};\nuse cudarc::driver::sys::{self, CUresult};\n\
                fn f() { result::init(); stream::create(stream::Kind::A); sys::cuFuncLoad(f); error.error_name(); \
                std::result::Result::Ok(sys::CUstream); unsafe { cudarc::driver::sys::culib() } }\n";
    let list = "/// \"A\" comment.\n(\"driver::result::init\", \"cuInit\"),\n(\n  \"driver::result::stream::create\",\n  \
                \"cuStreamCreate\",\n),\n(\"driver::sys::cuFuncLoad\", \"cuFuncLoad\"),\n\
                (\"driver::DriverError::error_name\", \"cuGetErrorName\"),\n";
    assert_eq!(findings(list, code), Vec::<String>::new());
    for (line, path) in
        [(2, "result::init"), (4, "stream::create"), (7, "sys::cuFuncLoad"), (8, "error_name")]
    {
        let without = code.replace(path, "other").replace("(stream::Kind", "(Kind");
        let found = findings(list, &without);
        assert!(
            found.len() == 1 && found[0].contains(&format!("symbols.rs:{line}: nobody calls")),
            "{found:?}"
        );
    }
    let found = findings(&list.replace("cuFuncLoad\"", "cuFuncUnload\""), code);
    assert!(found[0].contains("stream.rs:3: cudarc's driver::sys::cuFuncLoad is not in"), "{found:?}");
}

#[test]
fn a_way_around_the_list_is_caught() {
    let safe = findings("", "use cudarc::driver::CudaContext;\n");
    assert!(safe.len() == 1 && safe[0].contains("use only"), "{safe:?}");
    let whole = findings("", "fn f() { cudarc::driver::result::init() }\n");
    assert!(whole.len() == 1 && whole[0].contains("driver::result::init is not in"), "{whole:?}");
    assert!(unlisted(&[])[0].contains("missing"));
}
