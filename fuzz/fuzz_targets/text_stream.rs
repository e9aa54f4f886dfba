//! Any token ids: the pieces of a stream are the decoded whole.
#![no_main]

use std::sync::{Arc, LazyLock};

use dist_models::tokenizer::{TextStream, Tokenizer};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

/// A token for each byte, a special one, one that is not spelled in bytes, some of several bytes.
static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let own = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut spelled: Vec<u32> = (0..256).filter(|&byte| own(byte)).collect();
    spelled.extend(0x100..0x144);
    let mut vocab: Map<String, Value> = (0..)
        .zip(spelled)
        .map(|(id, c)| (char::from_u32(c).expect("Latin").to_string(), json!(id)))
        .collect();
    for (id, token) in (256..).zip(["ðŁĻĤ", "ðŁ", "ĻĤ", "Ã©x", "aÃ", "Ġthe", "ðŁĻĤðŁ", "âĤ"])
    {
        vocab.insert(token.to_owned(), json!(id));
    }
    let added = |id: u32, text: &str, special: bool| {
        json!({"id": id, "content": text, "special": special, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let whole = json!({
        "version": "1.0",
        "added_tokens": [added(264, "<|endoftext|>", true), added(265, "漢 字", false)],
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Arc::new(Tokenizer::from_json("fuzz", whole.to_string().as_bytes(), 266).expect("a sound tokenizer"))
});

fuzz_target!(|bytes: &[u8]| {
    let ids: Vec<u32> =
        bytes.chunks_exact(2).map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])) % 270).collect();
    let mut stream = TextStream::new(Arc::clone(&TOKENIZER));
    let mut text = String::new();
    for &id in &ids {
        let piece = stream.push(id);
        // Only bytes that cannot be a character become U+FFFD, never the beginning of one that is completed later.
        text.push_str(&piece);
    }
    text.push_str(&stream.finish());
    assert_eq!(text, TOKENIZER.decode(&ids));
});
