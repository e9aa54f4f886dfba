//! What was written, what would be, what was compared.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use dist_models::export::Exported;
use dist_models::manifest::{Split, rank_dir};
use dist_models::shard::{RankListing, Verified};
use serde::Serialize;

use crate::machine::gigabytes;

const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct ExportedObject<'a> {
    schema_version: u32,
    dir: String,
    model: &'a str,
    split: &'a Option<Split>,
    identity: String,
    n_tensors: usize,
    bytes: u64,
    ranks: Vec<RankObject>,
    golden_logprobs: &'a [f32],
    seconds: f64,
}

#[derive(Serialize)]
struct RankObject {
    rank: usize,
    bytes: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tensors: Vec<TensorObject>,
}

#[derive(Serialize)]
struct TensorObject {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: u64,
}

#[derive(Serialize)]
struct ListingObject<'a> {
    schema_version: u32,
    split: &'a Split,
    bytes: u64,
    ranks: Vec<RankObject>,
}

#[derive(Serialize)]
struct VerifiedObject {
    schema_version: u32,
    dir: String,
    files: usize,
    tensors: usize,
    bytes: u64,
    seconds: f64,
}

fn json(object: &impl Serialize) -> serde_json::Result<String> {
    Ok(serde_json::to_string(object)? + "\n")
}

/// What was written, as one object.
pub fn exported_json(exported: &Exported, took: Duration) -> serde_json::Result<String> {
    let ranks = exported.rank_bytes.iter().enumerate();
    let ranks = ranks.map(|(rank, &bytes)| RankObject { rank, bytes, tensors: Vec::new() });
    json(&ExportedObject {
        schema_version: SCHEMA_VERSION,
        dir: exported.dir.display().to_string(),
        model: &exported.manifest.model.name,
        split: &exported.manifest.split,
        identity: exported.manifest.identity().to_string(),
        n_tensors: exported.manifest.tensors.len(),
        bytes: exported.rank_bytes.iter().sum(),
        ranks: ranks.collect(),
        golden_logprobs: &exported.manifest.golden.logprobs,
        seconds: took.as_secs_f64(),
    })
}

/// What was written, for people.
pub fn exported_text(exported: &Exported) -> String {
    let (manifest, mut out) = (&exported.manifest, String::new());
    let bytes = gigabytes(exported.rank_bytes.iter().sum());
    let _ = writeln!(out, "{}: {} tensors, {bytes}", exported.dir.display(), manifest.tensors.len());
    if let Some(split) = &manifest.split {
        let _ = writeln!(out, "  {split}");
        for (rank, &bytes) in exported.rank_bytes.iter().enumerate() {
            let _ = writeln!(out, "  rank {rank}: {}", gigabytes(bytes));
        }
    }
    out
}

/// What each rank would hold, as one object.
pub fn listing_json(split: &Split, ranks: &[RankListing]) -> serde_json::Result<String> {
    let tensors = |rank: &RankListing| {
        let tensors = rank.tensors.iter().map(|tensor| TensorObject {
            name: tensor.name.clone(),
            dtype: tensor.dtype.name(),
            shape: tensor.shape.clone(),
            bytes: tensor.n_bytes,
        });
        tensors.collect()
    };
    let objects =
        ranks.iter().map(|rank| RankObject { rank: rank.rank, bytes: rank.n_bytes, tensors: tensors(rank) });
    json(&ListingObject {
        schema_version: SCHEMA_VERSION,
        split,
        bytes: ranks.iter().map(|rank| rank.n_bytes).sum(),
        ranks: objects.collect(),
    })
}

/// What each rank would hold, for people.
pub fn listing_text(split: &Split, ranks: &[RankListing]) -> String {
    let mut out = String::new();
    let total: u64 = ranks.iter().map(|rank| rank.n_bytes).sum();
    let _ = writeln!(out, "{split}: {total} bytes");
    let width = ranks.iter().flat_map(|rank| &rank.tensors).map(|tensor| tensor.name.len()).max();
    for RankListing { rank, n_bytes, tensors } in ranks {
        let dir =
            if ranks.len() > 1 { format!(" ({})", rank_dir(dist_core::Rank(*rank))) } else { String::new() };
        let _ = writeln!(out, "rank {rank}{dir}: {n_bytes} bytes, {} tensors", tensors.len());
        for tensor in tensors {
            let _ = writeln!(
                out,
                "  {:<width$}  {:<4}  {:>12}  {:?}",
                tensor.name,
                tensor.dtype.name(),
                tensor.n_bytes,
                tensor.shape,
                width = width.unwrap_or(0)
            );
        }
    }
    out
}

/// What was compared, as one object.
pub fn verified_json(dir: &Path, verified: &Verified, took: Duration) -> serde_json::Result<String> {
    json(&VerifiedObject {
        schema_version: SCHEMA_VERSION,
        dir: dir.display().to_string(),
        files: verified.n_files,
        tensors: verified.n_tensors,
        bytes: verified.n_bytes,
        seconds: took.as_secs_f64(),
    })
}

/// What was compared, for people.
pub fn verified_text(dir: &Path, verified: &Verified) -> String {
    let Verified { n_files, n_tensors, n_bytes } = *verified;
    let files = if n_files == 1 { "1 file".to_owned() } else { format!("{n_files} files") };
    format!("{}: {n_tensors} tensors in {files} are as written, {}\n", dir.display(), gigabytes(n_bytes))
}
