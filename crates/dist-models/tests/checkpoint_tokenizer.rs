//! Tokenizers: ids of texts, text of ids one by one, files of both kinds, bad files.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod checkpoint_case;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use checkpoint_case::{MMAP, demo_dir};
use dist_models::checkpoint::Checkpoint;
use dist_models::tokenizer::{TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

const N_VOCAB: usize = 2048;

fn demo_json() -> Vec<u8> {
    std::fs::read(demo_dir().join("tokenizer.json")).unwrap()
}

fn demo() -> Arc<Tokenizer> {
    static DEMO: LazyLock<Arc<Tokenizer>> =
        LazyLock::new(|| Arc::new(Tokenizer::from_json("tokenizer.json", &demo_json(), N_VOCAB).unwrap()));
    Arc::clone(&DEMO)
}

/// The library's own reading of the same file.
static LIBRARY: LazyLock<tokenizers::Tokenizer> =
    LazyLock::new(|| tokenizers::Tokenizer::from_bytes(demo_json()).unwrap());

/// The text of `ids` as it comes, piece by piece.
fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32]) -> Vec<String> {
    let mut stream = TextStream::new(Arc::clone(tokenizer));
    let mut out: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    out.push(stream.finish());
    out
}

#[test]
fn texts_survive_the_way_there_and_back() {
    let checkpoint = Checkpoint::open(&demo_dir(), &MMAP).unwrap();
    let tokenizer = Arc::new(checkpoint.tokenizer().unwrap().unwrap());
    for text in [
        "",
        "ROMEO:\nBut soft",
        "  two  spaces ",
        "naïve café — 漢字 🙂\u{200D}🙂",
        "\0\u{7F}\u{AD}\u{A0}",
        "don't",
    ] {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        assert_eq!(pieces(&tokenizer, &ids).concat(), text);
    }
    assert_eq!(tokenizer.n_vocab(), N_VOCAB);
    assert_eq!((tokenizer.token(0).unwrap().as_str(), tokenizer.token(99_999)), ("<|endoftext|>", None));
    assert_eq!(tokenizer.encode("a<|endoftext|>b").unwrap()[1], 0);
    assert_eq!(tokenizer.decode(&[0, 99_999]), "");
}

#[test]
fn a_character_comes_whole_or_not_at_all() {
    let tokenizer = demo();
    let ids = tokenizer.encode("🙂é").unwrap();
    assert_eq!(ids.len(), 6, "one token a byte");
    assert_eq!(pieces(&tokenizer, &ids), ["", "", "", "🙂", "", "é", ""]);
    // Cut short, then followed by something else, then never completed.
    let cut = [&ids[..3], &tokenizer.encode("a").unwrap(), &ids[4..5]].concat();
    assert_eq!(pieces(&tokenizer, &cut), ["", "", "", "\u{FFFD}a", "", "\u{FFFD}"]);
    // A special token has no text and does not part the bytes around it.
    let parted = [&ids[..2], &[0], &ids[2..4]].concat();
    assert_eq!(pieces(&tokenizer, &parted), ["", "", "", "", "🙂", ""]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_are_the_whole(
        // Tokens 1 to 256 are single bytes, so half of all ids make broken characters of every kind.
        ids in proptest::collection::vec(prop_oneof![0_u32..257, 0_u32..2050], 0..60),
        text in "\\PC{0,20}",
    ) {
        let tokenizer = demo();
        let mut ids = ids;
        ids.extend(tokenizer.encode(&text).unwrap());
        let pieces = pieces(&tokenizer, &ids);
        prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids));
        prop_assert_eq!(tokenizer.decode(&ids), LIBRARY.decode(&ids, true).unwrap());
        prop_assert_eq!(tokenizer.encode(&text).unwrap(), LIBRARY.encode(text.as_str(), true).unwrap().get_ids().to_vec());
    }
}

/// The demo tokenizer as GPT-2's two files.
fn write_gpt2(dir: &Path, settings: &Value) {
    let whole: Value = serde_json::from_slice(&demo_json()).unwrap();
    let merges = whole["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
        Value::String(pair) => pair.clone(),
        pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
    });
    let merges = format!("#version: 0.2\n{}\n", merges.collect::<Vec<_>>().join("\n"));
    std::fs::write(dir.join("vocab.json"), whole["model"]["vocab"].to_string()).unwrap();
    std::fs::write(dir.join("merges.txt"), merges).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), settings.to_string()).unwrap();
}

#[test]
fn two_files_are_as_good_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let text = "Now is the winter of our discontent — 漢字<|endoftext|>!";
    let expected = demo().encode(text).unwrap();
    write_gpt2(dir.path(), &json!({"add_prefix_space": false, "bos_token": {"content": "!"}}));
    let tokenizer = Tokenizer::open(dir.path(), N_VOCAB).unwrap().unwrap();
    assert_eq!(tokenizer.encode(text).unwrap(), expected);
    write_gpt2(dir.path(), &json!({"add_bos_token": true, "bos_token": "<|endoftext|>"}));
    let tokenizer = Tokenizer::open(dir.path(), N_VOCAB).unwrap().unwrap();
    assert_eq!(tokenizer.encode(text).unwrap(), [&[0], &expected[..]].concat());
    assert_eq!(tokenizer.decode(&expected), text.replace("<|endoftext|>", ""));
    write_gpt2(dir.path(), &json!({"add_prefix_space": true}));
    let tokenizer = Tokenizer::open(dir.path(), N_VOCAB).unwrap().unwrap();
    assert_eq!(tokenizer.encode("Now").unwrap(), demo().encode(" Now").unwrap());
    std::fs::remove_file(dir.path().join("vocab.json")).unwrap();
    assert!(Tokenizer::open(dir.path(), N_VOCAB).unwrap().is_none());
}

#[test]
fn a_text_is_never_cut_or_filled_up_and_dropout_is_off() {
    let mut whole: Value = serde_json::from_slice(&demo_json()).unwrap();
    whole["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    whole["padding"] = json!({"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    whole["model"]["dropout"] = json!(0.9);
    let tokenizer = Tokenizer::from_json("t", whole.to_string().as_bytes(), N_VOCAB).unwrap();
    let text = "Now is the winter of our discontent";
    for _ in 0..20 {
        assert_eq!(tokenizer.encode(text).unwrap(), demo().encode(text).unwrap());
    }
}

/// A decoder that looks at neighbours: words are parted by spaces.
#[test]
fn other_decoders_stream_by_context() {
    let whole = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "byte_fallback": true, "vocab": {"▁to": 0, "▁be": 1, "or": 2, "<0xC3>": 3, "<0xA9>": 4},
            "merges": []},
    });
    let tokenizer = Arc::new(Tokenizer::from_json("t", whole.to_string().as_bytes(), 5).unwrap());
    for ids in [&[0, 1, 2, 0][..], &[0, 3, 4, 1], &[3, 4, 3, 4], &[0, 3, 1], &[1, 3]] {
        assert_eq!(pieces(&tokenizer, ids).concat(), tokenizer.decode(ids), "{ids:?}");
    }
    assert_eq!(pieces(&tokenizer, &[0, 3, 4, 1]), ["to", "", "é", " be", ""]);
}

#[test]
fn bad_files_are_refused() {
    let vocab = json!({"a": 0, "b": 1});
    let with_model = |model: Value| json!({"version": "1.0", "added_tokens": [], "model": model}).to_string();
    let merge = |b: &str| with_model(json!({"type": "BPE", "vocab": vocab, "merges": [["a", b]]}));
    let prefixed =
        json!({"type": "BPE", "continuing_subword_prefix": "é", "vocab": vocab, "merges": [["a", "b"]]});
    let cases = [
        (String::new(), "EOF while parsing"),
        ("[]".to_owned(), "invalid"),
        ("{}".to_owned(), "missing field `model`"),
        (with_model(json!({"type": "Markov"})), "t.json: not a tokenizer"),
        // The library panics here.
        (merge("b"), "its rules contradict each other"),
        (merge("c"), "not a tokenizer"),
        (with_model(prefixed), "continuing_subword_prefix is not supported"),
    ];
    for (text, fragment) in cases {
        let error = Tokenizer::from_json("t.json", text.as_bytes(), 8).unwrap_err();
        assert!(error.to_string().contains(fragment) && error.help().is_some(), "{error}");
    }
    let huge = with_model(json!({"type": "BPE", "vocab": {"a": u32::MAX}, "merges": []}));
    let tokenizer = Tokenizer::from_json("t.json", huge.as_bytes(), 8).unwrap();
    let message = tokenizer.encode("a").unwrap_err().to_string();
    assert_eq!(message, "the tokenizer made token 4294967295 (\"a\"), but the model has tokens 0 to 7");
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("tokenizer.json")).unwrap();
    file.set_len((64 << 20) + 1).unwrap();
    let message = Tokenizer::open(dir.path(), 8).unwrap_err().to_string();
    assert!(message.contains("67108865 bytes, expected at most 67108864"), "{message}");
}
