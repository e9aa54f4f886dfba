//! Where a checkpoint is written: one run at a time, what a killed one left is cleared away, mixed types stay as they
//! are.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/checkpoints.rs"]
#[allow(dead_code, reason = "support is shared; no test needs all of it")]
mod checkpoints;

use std::fs::{self, File};

use checkpoints::{export, fixture_dir, keep_on, open, read_all, request};
use dist_core::{DType, decoder_specs};
use dist_models::checkpoint::Checkpoint;
use dist_models::export::{ExportError, ExportRequest};
use dist_models::manifest::Split;
use rustix::fs::{FlockOperation, flock};

#[test]
fn two_runs_do_not_write_the_same_target() {
    let root = tempfile::tempdir().unwrap();
    let source = open(&fixture_dir("gpt2"));
    let (split, out) = (Split::solo(source.config()), root.path().join("o"));
    let partial = root.path().join(".o.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("theirs"), "half").unwrap();
    let other = File::open(&partial).unwrap();
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    let told = request(&source, &split, &out).write(&mut keep_on()).unwrap_err();
    assert!(matches!(told, ExportError::Busy { .. }), "{told}");
    assert_eq!(fs::read(partial.join("theirs")).unwrap(), b"half", "it is theirs");
    // Once they are gone, what they left is nobody's.
    drop(other);
    export(&source, &split, &out);
    assert!(!partial.exists());
    assert!(!read_all(&out).contains_key("theirs"));
}

#[test]
fn a_target_that_cannot_be_is_refused_and_nothing_is_left() {
    let root = tempfile::tempdir().unwrap();
    let source = open(&fixture_dir("gpt2"));
    let split = Split::solo(source.config());
    fs::write(root.path().join("file"), "a").unwrap();
    let below_a_file = root.path().join("file/o");
    let told = request(&source, &split, &below_a_file).write(&mut keep_on()).unwrap_err();
    assert!(matches!(told, ExportError::Write { .. }), "{told}");
    let told = request(&source, &split, &root.path().join("file")).write(&mut keep_on()).unwrap_err();
    assert!(matches!(told, ExportError::Foreign { .. }), "{told}");
    assert_eq!(read_all(root.path()).len(), 1);
}

#[test]
fn a_damaged_source_is_noticed_while_it_is_copied() {
    let root = tempfile::tempdir().unwrap();
    let source = open(&fixture_dir("gpt2"));
    let split = Split::even(source.config(), 2, 1);
    let dir = export(&source, &split, &root.path().join("cut"));
    let file = dir.join("rank_1/weights.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    fs::write(&file, bytes).unwrap();
    for dtype in [None, Some(DType::BF16)] {
        let out = root.path().join("out");
        let damaged = open(&dir);
        let solo = Split::solo(source.config());
        let asked = ExportRequest { dtype, ..request(&damaged, &solo, &out) };
        let told = asked.write(&mut keep_on()).unwrap_err();
        assert!(matches!(told, ExportError::Source { .. }), "{told}");
        assert!(!out.exists());
    }
}

#[test]
fn values_that_a_type_cannot_hold_are_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    fs::create_dir(&dir).unwrap();
    fs::copy(fixture_dir("gpt2").join("config.json"), dir.join("config.json")).unwrap();
    let mut bytes = fs::read(fixture_dir("gpt2").join("model.safetensors")).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&1e6_f32.to_le_bytes());
    fs::write(dir.join("model.safetensors"), bytes).unwrap();
    let source = open(&dir);
    let (split, out) = (Split::solo(source.config()), root.path().join("o"));
    let asked = ExportRequest { dtype: Some(DType::F16), ..request(&source, &split, &out) };
    let told = asked.write(&mut keep_on()).unwrap_err();
    assert!(told.to_string().ends_with("has 1000000, which f16 cannot hold"), "{told}");
}

/// Matrices in bf16 and vectors in f32, an odd number of the former: each keeps its type, and all are aligned.
#[test]
fn mixed_types_stay_as_they_are() {
    let root = tempfile::tempdir().unwrap();
    let mut config = open(&fixture_dir("gpt2")).config().clone();
    (config.n_vocab, config.d_model, config.d_embed, config.d_ff) = (383, 15, 15, 21);
    (config.n_heads, config.n_kv_heads, config.d_head, config.n_ctx) = (3, 3, 5, 33);
    let whole =
        export(&Checkpoint::random(config.clone(), 5), &Split::solo(&config), &root.path().join("f32"));
    let halved = root.path().join("mixed");
    let mixed = checkpoints::with_halved_matrices(&open(&whole), &halved);
    for split in checkpoints::splits(&config) {
        let dir = export(&mixed, &split, &root.path().join(format!("{}-{}", split.tp, split.pp())));
        let cut = open(&dir);
        for row in &cut.manifest().unwrap().tensors {
            let expected = if row.shape.len() == 2 { DType::BF16 } else { DType::F32 };
            assert_eq!(row.dtype, expected, "{}", row.name);
        }
        for layout in cut.manifest().unwrap().files() {
            assert!(layout.slots.iter().all(|slot| slot.offset % slot.dtype.bytes() as u64 == 0));
        }
        for spec in decoder_specs(&config).iter().filter(|spec| spec.shape.len() == 2) {
            for rank in 0..2 {
                let of = |checkpoint: &Checkpoint| {
                    let cells = checkpoints::cells(&checkpoint.weight(spec, 2, rank).unwrap());
                    cells.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                assert_eq!(of(&cut), of(&mixed), "{} of {split}", spec.name);
            }
        }
    }
}
