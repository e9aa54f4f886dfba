//! Text to token ids and back: `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.
//!
//! [`TextStream`] turns tokens into text one by one and never emits half a character.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokenizers::DecoderWrapper;

use crate::checkpoint::{CheckpointError, read_bounded};

/// Bound on each file; published ones have at most about 20 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Why there is no tokenizer, or no ids for a text.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// A file that holds no tokenizer.
    #[error("{file}: not a tokenizer: {message}")]
    Broken {
        /// The file.
        file: String,
        /// What is wrong with it.
        message: String,
    },
    /// The tokenizer could not split this text.
    #[error("the text cannot be tokenised: {message}")]
    Encode {
        /// What the tokenizer said.
        message: String,
    },
    /// The tokenizer is of another model.
    #[error("the tokenizer made token {id} ({token:?}), but the model has tokens 0 to {}", n_vocab - 1)]
    Outside {
        /// The token's number.
        id: u32,
        /// The token.
        token: String,
        /// Tokens of the model.
        n_vocab: usize,
    },
}

impl TokenizerError {
    /// What to do about it, where there is something to do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::File(error) => error.help(),
            Self::Broken { .. } => {
                Some("download it again; without a tokenizer, --prompt-ids takes token ids".to_owned())
            }
            Self::Outside { .. } => Some("use the tokenizer that was published with the model".to_owned()),
            Self::Encode { .. } => None,
        }
    }
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Whether tokens are bytes, each spelled as one of GPT-2's 256 characters.
    is_byte_level: bool,
    /// Put before every text.
    bos_id: Option<u32>,
    n_vocab: usize,
}

/// The fields of a tokenizer.json that are looked at before the library reads it.
#[derive(Deserialize)]
struct Peek {
    model: PeekModel,
}

#[derive(Deserialize)]
struct PeekModel {
    #[serde(rename = "continuing_subword_prefix")]
    prefix: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// Runs a piece of the `tokenizers` library. It is known to panic where a file's merges make tokens that are not in its
/// vocabulary, and its regular expressions may give up; both are the file's fault and become errors.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its rules contradict each other".to_owned()),
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a model of `n_vocab` tokens from its directory: `tokenizer.json`, else `vocab.json` with
    /// `merges.txt`, else there is none.
    pub fn open(dir: &Path, n_vocab: usize) -> Result<Option<Self>, TokenizerError> {
        let whole = dir.join("tokenizer.json");
        if whole.exists() {
            let bytes = read_bounded(&whole, MAX_FILE_BYTES)?;
            return Self::from_json(&whole.display().to_string(), &bytes, n_vocab).map(Some);
        }
        let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
        if !(vocab.exists() && merges.exists()) {
            return Ok(None);
        }
        let merges = read_bounded(&merges, MAX_FILE_BYTES)?;
        let mut settings = Map::new();
        for name in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = dir.join(name);
            if path.exists() {
                let bytes = read_bounded(&path, MAX_FILE_BYTES)?;
                settings.append(&mut parse_object(&path.display().to_string(), &bytes)?);
            }
        }
        let file = vocab.display().to_string();
        Self::from_gpt2(&file, &read_bounded(&vocab, MAX_FILE_BYTES)?, &merges, &settings, n_vocab).map(Some)
    }

    /// Reads a `tokenizer.json`; `file` names it in errors.
    pub fn from_json(file: &str, bytes: &[u8], n_vocab: usize) -> Result<Self, TokenizerError> {
        let broken = |message: String| TokenizerError::Broken { file: file.to_owned(), message };
        let peek: Peek = serde_json::from_slice(bytes).map_err(|error| broken(error.to_string()))?;
        let is_word_piece = peek.model.kind.as_deref() == Some("WordPiece");
        if !is_word_piece && peek.model.prefix.is_some_and(|prefix| !prefix.is_empty()) {
            // The library cuts the prefix off merges unchecked.
            return Err(broken(
                "byte-pair encoding with a continuing_subword_prefix is not supported".to_owned(),
            ));
        }
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(broken)?;
        // A prompt that is too long is refused, never cut; and nothing is filled up.
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(broken)?;
        if let tokenizers::ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            // Dropout is for training; the same text must make the same ids.
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        let is_byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        Ok(Self { inner, is_byte_level, bos_id: None, n_vocab })
    }

    /// GPT-2's byte-level encoding from its two files and the settings of `tokenizer_config.json`.
    fn from_gpt2(
        file: &str,
        vocab: &[u8],
        merges: &[u8],
        settings: &Map<String, Value>,
        n_vocab: usize,
    ) -> Result<Self, TokenizerError> {
        let broken =
            |message: &str| TokenizerError::Broken { file: file.to_owned(), message: message.to_owned() };
        let vocab = parse_object(file, vocab)?;
        let merges = str::from_utf8(merges).map_err(|_| broken("merges.txt is not UTF-8"))?;
        let lines = merges.lines().filter(|line| !line.is_empty() && !line.starts_with("#version"));
        let pairs: Option<Vec<(&str, &str)>> = lines.map(|line| line.split_once(' ')).collect();
        let pairs = pairs.ok_or_else(|| broken("a line of merges.txt is not two tokens"))?;
        let special = |name: &str| {
            let token = settings.get(name)?;
            token.as_str().or_else(|| token.get("content")?.as_str())
        };
        let named = ["bos_token", "eos_token", "unk_token", "pad_token"].map(special);
        let mut names: Vec<&str> = named.into_iter().flatten().chain(["<|endoftext|>"]).collect();
        names.sort_unstable();
        names.dedup();
        let added: Vec<Value> = names
            .iter()
            .filter_map(|name| {
                Some(json!({"id": vocab.get(*name)?, "content": name, "special": true, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false}))
            })
            .collect();
        let flag = |name: &str| settings.get(name).and_then(Value::as_bool).unwrap_or(false);
        let bos = special("bos_token").unwrap_or("<|endoftext|>");
        let bos = vocab.get(bos).and_then(Value::as_u64).filter(|_| flag("add_bos_token"));
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": flag("add_prefix_space"),
            "trim_offsets": true, "use_regex": true});
        let whole = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
        });
        let mut tokenizer = Self::from_json(file, whole.to_string().as_bytes(), n_vocab)?;
        tokenizer.bos_id = bos.and_then(|id| u32::try_from(id).ok());
        Ok(tokenizer)
    }

    /// The ids of `text`, with what the model wants before and after it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = guarded(|| self.inner.encode_fast(text, true))
            .map_err(|message| TokenizerError::Encode { message })?;
        let ids: Vec<u32> = self.bos_id.into_iter().chain(encoding.get_ids().iter().copied()).collect();
        match ids.iter().find(|id| **id as usize >= self.n_vocab) {
            None => Ok(ids),
            Some(&id) => {
                let token = self.token(id).unwrap_or_default();
                Err(TokenizerError::Outside { id, token, n_vocab: self.n_vocab })
            }
        }
    }

    /// The text of `ids`; special tokens and numbers without a token have none.
    pub fn decode(&self, ids: &[u32]) -> String {
        if self.is_byte_level {
            let mut bytes = Vec::new();
            for &id in ids {
                self.push_bytes(id, &mut bytes);
            }
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        guarded(|| self.inner.decode(ids, true)).unwrap_or_default()
    }

    /// The token of this number, spelled as in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens of the tokenizer, added ones included; the model may have more rows than that.
    pub fn n_vocab(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The bytes of a byte-level token.
    fn push_bytes(&self, id: u32, out: &mut Vec<u8>) {
        let Some(token) = self.inner.id_to_token(id) else { return };
        if self.inner.get_added_vocabulary().is_special_token(&token) {
            return;
        }
        let start = out.len();
        for spelled in token.chars() {
            let Some(byte) = byte_of(spelled) else {
                // Not spelled in bytes (an added token): it stands for itself.
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            };
            out.push(byte);
        }
    }
}

/// The byte that GPT-2's vocabulary spells as this character: printable Latin-1 stands for itself, the other bytes for
/// U+0100 on, in order.
fn byte_of(spelled: char) -> Option<u8> {
    match u32::from(spelled) {
        own @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(own as u8),
        shifted @ 0x100..=0x120 => Some((shifted - 0x100) as u8),
        shifted @ 0x121..=0x142 => Some((shifted - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

fn parse_object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>, TokenizerError> {
    serde_json::from_slice(bytes)
        .map_err(|error| TokenizerError::Broken { file: file.to_owned(), message: error.to_string() })
}

/// Text of tokens that come one by one. All pieces together, with that of [`TextStream::finish`], are the text that
/// [`Tokenizer::decode`] makes of all tokens (where the tokenizer is byte-level; others may decide by context).
#[derive(Clone, Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    /// Byte-level: the beginning of a character, at most three bytes.
    held: Vec<u8>,
    /// Otherwise: the last tokens whose text was emitted, then those whose text was not.
    ids: Vec<u32>,
    n_emitted: usize,
}

impl TextStream {
    /// A stream at its beginning.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, held: Vec::new(), ids: Vec::new(), n_emitted: 0 }
    }

    /// The text that token `id` completes, possibly none.
    pub fn push(&mut self, id: u32) -> String {
        if !self.tokenizer.is_byte_level {
            return self.push_by_context(id);
        }
        self.tokenizer.push_bytes(id, &mut self.held);
        let n_certain = self.held.len() - unfinished(&self.held);
        let text = String::from_utf8_lossy(&self.held[..n_certain]).into_owned();
        self.held.drain(..n_certain);
        text
    }

    /// What was held back: the beginning of a character that was never completed becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = if self.tokenizer.is_byte_level {
            String::from_utf8_lossy(&self.held).into_owned()
        } else {
            self.unemitted().1
        };
        (self.held, self.ids, self.n_emitted) = (Vec::new(), Vec::new(), 0);
        text
    }

    /// The text of all tokens that are kept, and the part of it that was not emitted.
    fn unemitted(&self) -> (String, String) {
        let before = self.tokenizer.decode(&self.ids[..self.n_emitted]);
        let whole = self.tokenizer.decode(&self.ids);
        let new = whole.strip_prefix(before.as_str()).unwrap_or_default().to_owned();
        (whole, new)
    }

    /// For decoders that look at neighbours: what the text with this token has more than the text without it.
    fn push_by_context(&mut self, id: u32) -> String {
        self.ids.push(id);
        let (whole, new) = self.unemitted();
        if new.is_empty() || whole.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        self.ids.drain(..self.n_emitted);
        self.n_emitted = self.ids.len();
        new
    }
}

/// Length of the beginning of a character at the end of `bytes` that more bytes could still complete.
fn unfinished(bytes: &[u8]) -> usize {
    // A character has at most four bytes, so its beginning is among the last three.
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    (0..tail.len())
        .find(|&at| {
            let error = str::from_utf8(&tail[at..]).err();
            error.is_some_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .map_or(0, |at| tail.len() - at)
}
