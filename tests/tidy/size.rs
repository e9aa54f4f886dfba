//! How long a file and a function may be. The exceptions name what exceeds today and may only shrink.

use super::source::{Source, body_start, brace_end, is_ident, words};

const FILE_LINES: usize = 400;
const FN_LINES: usize = 70;

/// What may exceed a limit, and by how much.
pub(crate) struct Exception {
    pub(crate) path: &'static str,
    /// The function; empty for the file itself.
    pub(crate) function: &'static str,
    pub(crate) lines_max: usize,
}

/// One thing with a length: a file, or a function in a file.
struct Length<'a> {
    path: &'a str,
    function: &'a str,
    place: String,
    lines: usize,
}

pub(crate) fn file_lengths(sources: &[Source], exceptions: &[Exception]) -> Vec<String> {
    let lengths = sources.iter().filter(|source| source.is_rust() || source.has_extension("cu"));
    let lengths = lengths.map(|source| Length {
        path: &source.path,
        function: "",
        place: format!("{}:1", source.path),
        lines: source.text.lines().count(),
    });
    judge(&lengths.collect::<Vec<_>>(), exceptions, FILE_LINES, "split the file along its nouns")
}

pub(crate) fn function_lengths(sources: &[Source], exceptions: &[Exception]) -> Vec<String> {
    let rust = sources.iter().filter(|source| source.is_rust());
    let lengths: Vec<_> = rust.flat_map(functions).collect();
    judge(&lengths, exceptions, FN_LINES, "give its parts names and move them out")
}

fn judge(lengths: &[Length<'_>], exceptions: &[Exception], limit: usize, cure: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for length in lengths {
        let exception = exceptions.iter().find(|entry| entry.matches(length));
        let limit = exception.map_or(limit, |entry| entry.lines_max);
        if length.lines > limit {
            let Length { function, place, lines, .. } = length;
            findings.push(format!("{place}: {function} {lines} lines, at most {limit}: {cure}"));
        }
    }
    for entry in exceptions {
        let exceeds = lengths.iter().any(|length| entry.matches(length) && length.lines > limit);
        if !exceeds {
            let Exception { path, function, .. } = entry;
            findings.push(format!("{path} {function}: within {limit} lines now: remove it from the list"));
        }
    }
    findings
}

impl Exception {
    fn matches(&self, length: &Length<'_>) -> bool {
        self.path == length.path && self.function == length.function
    }
}

/// Every function with a body, from the line of its `fn` to the line of its closing brace.
fn functions(source: &Source) -> Vec<Length<'_>> {
    let code = &source.code;
    let mut found = Vec::new();
    for at in words(code, "fn") {
        let after = code[at + 2..].trim_start();
        let name_len = after.bytes().take_while(|&byte| is_ident(byte) || byte == b'$').count();
        // `fn(u8)` is a type.
        if name_len == 0 {
            continue;
        }
        let name_at = code.len() - after.len();
        let body = body_start(code, at).filter(|&body| code.as_bytes()[body] == b'{');
        let Some(end) = body.and_then(|body| brace_end(code, body)) else { continue };
        found.push(Length {
            path: &source.path,
            function: &code[name_at..name_at + name_len],
            place: source.place(at),
            lines: source.line(end) - source.line(at) + 1,
        });
    }
    found
}

#[cfg(test)]
fn long_function(lines: usize) -> Source {
    let body = "    f(\"}\"); // }\n".repeat(lines - 2);
    Source::new(
        "a.rs",
        &format!("type F = fn(u8);\nfn long(a: [u8; 4]) -> [u8; 4] {{\n{body}}}\nfn g() {{}}\n"),
    )
}

#[test]
fn a_long_function_is_caught_at_its_line() {
    assert_eq!(function_lengths(&[long_function(FN_LINES)], &[]), Vec::<String>::new());
    let findings = function_lengths(&[long_function(FN_LINES + 1)], &[]);
    assert_eq!(findings.len(), 1);
    assert!(findings[0].starts_with("a.rs:2: long 71 lines"), "{findings:?}");
}

#[test]
fn a_long_file_is_caught() {
    let file = |lines: usize| Source::new("a.cu", &"//\n".repeat(lines));
    assert!(file_lengths(&[file(FILE_LINES)], &[]).is_empty());
    assert_eq!(file_lengths(&[file(FILE_LINES + 1)], &[]).len(), 1);
}

#[test]
fn the_exceptions_only_shrink() {
    let list = [Exception { path: "a.rs", function: "long", lines_max: 80 }];
    assert!(function_lengths(&[long_function(80)], &list).is_empty());
    assert!(function_lengths(&[long_function(81)], &list)[0].contains("at most 80"));
    assert!(function_lengths(&[long_function(70)], &list)[0].contains("remove it from the list"));
    assert!(function_lengths(&[], &list)[0].contains("remove it from the list"));
}
