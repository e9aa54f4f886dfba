//! Checkpoints as they are published: prefixes, masks, heads, shards, types, configurations, the local cache.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod checkpoint_case;

use checkpoint_case::{Case, FIXTURES, MMAP, READ, Raw, elements, fixture_dir, write};
use dist_core::{Activation, DType, NormPosition, decoder_specs};
use dist_models::checkpoint::{Checkpoint, HfCache, find, is_repo_name};
use half::{bf16, f16};
use serde_json::{Value, json};

/// All weights of a checkpoint in canonical order.
fn values(checkpoint: &Checkpoint) -> Vec<Vec<f32>> {
    let weight = |spec: &_| elements(&checkpoint.weight(spec, 1, 0).unwrap()).concat();
    let specs = decoder_specs(checkpoint.config());
    specs
        .iter()
        .map(|spec| if spec.shape.len() == 2 { weight(spec) } else { checkpoint.vector(spec, 1, 0).unwrap() })
        .collect()
}

#[test]
fn all_families_are_read_as_their_configurations_say() {
    let config = |name: &str| Checkpoint::open(&fixture_dir(name), &MMAP).unwrap().config().clone();
    let gpt2 = config("gpt2");
    assert_eq!(
        (gpt2.name.as_str(), gpt2.n_layers, gpt2.d_model, gpt2.d_ff, gpt2.n_ctx),
        ("gpt2", 3, 64, 256, 128)
    );
    assert_eq!((gpt2.bos_id, gpt2.eos_ids.as_slice(), gpt2.weight_dtype), (Some(0), &[0][..], DType::F32));
    let erf = config("gpt2-erf-inner");
    assert_eq!((erf.d_head, erf.d_ff, erf.block.activation), (8, 112, Activation::GeluErf));
    assert!((erf.block.norm_eps - 1e-3).abs() < 1e-9);
    let scaled = config("gpt2-scaled-attn");
    assert!(scaled.block.scale_attn_by_inverse_layer_idx && !scaled.tied_head);
    let opt = config("opt");
    assert_eq!((opt.position_offset, opt.block.activation, opt.final_norm), (2, Activation::Relu, true));
    let post = config("opt-post-norm-proj");
    assert_eq!((post.block.norm_position, post.d_embed, post.final_norm), (NormPosition::Post, 32, false));
    let neo = config("gpt-neo-banded");
    assert_eq!(neo.windows, [None, Some(8), None, Some(8)]);
    assert!(!neo.block.scale_attn && !neo.block.qkv_bias && neo.block.out_bias && neo.d_ff == 256);
}

#[test]
fn fields_that_change_the_result_are_honoured() {
    let config = |case: Case| case.open().unwrap().config().clone();
    let gpt2 = || Case::fixture("gpt2");
    assert!(!config(gpt2().set("scale_attn_weights", json!(false))).block.scale_attn);
    let gelu = json!("gelu_pytorch_tanh");
    assert_eq!(config(gpt2().set("activation_function", gelu)).block.activation, Activation::GeluTanh);
    let eos = config(gpt2().set("eos_token_id", json!([3, 50256, 5])).set("bos_token_id", json!(50256)));
    assert_eq!((eos.eos_ids, eos.bos_id), (vec![3, 5], None));
    let neo = || Case::fixture("gpt-neo-banded").set("attention_layers", Value::Null);
    let types = json!([[["local"], 1], [["global", "local", "local"], 1]]);
    assert_eq!(config(neo().set("attention_types", types)).windows, [Some(8), None, Some(8), Some(8)]);
    let listed = neo()
        .set("attention_types", Value::Null)
        .set("attention_layers", json!(["global", "global", "global", "local"]));
    assert_eq!(config(listed).windows, [None, None, None, Some(8)]);
    let mut opt =
        Case::fixture("opt").set("enable_bias", json!(false)).set("_remove_final_layer_norm", json!(true));
    opt.tensors.retain(|tensor| !tensor.name.ends_with("proj.bias") && !tensor.name.contains(".fc1.bias"));
    opt.tensors.retain(|tensor| {
        !tensor.name.contains(".fc2.bias") && !tensor.name.starts_with("model.decoder.final")
    });
    let opt = config(opt);
    assert!(!opt.block.qkv_bias && !opt.block.out_bias && !opt.final_norm);
}

#[test]
fn prefixes_are_as_good_as_none() {
    for name in FIXTURES {
        let whole = values(&Checkpoint::open(&fixture_dir(name), &MMAP).unwrap());
        for (from, to) in [
            ("transformer.", ""),
            ("model.decoder.", "decoder."),
            ("model.decoder.", "model."),
            ("model.decoder.", ""),
        ] {
            let case = Case::fixture(name).rename(|name| name.replacen(from, to, 1));
            assert_eq!(values(&case.open().unwrap()), whole, "{name}: {from:?} as {to:?}");
        }
    }
}

#[test]
fn masks_and_a_copy_of_a_tied_head_are_passed_over() {
    for (fixture, prefix, masks) in [
        ("gpt2", "transformer.h.", ["attn.bias", "attn.masked_bias"]),
        ("gpt-neo-banded", "transformer.h.", ["attn.attention.bias", "attn.attention.masked_bias"]),
    ] {
        let mut case = Case::fixture(fixture).with(Raw::zeros("lm_head.weight", "F32", &[384, 64]));
        let whole = values(&case.open().unwrap());
        for layer in 0..3 {
            case = case.with(Raw::zeros(&format!("{prefix}{layer}.{}", masks[0]), "BOOL", &[1, 1, 128, 128]));
            case = case.with(Raw::zeros(&format!("{prefix}{layer}.{}", masks[1]), "F32", &[]));
        }
        assert_eq!(values(&case.open().unwrap()), whole, "{fixture}");
        let of_no_layer = case.with(Raw::zeros("h.77.attn.bias", "U8", &[1]));
        assert!(of_no_layer.refusal().contains("h.77.attn.bias: expected no such tensor, found U8 [1]"));
    }
    let untied = Case::fixture("gpt2").set("tie_word_embeddings", json!(false));
    assert!(untied.refusal().contains("lm_head.weight: expected a tensor of shape [384, 64], found nothing"));
}

#[test]
fn half_precision_is_kept_and_mixed_types_are_read() {
    let whole = values(&Case::fixture("opt").open().unwrap());
    for (dtype, name) in [(DType::BF16, "BF16"), (DType::F16, "F16")] {
        let mut case = Case::fixture("opt");
        // The norms stay in f32, as in models that were converted in part.
        for tensor in case.tensors.iter_mut().filter(|tensor| !tensor.name.contains("norm")) {
            let values = tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let narrow = |x: f32| match dtype {
                DType::BF16 => bf16::from_f32(x).to_le_bytes(),
                _ => f16::from_f32(x).to_le_bytes(),
            };
            (tensor.bytes, tensor.dtype) = (values.flat_map(narrow).collect(), name.into());
        }
        let checkpoint = case.open().unwrap();
        assert_eq!(checkpoint.config().weight_dtype, dtype);
        let spec = &decoder_specs(checkpoint.config())[0];
        assert_eq!(checkpoint.weight(spec, 1, 0).unwrap().dtype, dtype);
        for (got, want) in values(&checkpoint).concat().iter().zip(whole.concat()) {
            // Half a unit in the last place of bf16's eight bits; f16 has more, but a smaller range.
            assert!((got - want).abs() <= want.abs() / 256.0 + 1e-7, "{got} {want}");
        }
    }
}

/// Two shards and their index.
fn sharded(dir: &std::path::Path) -> Value {
    let case = Case::fixture("opt");
    case.write_to(dir);
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let (one, two) = case.tensors.split_at(20);
    let mut map = serde_json::Map::new();
    for (name, tensors) in
        [("model-00001-of-00002.safetensors", one), ("model-00002-of-00002.safetensors", two)]
    {
        std::fs::write(dir.join(name), write(tensors)).unwrap();
        map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
    }
    json!({"metadata": {"total_size": 1}, "weight_map": map})
}

#[test]
fn shards_are_one_model() {
    let dir = tempfile::tempdir().unwrap();
    let index = sharded(dir.path());
    let path = dir.path().join("model.safetensors.index.json");
    std::fs::write(&path, index.to_string()).unwrap();
    let whole = values(&Checkpoint::open(&fixture_dir("opt"), &MMAP).unwrap());
    for options in [MMAP, READ] {
        assert_eq!(values(&Checkpoint::open(dir.path(), &options).unwrap()), whole);
    }
    let refusal = |index: &Value| {
        std::fs::write(&path, index.to_string()).unwrap();
        Checkpoint::open(dir.path(), &MMAP).unwrap_err().to_string()
    };
    let (tensor, second) = ("model.decoder.layers.0.fc1.bias", "model-00002-of-00002.safetensors");
    let with = |tensor: &str, file: &str| {
        let mut index = index.clone();
        index["weight_map"][tensor] = json!(file);
        index
    };
    for outside in ["../model.safetensors", "/etc/passwd", "a/b", "..", ""] {
        let message = refusal(&with(tensor, outside));
        assert!(
            message.contains(&format!("{outside}: expected the name of a file in the same directory")),
            "{message}"
        );
    }
    assert!(
        refusal(&with(tensor, "model-3.safetensors"))
            .contains("model-3.safetensors: expected a shard of the model, found no such file")
    );
    assert!(
        refusal(&with(tensor, second))
            .contains(&format!("{tensor}: expected a tensor in {second}, found nothing"))
    );
    assert!(refusal(&with("ghost", second)).contains("ghost: expected a tensor in"));
    assert!(
        refusal(&json!({"weight_map": {}})).contains("weight_map: expected at least one tensor, found none")
    );
    assert!(refusal(&json!({})).contains("weight_map"));
    std::fs::remove_file(dir.path().join(second)).unwrap();
    assert!(
        refusal(&index).contains(&format!("{second}: expected a shard of the model, found no such file"))
    );
}

#[test]
fn the_local_cache_is_looked_up_and_never_left() {
    let hub = tempfile::tempdir().unwrap();
    let cache = HfCache { hub_dir: hub.path().to_owned() };
    let error = find("org/tiny-model", &cache).unwrap_err();
    assert!(error.to_string().contains("org/tiny-model: not in the local Hugging Face cache"));
    assert_eq!(error.help().unwrap(), "fetch it with: hf download org/tiny-model");
    let repo = hub.path().join("models--org--tiny-model");
    let (old, new) = (repo.join("snapshots/aaaa"), repo.join("snapshots/bbbb"));
    for dir in [&old, &new, &repo.join("refs")] {
        std::fs::create_dir_all(dir).unwrap();
    }
    Case::fixture("gpt2").write_to(&new);
    std::fs::write(repo.join("refs/main"), "bbbb\n").unwrap();
    let dir = find("org/tiny-model", &cache).unwrap();
    assert_eq!(dir, new);
    assert_eq!(Checkpoint::open(&dir, &MMAP).unwrap().config().name, "org/tiny-model");
    std::fs::write(repo.join("refs/main"), "aaaa").unwrap();
    let incomplete = Checkpoint::open(&find("org/tiny-model", &cache).unwrap(), &MMAP).unwrap_err();
    assert_eq!(incomplete.help().unwrap(), "complete the download with: hf download org/tiny-model");
    std::fs::write(repo.join("refs/main"), "../../../..").unwrap();
    assert!(find("org/tiny-model", &cache).is_err());
    std::fs::remove_dir(&old).unwrap();
    assert_eq!(find("org/tiny-model", &cache).unwrap(), new);
    for name in ["../etc", "org/..", "a/b/c", "org/", "plain", "/abs", ".a/b"] {
        assert!(!is_repo_name(name) && find(name, &cache).is_err(), "{name}");
    }
}

#[test]
fn the_generation_config_says_what_ends_a_text() {
    let dir = tempfile::tempdir().unwrap();
    Case::fixture("gpt2").write_to(dir.path());
    let path = dir.path().join("generation_config.json");
    let open = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Checkpoint::open(dir.path(), &MMAP)
    };
    assert_eq!(open(r#"{"eos_token_id": [7, 9]}"#).unwrap().config().eos_ids, [7, 9]);
    assert_eq!(open(r#"{"do_sample": true}"#).unwrap().config().eos_ids, [0]);
    let message = open(r#"{"eos_token_id": "x"}"#).unwrap_err().to_string();
    assert!(
        message.contains("generation_config.json") && message.contains("eos_token_id: expected a token id"),
        "{message}"
    );
}
