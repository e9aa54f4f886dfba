//! A source file cut into what the compiler reads and what people read, so that a rule about code cannot be
//! confused by a comment and a brace inside a string counts for nothing. It knows Rust; CUDA C++ is near enough.

use std::ops::Range;

/// One file of the repository.
pub(crate) struct Source {
    /// Path from the repository root, with forward slashes.
    pub(crate) path: String,
    /// The text as it is.
    pub(crate) text: String,
    /// The text with comments and the insides of strings and characters blanked; offsets and lines stay.
    pub(crate) code: String,
    /// The text with all but comments blanked.
    pub(crate) comments: String,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let (code, comments) = split(text);
        Self { path: path.to_owned(), text: text.to_owned(), code, comments }
    }

    pub(crate) fn is_rust(&self) -> bool {
        self.has_extension("rs")
    }

    pub(crate) fn has_extension(&self, extension: &str) -> bool {
        self.path.rsplit_once('.').is_some_and(|(_, end)| end == extension)
    }

    /// `path:line`, the form that editors and terminals open.
    pub(crate) fn place(&self, at: usize) -> String {
        format!("{}:{}", self.path, self.line(at))
    }

    /// The line of a byte offset, from 1.
    pub(crate) fn line(&self, at: usize) -> usize {
        self.text[..at].matches('\n').count() + 1
    }

    /// Whether a build, a test or a bench is the only one to compile this file, as its path tells.
    pub(crate) fn is_test_support(&self) -> bool {
        let mut parts = self.path.split('/').rev();
        let file = parts.next().unwrap_or_default();
        matches!(file, "build.rs" | "tests.rs" | "test_support.rs")
            || parts.any(|dir| matches!(dir, "tests" | "test_support" | "benches" | "examples"))
    }

    /// The byte ranges of items under `#[cfg(test)]`.
    pub(crate) fn test_ranges(&self) -> Vec<Range<usize>> {
        let starts = ["#[cfg(test)]", "#[cfg(all(test,"];
        let mut found = Vec::new();
        for start in starts.iter().flat_map(|mark| self.code.match_indices(mark)) {
            let after_attribute = start.0 + self.code[start.0..].find(']').unwrap_or(0) + 1;
            found.push(start.0..item_end(&self.code, after_attribute).unwrap_or(self.code.len()));
        }
        found
    }
}

/// Byte offsets at which `word` stands alone, not as part of a longer identifier.
pub(crate) fn words<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = text[..at].bytes().next_back();
        let after = text[at + word.len()..].bytes().next();
        !before.is_some_and(is_ident) && !after.is_some_and(is_ident)
    })
}

pub(crate) fn is_ident(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric() || !byte.is_ascii()
}

/// The end of the item whose signature starts at `from`: after its body's brace or its semicolon.
pub(crate) fn item_end(code: &str, from: usize) -> Option<usize> {
    let bytes = code.as_bytes();
    let body = body_start(code, from)?;
    if bytes[body] == b';' { Some(body + 1) } else { brace_end(code, body) }
}

/// The first `{` or `;` from `from` on that is not inside parentheses or brackets, as in `[u8; 4]`.
pub(crate) fn body_start(code: &str, from: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(from) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.checked_sub(1)?,
            b'{' | b';' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

/// The offset after the brace that closes the one at `open`.
pub(crate) fn brace_end(code: &str, open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in code.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Quoted,
    Comment,
}

/// Blanks what is not code in one copy and what is not a comment in the other. Newlines stay in both.
fn split(text: &str) -> (String, String) {
    let kinds = classify(text.as_bytes());
    let keep = |wanted: Kind| {
        let kept = text.bytes().zip(&kinds).map(|(byte, &kind)| match byte {
            b'\n' => byte,
            _ if kind == wanted => byte,
            _ => b' ',
        });
        String::from_utf8(kept.collect()).expect("strings and comments start and end at ASCII bytes")
    };
    (keep(Kind::Code), keep(Kind::Comment))
}

fn classify(text: &[u8]) -> Vec<Kind> {
    let mut kinds = vec![Kind::Code; text.len()];
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let previous = at.checked_sub(1).map(|before| text[before]);
        let (kind, len) = if rest.starts_with(b"//") {
            (Kind::Comment, rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len()))
        } else if rest.starts_with(b"/*") {
            (Kind::Comment, block_comment_len(rest))
        } else if rest[0] == b'"' {
            (Kind::Quoted, string_len(rest, b'"'))
        } else if rest[0] == b'\'' {
            (Kind::Quoted, char_len(rest))
        } else if previous.is_none_or(|byte| !is_ident(byte)) {
            (Kind::Quoted, raw_string_len(rest))
        } else {
            (Kind::Code, 1)
        };
        let is_lifetime_or_plain = len == 0;
        if is_lifetime_or_plain {
            at += 1;
            continue;
        }
        // The quotes themselves stay code: a blanked string still looks like a value.
        let border = usize::from(kind == Kind::Quoted && len >= 2);
        kinds[at + border..at + len - border].fill(kind);
        at += len;
    }
    kinds
}

fn block_comment_len(text: &[u8]) -> usize {
    let (mut at, mut depth) = (0, 0_usize);
    while at < text.len() {
        if text[at..].starts_with(b"/*") {
            (at, depth) = (at + 2, depth + 1);
        } else if text[at..].starts_with(b"*/") {
            (at, depth) = (at + 2, depth - 1);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

fn string_len(text: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// The length of a character literal; 0 for a lifetime or a loop label.
fn char_len(text: &[u8]) -> usize {
    match text.get(1) {
        Some(b'\\') => string_len(text, b'\''),
        Some(&first) => {
            let wide = if first.is_ascii() { 1 } else { first.leading_ones() as usize };
            if text.get(1 + wide) == Some(&b'\'') { wide + 2 } else { 0 }
        }
        None => 0,
    }
}

/// The length of `r"…"`, `r#"…"#` and their `b` and `c` forms; 0 for anything else.
fn raw_string_len(text: &[u8]) -> usize {
    let prefix = match text {
        [b'b' | b'c', b'r', ..] => 2,
        [b'r', ..] => 1,
        _ => return 0,
    };
    let hashes = text[prefix..].iter().take_while(|&&byte| byte == b'#').count();
    let body = prefix + hashes + 1;
    if text.get(body - 1) != Some(&b'"') {
        return 0;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    let end = text[body..].windows(close.len()).position(|window| window == close);
    end.map_or(text.len(), |end| body + end + close.len())
}

#[test]
fn comments_strings_and_characters_are_not_code() {
    let text = "let a = \"{ \\\" {\"; // {\nlet b = '{'; /* { /* { */ { */ let c = '\\''; let d = \"é{\";\n";
    let source = Source::new("a.rs", text);
    assert!(!source.code.contains('{'), "{}", source.code);
    assert_eq!(source.code.len(), text.len());
    assert!(source.code.contains("let d") && source.comments.contains("// {"));
    assert!(!source.comments.contains("let"));
}

#[test]
fn raw_strings_end_at_their_own_hashes() {
    let source = Source::new("a.rs", "let a = r#\"{ \"quoted\" {\"#; let b = br\"\\\"; f({}); r#fn({});\n");
    assert_eq!(source.code.matches('{').count(), 2, "{}", source.code);
    assert!(source.code.contains("r#fn"));
}

#[test]
fn lifetimes_and_labels_are_code() {
    let source =
        Source::new("a.rs", "fn a<'a>(b: &'a str) { 'outer: loop { break 'outer; } let c = 'é'; }\n");
    assert_eq!(source.code.matches('{').count(), 2);
    assert!(source.code.contains("'outer: loop"));
    assert!(!source.code.contains('é'));
}

#[test]
fn test_modules_are_found_with_their_end() {
    let source =
        Source::new("a.rs", "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() { \"}\"; }\n}\nfn c() {}\n");
    let ranges = source.test_ranges();
    assert_eq!(ranges.len(), 1);
    assert!(source.text[ranges[0].clone()].contains("fn b"));
    assert!(!source.text[ranges[0].clone()].contains("fn c"));
}

#[test]
fn words_stand_alone() {
    assert_eq!(words("forbid(unsafe_code) unsafe { not_unsafe }", "unsafe").count(), 1);
}
