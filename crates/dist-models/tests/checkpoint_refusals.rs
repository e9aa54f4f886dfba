//! Bad input, each with what the refusal says.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod checkpoint_case;

use std::path::Path;

use checkpoint_case::{Case, MMAP, READ, Raw, header_end, with_header, write};
use dist_kernels::weight::HostBytes;
use dist_models::checkpoint::{Checkpoint, CheckpointError};
use serde_json::{Value, json};

fn from_bytes(bytes: Vec<u8>) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::from_bytes("case", &Case::fixture("gpt2").config_json(), HostBytes::new(bytes), None)
}

#[track_caller]
fn assert_says(message: &str, fragments: &[&str]) {
    for fragment in fragments {
        assert!(message.contains(fragment), "{fragment:?} is not in {message}");
    }
}

#[test]
fn files_that_are_not_sound_are_refused() {
    let good = write(&Case::fixture("gpt2").tensors);
    let end = header_end(&good);
    let long = [&u64::MAX.to_le_bytes()[..], &good[8..]].concat();
    let huge = [&(good.len() as u64 - 7).to_le_bytes()[..], &good[8..]].concat();
    let cut = good[..good.len() - 10].to_vec();
    let more = [&good[..], &[0; 10]].concat();
    let cases: [(Vec<u8>, &[&str]); 9] = [
        (vec![], &["(file): expected at least 8 bytes, found 0 bytes"]),
        (vec![1, 2, 3], &["(file): expected at least 8 bytes, found 3 bytes"]),
        (long, &["(length of the header): expected at most", "found 18446744073709551615 bytes"]),
        (huge, &["case/model.safetensors: not a sound", "(length of the header): expected at most"]),
        (good[..end].to_vec(), &["(data): expected 731392 bytes, as the header describes, found 0 bytes"]),
        (
            cut,
            &["(data): expected 731392 bytes, as the header describes, found 731382 bytes", "range within"],
        ),
        (more, &["(data): expected 731392 bytes, as the header describes, found 731402 bytes"]),
        (with_header("[]", &[]), &["(header): expected a JSON object of tensors"]),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["is a Git LFS pointer"]),
    ];
    for (bytes, fragments) in cases {
        assert_says(&from_bytes(bytes).unwrap_err().to_string(), fragments);
    }
}

#[test]
fn headers_that_contradict_themselves_are_refused() {
    let entry = |dtype: &str, shape: &str, range: &str| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{range}}}"#)
    };
    let one = |dtype: &str, shape: &str, range: &str| format!(r#"{{"a":{}}}"#, entry(dtype, shape, range));
    let two = |b: &str, range: &str| {
        format!(r#"{{"a":{},"{b}":{}}}"#, entry("F32", "[2]", "[0,8]"), entry("F32", "[2]", range))
    };
    let cases: [(String, &str); 15] = [
        (two("b", "[4,12]"), "b: expected a range from byte 8 on (no overlap), found bytes 4 to 12"),
        (two("b", "[12,20]"), "b: expected a range from byte 8 on (no hole), found bytes 12 to 20"),
        (two("b", "[8,4]"), "b: expected a range that ends after its start, found bytes 8 to 4"),
        (two("a", "[8,16]"), "a: expected one entry, found two"),
        (two("b", "[16,24]"), "b: expected a range within the 16 bytes of data, found bytes 16 to 24"),
        (one("F32", "[4]", "[0,18446744073709551615]"), "a: expected a range within the 16 bytes of data"),
        (one("F32", "[5]", "[0,16]"), "a: expected 20 bytes for F32 [5], found 16 bytes"),
        (one("BF16", "[4]", "[0,16]"), "a: expected 8 bytes for BF16 [4], found 16 bytes"),
        (one("F32", "[4294967296,4294967296,16]", "[0,16]"), "a: expected fewer than 2^64 bits"),
        (one("Q4", "[4]", "[0,16]"), "a: expected a safetensors type such as F32, F16 or BF16, found \"Q4\""),
        (one("F32", "[-4]", "[0,16]"), "tensor \"a\": invalid value: integer `-4`"),
        (one("F32", "[1,1,1,1,1,1,1,1,4]", "[0,16]"), "a list of at most 8 dimensions"),
        (one("F32", "[1e30]", "[0,16]"), "tensor \"a\""),
        (one("F32", "[4]", "[0]"), "tensor \"a\""),
        (r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#.to_owned(), "missing field `dtype`"),
    ];
    for (header, fragment) in cases {
        assert_says(&from_bytes(with_header(&header, &[0; 16])).unwrap_err().to_string(), &[fragment]);
    }
}

#[test]
fn all_differences_are_told_at_once() {
    let mut case = Case::fixture("gpt2");
    case.tensors.retain(|tensor| tensor.name != "transformer.h.1.ln_1.bias");
    *case.find("transformer.wpe.weight") = Raw::zeros("transformer.wpe.weight", "F32", &[64, 64]);
    *case.find("transformer.h.0.mlp.c_fc.weight") =
        Raw::zeros("transformer.h.0.mlp.c_fc.weight", "I32", &[64, 256]);
    let case = case.with(Raw::zeros("score.weight", "F32", &[2, 64]));
    let message = case.refusal();
    assert_says(
        &message,
        &[
            "case/model.safetensors: the tensors are not those of the gpt2 model in config.json:",
            "\n  h.1.ln_1.bias: expected a tensor of shape [64], found nothing",
            "\n  transformer.wpe.weight: expected shape [128, 64], found [64, 64]",
            "\n  transformer.h.0.mlp.c_fc.weight: expected type F32, F16 or BF16, found I32",
            "\n  score.weight: expected no such tensor, found F32 [2, 64]",
        ],
    );
    assert_eq!(message.lines().count(), 5);
    let deeper = Case::fixture("gpt2").set("n_layer", json!(9)).refusal();
    assert_eq!(deeper.lines().count(), 22);
    assert_says(&deeper, &["… and 52 more"]);
    let twice = Case::fixture("gpt2").with(Raw::zeros("wte.weight", "F32", &[384, 64])).refusal();
    assert_says(&twice, &["wte.weight: expected one tensor of this name"]);
}

#[test]
fn parts_of_a_fused_weight_have_one_type() {
    let mut case = Case::fixture("opt");
    let name = "model.decoder.layers.0.self_attn.k_proj.weight";
    let narrow = case.find(name);
    (narrow.dtype, narrow.bytes) = ("F16".into(), vec![0; 64 * 64 * 2]);
    assert_says(
        &case.refusal(),
        &["layers.0.attn.qkv.weight: expected the same type in", "found f32 and f16"],
    );
}

/// A fixture, the field that is changed, to what, and what is said about it.
type BadField = (&'static str, &'static str, Value, &'static str);

fn check_bad_fields(cases: impl IntoIterator<Item = BadField>) {
    for (fixture, field, value, fragment) in cases {
        let message = Case::fixture(fixture).set(field, value).refusal();
        assert_says(&message, &["case/config.json: ", fragment]);
    }
}

#[test]
fn configurations_that_cannot_be_honoured_are_refused_by_name() {
    check_bad_fields([
        (
            "gpt2",
            "model_type",
            json!("llama"),
            "model_type \"llama\" is not supported; supported are gpt2, gpt_neo, opt",
        ),
        ("gpt2", "model_type", Value::Null, "model_type \"\" is not supported"),
        (
            "gpt2",
            "activation_function",
            json!("silu"),
            "expected one of gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh, relu, found \"silu\"",
        ),
        ("gpt2", "activation_function", json!(3), "activation_function: expected one of"),
        ("gpt2", "add_cross_attention", json!(true), "add_cross_attention: expected false, found true"),
        ("gpt2", "quantization_config", json!({"bits": 4}), "quantization_config: expected nothing"),
        ("gpt2", "n_layer", json!(1e18), "n_layer: expected a whole number from 1 to"),
        ("gpt2", "n_layer", json!(5000), "n_layer: expected at most 4096 layers, found 5000"),
        ("gpt2", "n_layer", json!(0), "n_layer: expected a whole number from 1 to 16777216, found 0"),
        ("gpt2", "n_embd", json!(-64), "n_embd: expected a whole number from 1"),
        ("gpt2", "n_embd", Value::Null, "n_embd: expected a whole number from 1 to 16777216, found nothing"),
        ("gpt2", "n_head", json!(5), "n_head: expected a divisor of the width 64, found 5"),
        ("gpt2", "vocab_size", json!("384"), "vocab_size: expected a whole number"),
        ("gpt2", "n_positions", json!(1_u64 << 40), "n_positions: expected a whole number"),
        (
            "gpt2",
            "layer_norm_epsilon",
            json!(0.0),
            "layer_norm_epsilon: expected a number above 0 and below 1, found 0.0",
        ),
        ("gpt2", "layer_norm_epsilon", json!(-1e-5), "layer_norm_epsilon: expected a number above 0"),
        ("gpt2", "layer_norm_epsilon", json!(1e-300), "layer_norm_epsilon: expected a number above 0"),
        ("gpt2", "layer_norm_epsilon", json!("NaN"), "layer_norm_epsilon: expected a number above 0"),
        ("gpt2", "scale_attn_weights", json!(1), "scale_attn_weights: expected true or false, found 1"),
        ("gpt2", "eos_token_id", json!({}), "eos_token_id: expected a token id"),
        ("gpt2", "n_inner", json!(12.5), "n_inner: expected a whole number"),
    ]);
    let several = Case::fixture("gpt2").set("n_head", json!(0)).set("n_layer", json!("x")).refusal();
    assert_says(&several, &["n_head: expected", "n_layer: expected"]);
}

#[test]
fn fields_of_other_families_are_refused_by_name() {
    check_bad_fields([
        (
            "opt",
            "layer_norm_elementwise_affine",
            json!(false),
            "layer_norm_elementwise_affine: expected true, found false",
        ),
        ("opt", "ffn_dim", Value::Null, "ffn_dim: expected a whole number from 1 to 16777216, found nothing"),
        ("gpt-neo-banded", "window_size", json!(0), "window_size: expected a whole number"),
        (
            "gpt-neo-banded",
            "attention_layers",
            json!(["global"]),
            "attention_layers: expected \"global\" or \"local\" for each of 4 layers, found a list of 1",
        ),
        (
            "gpt-neo-banded",
            "attention_types",
            json!([[["global"], 4]]),
            "attention_types: expected the same layers as attention_layers",
        ),
        (
            "gpt-neo-banded",
            "attention_types",
            json!([[["global", "local"], u64::MAX]]),
            "attention_types: expected [[kinds, times], …]",
        ),
        (
            "gpt-neo-banded",
            "attention_types",
            json!([[["sparse"], 4]]),
            "attention_types: expected [[kinds, times], …]",
        ),
    ]);
}

#[test]
fn numbers_that_json_does_not_know_are_named() {
    let text = String::from_utf8(Case::fixture("gpt2").set("layer_norm_epsilon", json!("@")).config_json());
    let text = text.unwrap().replace(',', ",\n");
    for (number, fragment) in [
        ("NaN", "(NaN and Infinity are not JSON numbers)"),
        ("1e999", "number out of range"),
        ("-Infinity", "NaN and"),
    ] {
        let text = text.replace("\"@\"", number);
        let error =
            Checkpoint::from_bytes("case", text.as_bytes(), HostBytes::new(vec![]), None).unwrap_err();
        assert_says(&error.to_string(), &["case/config.json", fragment, "\"layer_norm_epsilon\":", number]);
    }
}

/// What opening says and advises.
fn open(dir: &Path) -> (String, String) {
    let error = Checkpoint::open(dir, &MMAP).unwrap_err();
    (error.to_string(), error.help().unwrap_or_default())
}

#[test]
fn places_that_are_no_model_are_refused_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let (message, help) = open(&at("nowhere"));
    assert_says(&message, &["nowhere: no such directory"]);
    assert_says(&help, &["org/model"]);
    std::fs::write(at("m.gguf"), "GGUF").unwrap();
    std::fs::write(at("m.bin"), "GGUF\0\0").unwrap();
    std::fs::write(at("m.safetensors"), "x").unwrap();
    assert_says(&open(&at("m.gguf")).0, &["m.gguf: GGUF files are not supported"]);
    assert_says(&open(&at("m.bin")).0, &["m.bin: GGUF files are not supported"]);
    let (message, help) = open(&at("m.safetensors"));
    assert_says(&message, &["m.safetensors: is a file, expected a directory"]);
    assert_says(&help, &[&format!("give its directory: {}", dir.path().display())]);
    assert_says(&open(dir.path()).0, &["has no config.json"]);
    std::fs::write(at("config.json"), Case::fixture("gpt2").config_json()).unwrap();
    assert_says(&open(dir.path()).0, &["has neither model.safetensors nor model.safetensors.index.json"]);
    std::fs::write(at("pytorch_model.bin"), "PK").unwrap();
    let (message, help) = open(dir.path());
    assert_says(&message, &["pytorch_model.bin: pickle files are never read"]);
    assert_says(&help, &["convert it once with: python3 -c ", "safe_serialization=True"]);
    std::fs::create_dir(at("model.safetensors")).unwrap();
    assert_says(&open(dir.path()).0, &["model.safetensors: cannot be read"]);
    std::fs::write(at("config.json"), vec![b' '; (1 << 20) + 1]).unwrap();
    assert_says(&open(dir.path()).0, &["config.json: 1048577 bytes, expected at most 1048576"]);
    std::fs::write(at("config.json"), "{\"model_type\": \"gpt2\"").unwrap();
    assert_says(&open(dir.path()).0, &["config.json: EOF while parsing"]);
}

#[test]
fn a_file_cut_after_opening_is_an_error_where_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    Case::fixture("gpt2").write_to(dir.path());
    let checkpoint = Checkpoint::open(dir.path(), &READ).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join("model.safetensors")).unwrap();
    file.set_len(8).unwrap();
    let spec = &dist_core::decoder_specs(checkpoint.config())[0];
    assert_says(
        &checkpoint.weight(spec, 1, 0).unwrap_err().to_string(),
        &["model.safetensors: cannot be read"],
    );
}
