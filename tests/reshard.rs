//! Cuts of every fixture for every legal mesh: what comes back is what was exported, to the byte; a rank touches its
//! own bytes only.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/checkpoints.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod checkpoints;
#[path = "support/fixtures.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod fixtures;

use std::collections::HashMap;

use checkpoints::{export, fixture_dir, keep_on, open, read_all, request, shard, splits};
use dist_core::plan::{TOKEN_TABLE, stage_specs};
use dist_core::{DType, Rank, decoder_specs, presets};
use dist_models::checkpoint::Checkpoint;
use dist_models::export::ExportRequest;
use dist_models::manifest::{RankManifest, Split, rank_dir};
use dist_models::shard::listing;
use fixtures::NAMES;

/// Values as their bits, so that equality is equality.
fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn exported_tensors_are_those_of_the_published_files() {
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        let source = open(&fixture_dir(name));
        export(&source, &Split::solo(source.config()), dir.path());
        let exported = open(dir.path());
        assert_eq!(exported.config(), source.config(), "{name}");
        for spec in decoder_specs(source.config()) {
            if spec.shape.len() == 2 {
                let cells =
                    |checkpoint: &Checkpoint| checkpoints::cells(&checkpoint.weight(&spec, 1, 0).unwrap());
                assert_eq!(bits(&cells(&exported)), bits(&cells(&source)), "{name} {}", spec.name);
            } else {
                let values = |checkpoint: &Checkpoint| bits(&checkpoint.vector(&spec, 1, 0).unwrap());
                assert_eq!(values(&exported), values(&source), "{name} {}", spec.name);
            }
        }
    }
}

/// Hugging Face → mesh → one rank, and mesh → another mesh, over all meshes up to 4 × 3.
#[test]
fn every_mesh_gives_the_exported_bytes_back() {
    for name in NAMES {
        let source = open(&fixture_dir(name));
        let root = tempfile::tempdir().unwrap();
        let whole = root.path().join("whole");
        export(&source, &Split::solo(source.config()), &whole);
        let expected = read_all(&whole);
        let mut previous: Option<(Split, std::path::PathBuf)> = None;
        for split in splits(source.config()) {
            let at = |what: &str| root.path().join(format!("{what}-{}-{}", split.tp, split.pp()));
            let cut = shard(&open(&whole), &split, &at("cut"));
            assert_eq!(shard(&open(&cut), &Split::solo(source.config()), &at("back")), at("back"));
            let back = read_all(&at("back"));
            assert_eq!(
                back.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>(),
                "{name} {split}"
            );
            for (file, bytes) in &expected {
                assert!(back[file] == *bytes, "{name}: {file} differs after {split}");
            }
            // From one mesh to the next one is the same as from the export.
            if let Some((from, dir)) = previous {
                let again = shard(&open(&dir), &split, &at("again"));
                assert!(read_all(&again) == read_all(&cut), "{name}: from {from} to {split}");
            }
            previous = Some((split, cut));
        }
    }
}

#[test]
fn a_published_model_is_cut_as_its_export_is() {
    for name in ["gpt2", "opt"] {
        let source = open(&fixture_dir(name));
        let root = tempfile::tempdir().unwrap();
        let split = Split { tp: 2, stages: vec![1, source.config().n_layers - 1] };
        let whole = export(&source, &Split::solo(source.config()), &root.path().join("whole"));
        let by_way = shard(&open(&whole), &split, &root.path().join("by-way"));
        let direct = shard(&source, &split, &root.path().join("direct"));
        assert_eq!(direct.file_name().unwrap(), "inference_model_pp2mp2");
        assert!(read_all(&direct) == read_all(&by_way), "{name}");
    }
}

/// What a rank takes in is what its file holds, no more: all of its own file, nothing of another.
#[test]
fn a_rank_touches_its_own_bytes_only() {
    for name in NAMES {
        let source = open(&fixture_dir(name));
        let root = tempfile::tempdir().unwrap();
        for split in splits(source.config()).filter(|split| !split.is_solo()) {
            let dir = shard(&source, &split, &root.path().join(format!("{}-{}", split.tp, split.pp())));
            for rank in 0..split.mesh().world_size() {
                for checkpoint in [open(&dir), checkpoints::open_unmapped(&dir)] {
                    let held = checkpoints::take_rank(&checkpoint, &split, Rank(rank));
                    for touched in checkpoint.touched() {
                        let own = touched.path.parent().unwrap().ends_with(rank_dir(Rank(rank)));
                        let expected = if own { held } else { 0 };
                        assert_eq!(
                            touched.n_bytes, expected,
                            "{name} {split} rank {rank} {:?}",
                            touched.path
                        );
                    }
                }
            }
        }
    }
}

/// A rank that reads an unsharded directory, or one of another mesh, takes as many bytes as it holds.
#[test]
fn a_rank_of_another_mesh_touches_no_more_than_it_holds() {
    let source = open(&fixture_dir("gpt2"));
    let root = tempfile::tempdir().unwrap();
    let whole = export(&source, &Split::solo(source.config()), &root.path().join("whole"));
    let other = shard(&source, &Split::even(source.config(), 4, 1), root.path());
    let split = Split::even(source.config(), 2, 2);
    for dir in [fixture_dir("gpt2"), whole, other] {
        for rank in 0..4 {
            let checkpoint = open(&dir);
            let held = checkpoints::take_rank(&checkpoint, &split, Rank(rank));
            let touched: u64 = checkpoint.touched().iter().map(|touched| touched.n_bytes).sum();
            assert_eq!(touched, held, "{} rank {rank}", dir.display());
        }
    }
}

#[test]
fn a_tied_table_is_read_from_the_stages_own_file() {
    let source = open(&fixture_dir("gpt2"));
    assert!(source.config().tied_head);
    let root = tempfile::tempdir().unwrap();
    let split = Split::even(source.config(), 1, 2);
    let dir = shard(&source, &split, root.path());
    let checkpoint = open(&dir);
    let spec = &decoder_specs(source.config())[0];
    assert_eq!(spec.name, TOKEN_TABLE);
    checkpoint.head_table(spec, 1, 0).unwrap();
    let touched: Vec<u64> = checkpoint.touched().iter().map(|touched| touched.n_bytes).collect();
    assert_eq!(touched, [0, spec.n_bytes() as u64]);
}

#[test]
fn padding_is_in_no_file() {
    let source = open(&fixture_dir("gpt2"));
    let root = tempfile::tempdir().unwrap();
    let split = Split { tp: 4, stages: vec![source.config().n_layers] };
    // 383 tokens over four ranks: 96, 96, 96, and 95 with a row of padding that no file has.
    let mut config = source.config().clone();
    config.n_vocab = 383;
    let random = Checkpoint::random(config, 3);
    let dir = shard(&random, &split, root.path());
    let rows = (0..4).map(|rank| {
        let path = dir.join(rank_dir(Rank(rank))).join("manifest.json");
        let manifest = RankManifest::parse("manifest", &std::fs::read(path).unwrap()).unwrap();
        manifest.tensors[0].shape[0]
    });
    assert_eq!(rows.collect::<Vec<_>>(), [96, 96, 96, 95]);
    let back = shard(&open(&dir), &Split::solo(random.config()), &root.path().join("back"));
    let spec = &decoder_specs(random.config())[0];
    let of = |checkpoint: &Checkpoint| checkpoints::cells(&checkpoint.weight(spec, 1, 0).unwrap());
    assert_eq!(bits(&of(&open(&back))), bits(&of(&random)));
}

#[test]
fn a_listing_is_what_is_written() {
    let source = open(&fixture_dir("opt-post-norm-proj"));
    let root = tempfile::tempdir().unwrap();
    let split = Split::even(source.config(), 2, 2);
    let request = request(&source, &split, root.path());
    let listed = listing(&request).unwrap();
    let exported = request.write(&mut keep_on()).unwrap();
    assert_eq!(listed.len(), 4);
    let mut n_held: HashMap<String, usize> = HashMap::new();
    for rank in &listed {
        let file = exported.dir.join(rank_dir(Rank(rank.rank))).join("weights.safetensors");
        assert_eq!(rank.n_bytes, std::fs::metadata(file).unwrap().len());
        let sum: u64 = rank.tensors.iter().map(|tensor| tensor.n_bytes).sum();
        assert!(rank.n_bytes - sum < 16_384, "a header is small");
        rank.tensors.iter().for_each(|tensor| *n_held.entry(tensor.name.clone()).or_default() += 1);
        let stage = split.mesh().coord(Rank(rank.rank)).pp;
        let expected = stage_specs(source.config(), &split.stages, stage);
        assert_eq!(rank.tensors.len(), expected.len());
    }
    // The tied table is in both stages, everything else in one.
    let tp = 2;
    assert!(n_held.iter().all(|(name, n)| *n == if name == TOKEN_TABLE { 2 * tp } else { tp }));
}

#[test]
fn random_weights_are_the_same_whatever_they_are_cut_for() {
    let mut config = presets::preset("gpt3-125m", None).unwrap();
    (config.n_layers, config.d_model, config.d_embed, config.d_ff) = (2, 48, 48, 111);
    (config.n_heads, config.n_kv_heads, config.d_head, config.n_vocab, config.n_ctx) = (3, 3, 16, 501, 64);
    config.windows.truncate(2);
    let random = Checkpoint::random(config.clone(), 11);
    let root = tempfile::tempdir().unwrap();
    let whole = export(&random, &Split::solo(&config), &root.path().join("whole"));
    // Three heads on two ranks: one holds two of them.
    let cut = shard(&random, &Split::even(&config, 2, 2), root.path());
    let back = shard(&open(&cut), &Split::solo(&config), &root.path().join("back"));
    assert!(read_all(&back) == read_all(&whole));
    for spec in decoder_specs(&config).iter().filter(|spec| spec.shape.len() == 2) {
        let of = |checkpoint: &Checkpoint| checkpoints::cells(&checkpoint.weight(spec, 2, 1).unwrap());
        assert_eq!(bits(&of(&open(&whole))), bits(&of(&random)), "{}", spec.name);
        assert_eq!(bits(&of(&open(&cut))), bits(&of(&random)), "{}", spec.name);
    }
}

#[test]
fn types_and_context_change_as_asked() {
    let source = open(&fixture_dir("gpt2"));
    let root = tempfile::tempdir().unwrap();
    let split = Split::solo(source.config());
    let asked = ExportRequest {
        dtype: Some(DType::BF16),
        max_seq_len: Some(24),
        ..request(&source, &split, root.path())
    };
    let exported = asked.write(&mut keep_on()).unwrap();
    assert_eq!((exported.manifest.model.n_ctx, exported.manifest.model.weight_dtype), (24, DType::BF16));
    assert_eq!(exported.manifest.golden.prompt_ids.len(), 24);
    let checkpoint = open(root.path());
    for spec in decoder_specs(checkpoint.config()).iter().filter(|spec| spec.shape.len() == 2) {
        let mut of_source = spec.clone();
        if spec.name == "embed.positions.weight" {
            of_source.shape[0] = source.config().n_ctx;
        }
        let rounded = checkpoints::cells(&source.weight(&of_source, 1, 0).unwrap());
        let rounded: Vec<f32> = rounded.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
        let found = checkpoints::cells(&checkpoint.weight(spec, 1, 0).unwrap());
        assert_eq!(bits(&found), bits(&rounded[..found.len()]), "{}", spec.name);
    }
    let refused = ExportRequest { max_seq_len: Some(4096), ..asked }.outline().unwrap_err();
    assert!(refused.to_string().contains("knows"), "{refused}");
}

#[test]
fn splits_that_cannot_be_are_refused_before_anything_is_written() {
    let source = open(&fixture_dir("gpt2"));
    let root = tempfile::tempdir().unwrap();
    let n_layers = source.config().n_layers;
    for split in [
        Split { tp: 5, stages: vec![n_layers] },
        Split { tp: 1, stages: vec![n_layers + 1] },
        Split { tp: 1, stages: vec![n_layers, 0] },
        Split { tp: 0, stages: vec![n_layers] },
        Split { tp: 1, stages: Vec::new() },
    ] {
        let out = root.path().join("out");
        let error = request(&source, &split, &out).write(&mut keep_on()).unwrap_err();
        assert!(error.to_string().starts_with("the model cannot be cut so: "), "{error}");
        assert!(!out.exists());
    }
}
