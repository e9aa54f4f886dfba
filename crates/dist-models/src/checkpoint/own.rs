//! Opens directories of our own, exported or sharded: the manifest says what is there, and each file is looked at
//! when a tensor of it is needed, so that a rank touches no other rank's file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use dist_core::plan::TOKEN_TABLE;
use dist_core::{Rank, TensorSpec};
use dist_kernels::weight::Layout;
use sha2::{Digest as _, Sha256};

use super::directory::read_bounded;
use super::error::{CheckpointError, Findings, clip};
use super::stored::{Entry, Seal, Source, Stored, TensorFile};
use super::{Checkpoint, OpenOptions, TokenizerFrom, Weights};
use crate::manifest::layout::Slot;
use crate::manifest::{self, Digest, Manifest, RankManifest, Split};

/// How a file's length is looked at without opening it.
fn length(path: &Path) -> Result<u64, CheckpointError> {
    let metadata = std::fs::metadata(path);
    metadata
        .map(|found| found.len())
        .map_err(|source| CheckpointError::Read { path: path.to_owned(), source })
}

/// Opens a directory that has a manifest.
pub(super) fn open(dir: &Path, options: OpenOptions) -> Result<Checkpoint, CheckpointError> {
    let path = dir.join(manifest::FILE);
    let (file, json) = (path.display().to_string(), read_bounded(&path, manifest::MAX_BYTES)?);
    let manifest = Manifest::parse(&file, &json).map_err(|error| {
        let is_part = manifest::is_of_rank(&json);
        if is_part { CheckpointError::OneRank { dir: dir.to_owned() } } else { error }
    })?;
    check_files(dir, &manifest)?;
    check_tokenizer(dir, &manifest)?;
    Ok(assemble(dir, Arc::new(manifest), Reading { mmap: options.mmap, compares: true }))
}

/// The only sharded directory below `dir`, if there is one.
pub(super) fn sharded_below(dir: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_sharded =
        |name: &String| name.starts_with("inference_model_") && dir.join(name).join(manifest::FILE).exists();
    let mut found: Vec<String> = names.filter(is_sharded).collect();
    found.sort_unstable();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(dir.join(one))),
        _ => Err(CheckpointError::Several { dir: dir.to_owned(), found }),
    }
}

/// The files of weights, in order of ranks.
pub(crate) fn paths(dir: &Path, manifest: &Manifest) -> Vec<PathBuf> {
    match &manifest.split {
        None => vec![dir.join(manifest::WEIGHTS)],
        Some(split) => (0..split.mesh().world_size())
            .map(|rank| dir.join(manifest::rank_dir(Rank(rank))).join(manifest::WEIGHTS))
            .collect(),
    }
}

/// Every file must be there and of its length; all that are not, at once. Ranks on several machines may each have
/// their own directory only, so that one that is wholly absent is told when it is needed, unless all are.
fn check_files(dir: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let mut findings = Findings::default();
    let (mut absent, mut n_there) = (Vec::new(), 0);
    for (path, layout) in paths(dir, manifest).iter().zip(manifest.files()) {
        let rank_dir = path.parent().filter(|_| manifest.split.is_some());
        if let Some(rank_dir) = rank_dir.filter(|rank_dir| !rank_dir.exists()) {
            absent.push(relative(dir, rank_dir));
            continue;
        }
        n_there += 1;
        let name = relative(dir, path);
        match length(path) {
            Ok(found) if found == layout.length => {}
            Ok(found) => match rank_dir.and_then(|rank_dir| foreign(rank_dir, manifest)) {
                // A shard of another plan explains the length.
                Some((expected, found)) => {
                    findings.add(relative(dir, rank_dir.unwrap_or(dir)), expected, found);
                }
                None => findings.add(name, format!("{} bytes", layout.length), format!("{found} bytes")),
            },
            Err(_) => findings.add(name, format!("{} bytes", layout.length), "no such file"),
        }
    }
    if n_there == 0 {
        for name in absent {
            findings.add(name, "a rank's directory", "no such directory");
        }
    }
    if findings.is_empty() { Ok(()) } else { Err(CheckpointError::Parts { dir: dir.to_owned(), findings }) }
}

/// What a rank's directory must be and is, where it is of another split.
fn foreign(rank_dir: &Path, manifest: &Manifest) -> Option<(String, String)> {
    let json = read_bounded(&rank_dir.join(manifest::FILE), manifest::MAX_BYTES).ok()?;
    let found = RankManifest::parse("", &json).ok()?;
    let expected = manifest.split.as_ref().filter(|split| **split != found.split)?;
    let told = |split: &Split| clip(&format!("rank {} of {split}", found.rank));
    Some((told(expected), told(&found.split)))
}

fn relative(dir: &Path, path: &Path) -> String {
    path.strip_prefix(dir).unwrap_or(path).display().to_string()
}

/// Refused where a rank's directory is needed and not there: all that are missing, at once.
pub(super) fn check_present(weights: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let Some(dir) = weights.parent().and_then(Path::parent).filter(|_| manifest.split.is_some()) else {
        return Ok(());
    };
    let mut findings = Findings::default();
    for path in paths(dir, manifest) {
        if let Some(rank_dir) = path.parent().filter(|rank_dir| !rank_dir.exists()) {
            findings.add(relative(dir, rank_dir), "a rank's directory", "no such directory");
        }
    }
    if findings.is_empty() { Ok(()) } else { Err(CheckpointError::Parts { dir: dir.to_owned(), findings }) }
}

fn check_tokenizer(dir: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    for row in &manifest.tokenizer {
        let path = dir.join(&row.file);
        let bytes = read_bounded(&path, row.length)?;
        let found = Digest(Sha256::digest(&bytes).into());
        if found != row.sha256 {
            return Err(CheckpointError::Hash {
                file: path.display().to_string(),
                what: "the file".to_owned(),
                expected: row.sha256.to_string(),
                found: found.to_string(),
            });
        }
    }
    Ok(())
}

/// The checkpoint that `manifest`, which was checked, describes; no file is looked at yet.
pub(crate) fn assemble(dir: &Path, manifest: Arc<Manifest>, reading: Reading) -> Checkpoint {
    let Reading { mmap, compares } = reading;
    let identity = manifest.identity();
    let layouts = manifest.files();
    let entries = Entries::of(&manifest, &layouts);
    let files = paths(dir, &manifest).into_iter().zip(layouts).enumerate().map(|(rank, (path, layout))| {
        let (whole, rank) = (Arc::clone(&manifest), Rank(rank));
        TensorFile::lazy(path, Seal { whole, identity, rank, layout, mmap, compares })
    });
    let stored = Stored {
        name: manifest.model.name.clone(),
        files: files.collect(),
        entries: entries.all,
        head_table: entries.head_table,
        n_bytes: manifest.specs().iter().map(|spec| spec.n_bytes() as u64).sum(),
        hashing: Mutex::default(),
    };
    let has_tokenizer = !manifest.tokenizer.is_empty();
    Checkpoint {
        config: manifest.model.clone(),
        weights: Weights::Stored(Box::new(stored)),
        tokenizer: if has_tokenizer {
            TokenizerFrom::Directory(dir.to_owned())
        } else {
            TokenizerFrom::Nowhere
        },
        manifest: Some(manifest),
    }
}

/// What verification asks of the files, in order of ranks.
impl Checkpoint {
    fn file(&self, file: usize) -> &TensorFile {
        let Weights::Stored(stored) = &self.weights else { panic!("random weights have no files") };
        &stored.files[file]
    }

    /// A file's name within the directory.
    pub(crate) fn file_name(&self, file: usize) -> String {
        let path = self.file(file).path();
        let is_sharded = self.manifest.as_ref().is_some_and(|manifest| manifest.split.is_some());
        let dir = path.ancestors().nth(if is_sharded { 2 } else { 1 });
        relative(dir.unwrap_or(path), path)
    }

    /// Opens a file and compares its length, its header and its rank's manifest.
    pub(crate) fn open_file(&self, file: usize) -> Result<(), CheckpointError> {
        self.file(file).storage().map(|_| ())
    }

    /// Fills `out` with the bytes of a file from `at` on.
    pub(crate) fn read_file(&self, file: usize, at: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        self.file(file).read_at(at, out)
    }

    /// Whether `found` is the hash of what a file holds of a tensor.
    pub(crate) fn expect_part(&self, file: usize, name: &str, found: Digest) -> Result<(), CheckpointError> {
        self.file(file).expect(name, found)
    }

    /// Whether `found` is the hash of a whole tensor.
    pub(crate) fn expect_whole(&self, tensor: usize, found: Digest) -> Result<(), CheckpointError> {
        let Some(row) = self.manifest.as_ref().map(|manifest| &manifest.tensors[tensor]) else {
            return Ok(());
        };
        if row.sha256 == found {
            return Ok(());
        }
        Err(CheckpointError::Hash {
            file: manifest::FILE.to_owned(),
            what: row.name.clone(),
            expected: row.sha256.to_string(),
            found: found.to_string(),
        })
    }
}

/// How files of our own are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    /// Whether they are mapped.
    pub(crate) mmap: bool,
    /// Whether tensors that are taken whole are compared to their hashes.
    pub(crate) compares: bool,
}

impl Reading {
    /// What was hashed a moment ago.
    pub(crate) const WRITTEN: Self = Self { mmap: true, compares: false };
}

/// The canonical tensors as pieces of the ranks' files.
struct Entries {
    all: HashMap<String, Entry>,
    head_table: Option<Entry>,
}

impl Entries {
    fn of(manifest: &Manifest, layouts: &[manifest::layout::FileLayout]) -> Self {
        let specs = manifest.specs();
        let split = manifest.split.clone().unwrap_or_else(|| Split::solo(&manifest.model));
        let mesh = split.mesh();
        let entry = |tensor: usize| Entry {
            sources: Vec::new(),
            layout: Layout::Nk,
            shape: specs[tensor].shape.clone(),
            tp: split.tp,
            origin: manifest.tensors[tensor].origin.clone(),
        };
        let mut found = Self { all: HashMap::new(), head_table: None };
        for (file, layout) in layouts.iter().enumerate() {
            let coord = mesh.coord(Rank(file));
            for slot in &layout.slots {
                let is_head_table = slot.name == TOKEN_TABLE && coord.pp > 0;
                let entry = if is_head_table {
                    found.head_table.get_or_insert_with(|| entry(slot.tensor))
                } else {
                    found.all.entry(slot.name.clone()).or_insert_with(|| entry(slot.tensor))
                };
                add(entry, (file, coord.tp), slot, &specs[slot.tensor]);
            }
        }
        found.all.values_mut().chain(&mut found.head_table).for_each(in_order);
        found
    }
}

/// The pieces of a canonical tensor that one rank's cut of it is made of: one a part.
fn add(entry: &mut Entry, (file, tp_rank): (usize, usize), slot: &Slot, spec: &TensorSpec) {
    let slice = spec.slice(entry.tp, tp_rank);
    let mut start = slot.offset as usize;
    for range in slice.ranges {
        let whole = |dim: usize| 0..spec.shape.get(dim).copied().unwrap_or(1);
        let (outputs, inputs) = if slice.dim == 0 { (range, whole(1)) } else { (whole(0), range) };
        let n_bytes = outputs.len() * inputs.len() * slot.dtype.bytes();
        let dtype = slot.dtype;
        let source = Source { file, dtype, start, outputs, inputs, holder: tp_rank, is_copy: false };
        start += n_bytes;
        entry.sources.push(source);
    }
}

/// Sources in order of what they hold; those that hold the same are marked but for the first.
fn in_order(entry: &mut Entry) {
    let place = |source: &Source| (source.outputs.start, source.inputs.start, source.holder);
    entry.sources.sort_by_key(place);
    let mut last: Option<(std::ops::Range<usize>, std::ops::Range<usize>)> = None;
    for source in &mut entry.sources {
        let held = (source.outputs.clone(), source.inputs.clone());
        source.is_copy = last.as_ref() == Some(&held);
        last = Some(held);
    }
}
