//! The tokenizer's files beside the weights, so that the directory is complete for this program and for Hugging Face's
//! `AutoTokenizer`.

use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::ExportError;
use super::target::Target;
use crate::checkpoint::{Checkpoint, TokenizerFrom, read_bounded};
use crate::manifest::{Digest, FileRow};

/// The files that a tokenizer may consist of.
pub(crate) const FILES: [&str; 7] = [
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];
const CONFIG: &str = "tokenizer_config.json";
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Copies what the source has.
pub(super) fn write(source: &Checkpoint, target: &Target) -> Result<Vec<FileRow>, ExportError> {
    let mut files = read(source)?;
    complete(&mut files);
    let mut rows = Vec::new();
    for (name, bytes) in &files {
        target.write(Path::new(name), bytes)?;
        let sha256 = Digest(Sha256::digest(bytes).into());
        rows.push(FileRow { file: (*name).to_owned(), length: bytes.len() as u64, sha256 });
    }
    Ok(rows)
}

fn read(source: &Checkpoint) -> Result<Vec<(&'static str, Vec<u8>)>, ExportError> {
    match source.tokenizer_from() {
        TokenizerFrom::Nowhere => Ok(Vec::new()),
        TokenizerFrom::Json { bytes, .. } => Ok(vec![(FILES[0], bytes.clone())]),
        TokenizerFrom::Directory(dir) => {
            let there = FILES.into_iter().filter(|name| dir.join(name).is_file());
            there.map(|name| Ok((name, read_bounded(&dir.join(name), MAX_FILE_BYTES)?))).collect()
        }
    }
}

/// `AutoTokenizer` takes the class from here, or else guesses from a config.json, which the directory does not have.
fn complete(files: &mut Vec<(&'static str, Vec<u8>)>) {
    let has = |name| files.iter().any(|(file, _)| *file == name);
    let class = if has("tokenizer.json") {
        "PreTrainedTokenizerFast"
    } else if has("vocab.json") && has("merges.txt") {
        "GPT2Tokenizer"
    } else {
        return;
    };
    let found = files.iter().position(|(name, _)| *name == CONFIG);
    let parsed = found.map(|at| serde_json::from_slice::<Map<String, Value>>(&files[at].1));
    let mut config = match parsed {
        None => Map::new(),
        Some(Ok(config)) => config,
        // What cannot be read is copied as it is.
        Some(Err(_)) => return,
    };
    if config.contains_key("tokenizer_class") {
        return;
    }
    config.insert("tokenizer_class".to_owned(), class.into());
    let mut bytes = serde_json::to_vec_pretty(&config).expect("a parsed object");
    bytes.push(b'\n');
    match found {
        Some(at) => files[at].1 = bytes,
        None => files.insert(1, (CONFIG, bytes)),
    }
}
