//! Damaged directories: each is refused by name, before anything is computed, and all that is wrong is told at once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/checkpoints.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod checkpoints;

use checkpoints::{Files, fixture_dir, keep_on, open, shard};
use dist_core::{DType, Rank, decoder_specs};
use dist_models::manifest::{Manifest, Split};
use dist_models::shard::verify;

/// A disturbed directory: what is done to it, and what is said about it.
type Damage = (&'static str, fn(&Files), &'static [&'static str]);

const DAMAGES: [Damage; 9] = [
    (
        "a byte of a tensor",
        |files| files.flip("rank_1/weights.safetensors", -5),
        &["rank_1/weights.safetensors", "SHA-256"],
    ),
    (
        "a byte of a header",
        |files| files.flip("rank_1/weights.safetensors", 20),
        &["rank_1/weights.safetensors", "(header)"],
    ),
    (
        "a truncated file",
        |files| files.truncate("rank_1/weights.safetensors"),
        &["rank_1/weights.safetensors: expected", "bytes, found"],
    ),
    (
        "a missing rank directory",
        |files| files.remove("rank_1"),
        &["rank_1: expected a rank's directory, found no such directory"],
    ),
    (
        "a missing file",
        |files| files.remove("rank_1/weights.safetensors"),
        &["rank_1/weights.safetensors", "found no such file"],
    ),
    (
        "ranks that changed places",
        |files| files.swap("rank_0", "rank_1"),
        &["rank_0/manifest.json", "expected rank 0 of tp 2", "found rank 1 of tp 2"],
    ),
    (
        "a shard of another plan",
        |files| files.bring("rank_1", &Split { tp: 1, stages: vec![1, 2] }, "gpt2"),
        &["rank_1: expected rank 1 of tp 2 × pp 1", "found rank 1 of tp 1 × pp 2"],
    ),
    (
        "a shard of another model",
        |files| files.bring("rank_1", &Split { tp: 2, stages: vec![3] }, "gpt2-changed"),
        &["rank_1/manifest.json", "another model's shard"],
    ),
    (
        "a changed manifest",
        |files| files.replace("manifest.json", "\"scale_attn\": true", "\"scale_attn\": false"),
        &["manifest.json", "checksum: expected"],
    ),
];

#[test]
fn damage_is_refused_by_name_where_it_is_read() {
    for (what, disturb, fragments) in DAMAGES {
        let files = Files::sharded("gpt2", &Split { tp: 2, stages: vec![3] });
        disturb(&files);
        let told = files.refusal().unwrap_or_else(|| panic!("{what} is not noticed"));
        for fragment in fragments {
            assert!(told.contains(fragment), "{what}: {fragment:?} is not in {told}");
        }
    }
}

/// Large tensors are hashed while others are taken: what is wrong with one is told before anything is computed.
#[test]
fn damage_of_a_large_tensor_is_refused_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let demo = checkpoints::open(&fixture_dir("../../crates/dist-cli/assets/demo-model"));
    let exported = checkpoints::export(&demo, &Split { tp: 1, stages: vec![6] }, &dir.path().join("demo"));
    let manifest = std::fs::read(exported.join("manifest.json")).unwrap();
    let manifest = Manifest::parse("manifest.json", &manifest).unwrap();
    let tensor = manifest.tensors.iter().max_by_key(|tensor| tensor.place.as_ref().unwrap().length).unwrap();
    let place = tensor.place.as_ref().unwrap();
    assert!(place.length > 256 << 10, "{} is large", tensor.name);
    let path = exported.join("weights.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let take_all = || {
        let checkpoint = checkpoints::open(&exported);
        for spec in decoder_specs(checkpoint.config()).iter().filter(|spec| spec.shape.len() == 2) {
            checkpoint.weight(spec, 1, 0)?;
        }
        checkpoint.compared()
    };
    take_all().unwrap();
    bytes[(place.offset + place.length / 2) as usize] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let told = take_all().unwrap_err().to_string();
    assert!(told.contains(&tensor.name) && told.contains("SHA-256"), "{told}");
}

#[test]
fn damage_is_found_by_verify_all_at_once() {
    let split = Split { tp: 2, stages: vec![3] };
    let files = Files::sharded("gpt2", &split);
    let sound = verify(&files.dir, &mut keep_on()).unwrap();
    assert_eq!((sound.n_files, sound.n_tensors % 2), (2, 0));
    files.flip("rank_0/weights.safetensors", -5);
    files.flip("rank_1/weights.safetensors", -5);
    let told = verify(&files.dir, &mut keep_on()).unwrap_err().to_string();
    for rank in 0..2 {
        let named = format!("rank_{rank}/weights.safetensors, ");
        assert!(told.contains(&named), "{named} is not in {told}");
    }
    assert_eq!(told.matches("expected SHA-256").count(), 2, "{told}");
}

/// Numbers that a stranger may have written into a manifest whose checksum is right.
fn place(manifest: &mut Manifest, at: usize) -> &mut dist_models::manifest::Place {
    manifest.tensors[at].place.as_mut().unwrap()
}

#[test]
fn absurd_manifests_are_refused_before_they_are_used() {
    let files = Files::exported("gpt2");
    let sound = Manifest::parse("manifest.json", &files.read("manifest.json")).unwrap();
    let mut cases: Vec<(Manifest, &str)> = Vec::new();
    let mut case = |change: &dyn Fn(&mut Manifest), told| {
        let mut manifest = sound.clone();
        change(&mut manifest);
        cases.push((manifest, told));
    };
    case(&|m| place(m, 0).file = "../../etc/passwd".into(), "found a path that leads elsewhere");
    case(&|m| place(m, 0).file = "/etc/passwd".into(), "found a path that leads elsewhere");
    case(&|m| place(m, 0).file = "other.safetensors".into(), "found another file");
    case(&|m| place(m, 1).offset = u64::MAX, "bytes from byte 18446744073709551615 on");
    case(&|m| place(m, 1).length = u64::MAX, "found 18446744073709551615 bytes");
    case(&|m| place(m, 1).offset = place(m, 0).offset, "embed.positions.weight: expected");
    case(&|m| m.tensors[3].shape = vec![usize::MAX, 2], "found [18446744073709551615, 2]");
    case(&|m| m.tensors[3].dtype = DType::U8, "expected type f32, f16 or bf16, found u8");
    case(&|m| m.tensors.swap(3, 4), "in its place");
    case(&|m| drop(m.tensors.pop()), "of this model");
    case(&|m| m.model.n_layers = 1 << 40, "model, split");
    case(&|m| m.model.d_model = 0, "model, split");
    case(&|m| m.split = Some(Split { tp: 1 << 60, stages: vec![3] }), "model, split");
    case(&|m| m.split = Some(Split { tp: 2, stages: vec![usize::MAX, 4] }), "model, split");
    case(&|m| m.split = Some(Split { tp: 2, stages: vec![3] }), "a place in the ranks' manifests");
    case(&|m| m.golden.prompt_ids = vec![u32::MAX; 32], "found 4294967295");
    case(&|m| m.golden.logprobs.truncate(30), "found 32 ids, 30 log-probabilities");
    case(&|m| m.golden.logprobs[0] = 2.0, "logarithms of probabilities");
    case(&|m| m.schema_version = 2, "schema_version: expected 1, found 2");
    for (manifest, told) in cases {
        files.write("manifest.json", &manifest.to_json());
        let error = checkpoints::try_open(&files.dir).unwrap_err().to_string();
        assert!(
            error.contains("manifest.json: not a manifest that can be used") && error.contains(told),
            "{error}"
        );
    }
    let outside = r#""tokenizer": [{"file": "../x", "length": 1, "sha256": "00"}]"#;
    files.write("manifest.json", &sound.to_json());
    files.replace("manifest.json", "\"tokenizer\": []", outside);
    assert!(checkpoints::try_open(&files.dir).is_err());
}

#[test]
fn several_differences_are_told_at_once() {
    let files = Files::sharded("gpt2", &Split { tp: 4, stages: vec![3] });
    for rank in [1, 2] {
        files.truncate(&format!("rank_{rank}/weights.safetensors"));
    }
    files.remove("rank_3/weights.safetensors");
    let told = checkpoints::try_open(&files.dir).unwrap_err().to_string();
    for rank in 1..4 {
        assert!(told.contains(&format!("rank_{rank}/weights.safetensors: expected")), "{told}");
    }
}

/// On several machines each may hold its own ranks' directories only.
#[test]
fn ranks_that_are_elsewhere_are_not_missed() {
    let split = Split { tp: 2, stages: vec![3] };
    let files = Files::sharded("gpt2", &split);
    files.remove("rank_1");
    let checkpoint = checkpoints::try_open(&files.dir).unwrap();
    checkpoints::take_rank(&checkpoint, &split, Rank(0));
    let spec = &decoder_specs(checkpoint.config())[0];
    let told = checkpoint.weight(spec, 2, 1).unwrap_err().to_string();
    assert!(told.contains("rank_1: expected a rank's directory"), "{told}");
}

#[test]
fn directories_are_known_for_what_they_are() {
    let files = Files::sharded("gpt2", &Split { tp: 2, stages: vec![3] });
    // The directory above holds one sharded directory, so that it is meant.
    assert!(checkpoints::try_open(files.dir.parent().unwrap()).is_ok());
    let told = checkpoints::try_open(&files.dir.join("rank_0")).unwrap_err();
    assert!(told.to_string().ends_with("is the part of one rank"), "{told}");
    assert_eq!(told.help().unwrap(), format!("give the directory above it: {}", files.dir.display()));
    let source = open(&fixture_dir("gpt2"));
    shard(&source, &Split { tp: 1, stages: vec![1, 2] }, files.dir.parent().unwrap());
    let told = checkpoints::try_open(files.dir.parent().unwrap()).unwrap_err().to_string();
    assert!(
        told.contains("several sharded directories: inference_model_pp1mp2, inference_model_pp2mp1"),
        "{told}"
    );
}
