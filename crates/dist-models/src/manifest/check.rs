//! What a manifest must be before anything else looks at it. Every difference is found, the first twenty are told.

use std::path::{Component, Path};

use dist_core::{Rank, decoder_specs};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::layout::FileLayout;
use super::{
    Digest, Golden, MAX_PARTS, Manifest, Place, RankManifest, SCHEMA_VERSION, Split, TensorRow, WEIGHTS,
};
use crate::checkpoint::{CheckpointError, Findings};
use crate::export::TOKENIZER_FILES;

/// Bound on the files of a tokenizer together with the golden prompt; neither is ever long.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
const MAX_PROMPT: usize = 4096;

/// Parses a manifest of this version; another version is told as such, whatever else it has.
pub(super) fn json<T: DeserializeOwned>(file: &str, json: &[u8]) -> Result<T, CheckpointError> {
    let told = |error: serde_json::Error| CheckpointError::Json {
        file: file.to_owned(),
        message: crate::checkpoint::clip(&error.to_string()),
    };
    serde_json::from_slice(json).map_err(|error| {
        let version = serde_json::from_slice::<Value>(json).ok().and_then(|value| {
            value.get("schema_version").filter(|version| **version != SCHEMA_VERSION).cloned()
        });
        let Some(version) = version else { return told(error) };
        let mut findings = Findings::default();
        findings.add("schema_version", SCHEMA_VERSION.to_string(), version.to_string());
        CheckpointError::Manifest { file: file.to_owned(), findings }
    })
}

/// A byte of the manifest itself may have changed.
pub(super) fn checksum(file: &str, said: &str, found: &str) -> Result<(), CheckpointError> {
    let mut findings = Findings::default();
    if said != found {
        findings.add("checksum", said, found);
    }
    CheckpointError::of_manifest(file, findings)
}

fn version(found: u32, findings: &mut Findings) {
    if found != SCHEMA_VERSION {
        findings.add("schema_version", SCHEMA_VERSION.to_string(), found.to_string());
    }
}

/// Nothing is calculated from a model or a split that cannot be.
pub(super) fn manifest(manifest: &Manifest, findings: &mut Findings) {
    version(manifest.schema_version, findings);
    let Manifest { model, split, tensors, golden: probe, tokenizer, .. } = manifest;
    let solo = Split { tp: 1, stages: vec![model.n_layers] };
    if let Err(error) = split.as_ref().unwrap_or(&solo).check(model) {
        findings.add("model, split", "a model that can be cut so", error.to_string());
        return;
    }
    let tp = split.as_ref().map_or(1, |split| split.tp);
    if tensors.len().saturating_mul(tp) > MAX_PARTS {
        let found = format!("{} tensors × {tp} ranks", tensors.len());
        findings.add("tensors", format!("at most {MAX_PARTS} cuts"), found);
        return;
    }
    let n_before = findings.len();
    tensor_rows(manifest, findings);
    if findings.len() == n_before {
        places(manifest, findings);
    }
    golden(probe, manifest, findings);
    let mut seen = Vec::new();
    for row in tokenizer {
        let is_known = TOKENIZER_FILES.contains(&row.file.as_str());
        if !is_known || seen.contains(&&row.file) {
            findings.add(&row.file, "a file of the tokenizer, each once", "another");
        }
        if row.length > MAX_TOKENIZER_BYTES {
            findings.add(
                &row.file,
                format!("at most {MAX_TOKENIZER_BYTES} bytes"),
                format!("{} bytes", row.length),
            );
        }
        seen.push(&row.file);
    }
}

fn tensor_rows(manifest: &Manifest, findings: &mut Findings) {
    let specs = decoder_specs(&manifest.model);
    for (spec, row) in specs.iter().zip(&manifest.tensors) {
        if row.name != spec.name {
            findings.add(&row.name, format!("{} in its place", spec.name), "another tensor");
            return;
        }
        if row.shape != spec.shape {
            findings.add(&row.name, format!("shape {:?}", spec.shape), format!("{:?}", row.shape));
        }
        if !row.dtype.is_float() {
            findings.add(&row.name, "type f32, f16 or bf16", row.dtype.name());
        }
    }
    if specs.len() != manifest.tensors.len() {
        let (expected, found) = (specs.len(), manifest.tensors.len());
        findings.add("tensors", format!("{expected} of this model"), found.to_string());
    }
}

fn places(manifest: &Manifest, findings: &mut Findings) {
    if manifest.split.is_some() {
        for TensorRow { name, .. } in manifest.tensors.iter().filter(|row| row.place.is_some()) {
            findings.add(name, "a place in the ranks' manifests", "one here");
        }
        return;
    }
    let files = manifest.files();
    for (slot, row) in files[0].slots.iter().zip(&manifest.tensors) {
        match &row.place {
            Some(found) => place(&row.name, found, (slot.offset, slot.length), findings),
            None => findings.add(&row.name, "a place", "none"),
        }
    }
}

fn place(name: &str, found: &Place, (offset, length): (u64, u64), findings: &mut Findings) {
    if found.file != WEIGHTS {
        let mut parts = Path::new(&found.file).components();
        let is_name = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        let what = if is_name { "another file" } else { "a path that leads elsewhere" };
        findings.add(name, format!("a place in {WEIGHTS}"), what);
    }
    if (found.offset, found.length) != (offset, length) {
        let bytes = |offset: u64, length: u64| format!("{length} bytes from byte {offset} on");
        findings.add(name, bytes(offset, length), bytes(found.offset, found.length));
    }
}

fn golden(golden: &Golden, manifest: &Manifest, findings: &mut Findings) {
    let Golden { prompt_ids, logprobs } = golden;
    let model = &manifest.model;
    let len = prompt_ids.len();
    if !(1..=MAX_PROMPT.min(model.n_ctx)).contains(&len) || logprobs.len() != len - 1 {
        let found = format!("{len} ids, {} log-probabilities", logprobs.len());
        findings.add("golden", "a prompt within the context, a log-probability for each id but one", found);
    }
    if let Some(id) = prompt_ids.iter().find(|id| **id as usize >= model.n_vocab) {
        findings.add("golden.prompt_ids", format!("ids below {}", model.n_vocab), id.to_string());
    }
    // Rounding may leave a probability a little above one.
    if let Some(logprob) = logprobs.iter().find(|logprob| !logprob.is_finite() || **logprob > 1e-3) {
        findings.add("golden.logprobs", "logarithms of probabilities", logprob.to_string());
    }
}

pub(super) fn rank(
    found: &RankManifest,
    (whole, identity): (&Manifest, Digest),
    rank: Rank,
    layout: &FileLayout,
    findings: &mut Findings,
) {
    version(found.schema_version, findings);
    let expected = whole.split.as_ref();
    if expected != Some(&found.split) || found.rank != rank.0 {
        let of = |rank: usize, split: &Split| format!("rank {rank} of {}", clipped(split));
        let expected = expected.map_or_else(|| "no shard".to_owned(), |split| of(rank.0, split));
        findings.add("shard", expected, of(found.rank, &found.split));
        return;
    }
    if found.identity != identity {
        findings.add("identity", identity.to_string(), format!("{} (another model's shard)", found.identity));
        return;
    }
    for (slot, row) in layout.slots.iter().zip(&found.tensors) {
        if row.name != slot.name {
            findings.add(&row.name, format!("{} in its place", slot.name), "another tensor");
            return;
        }
        if (row.dtype, &row.shape) != (slot.dtype, &slot.shape) {
            let told = |dtype, shape: &[usize]| format!("{dtype} {shape:?}");
            findings.add(&row.name, told(slot.dtype, &slot.shape), told(row.dtype, &row.shape));
        }
        place(&row.name, &row.place, (slot.offset, slot.length), findings);
    }
    if layout.slots.len() != found.tensors.len() {
        let (expected, found) = (layout.slots.len(), found.tensors.len());
        findings.add("tensors", format!("{expected} of this rank"), found.to_string());
    }
}

/// A stranger's list of stages may be long.
fn clipped(split: &Split) -> String {
    crate::checkpoint::clip(&split.to_string())
}
