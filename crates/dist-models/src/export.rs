//! Writes checkpoints of our own: one directory that knows no degree, or a directory a rank. The source is read once,
//! in pieces, whatever its size; nothing is seen at the target before all of it is there.

pub(crate) mod cast;
mod copy;
mod error;
pub mod probe;
mod target;
mod tokenizer;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::Builder;

use dist_core::{DType, ModelConfig, Rank, TensorSpec, decoder_specs};

use crate::checkpoint::{Checkpoint, own};
use crate::manifest::layout::{self, FileLayout};
use crate::manifest::{self, Golden, Manifest, PartRow, Place, RankManifest, Split, TensorRow};
use copy::{Copied, Job, PieceBytes};
pub use error::ExportError;
use target::Target;
pub(crate) use tokenizer::FILES as TOKENIZER_FILES;

/// What to write, and where.
#[derive(Clone, Copy, Debug)]
pub struct ExportRequest<'a> {
    /// The model: of Hugging Face, random, exported or sharded.
    pub source: &'a Checkpoint,
    /// Type of all tensors; `None` keeps each as it is.
    pub dtype: Option<DType>,
    /// Positions to keep; `None` keeps all.
    pub max_seq_len: Option<usize>,
    /// How to cut it.
    pub split: &'a Split,
    /// The directory: the checkpoint itself where nothing is cut, else what holds [`Split::dir_name`].
    pub out: &'a Path,
    /// Whether a checkpoint of ours that is there already is replaced.
    pub overwrite: bool,
    /// Threads that compute the golden log-probabilities.
    pub threads: usize,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of tensors read so far.
    pub done_bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

/// Hears how far it is, and may say to stop.
pub type Watch<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Exported {
    /// The directory that holds manifest.json.
    pub dir: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Bytes of each rank's file of weights.
    pub rank_bytes: Vec<u64>,
}

/// The model and its tensors as they will be.
#[derive(Clone, Debug)]
pub struct Outline {
    /// The model.
    pub model: ModelConfig,
    /// Its tensors, each with the type that it will have.
    pub specs: Vec<TensorSpec>,
    /// The files, in order of ranks.
    pub files: Vec<FileLayout>,
}

impl ExportRequest<'_> {
    /// The directory that will hold manifest.json.
    pub fn dir(&self) -> PathBuf {
        if self.split.is_solo() { self.out.to_owned() } else { self.out.join(self.split.dir_name()) }
    }

    /// What would be written: calculated, nothing is read but headers.
    pub fn outline(&self) -> Result<Outline, ExportError> {
        let mut model = self.source.config().clone();
        if let Some(n) = self.max_seq_len {
            if n > model.n_ctx {
                return Err(ExportError::TooLong { asked: n, n_ctx: model.n_ctx });
            }
            model.n_ctx = n;
        }
        model.weight_dtype = self.dtype.unwrap_or(model.weight_dtype);
        self.split.check(&model)?;
        let mut specs = decoder_specs(&model);
        for (spec, source) in specs.iter_mut().zip(decoder_specs(self.source.config())) {
            spec.dtype = match self.dtype {
                Some(dtype) => dtype,
                None => self.source.dtype(&source)?,
            };
        }
        let files = layout::files(&model, &specs, self.split);
        Ok(Outline { model, specs, files })
    }

    /// Writes it. A run that fails or is killed leaves what was at the target as it was.
    pub fn write(&self, watch: Watch<'_>) -> Result<Exported, ExportError> {
        let outline = self.outline()?;
        let n_bytes = outline.files.iter().map(|file| file.length).sum();
        let target = Target::begin(&self.dir(), self.overwrite, n_bytes)?;
        let paths = weight_paths(target.dir(), self.split);
        for path in &paths {
            target.create_parent(path)?;
        }
        let jobs = self.jobs(&outline)?;
        let order = copy::Order {
            source: self.source,
            jobs: &jobs,
            split: self.split,
            files: &outline.files,
            paths: &paths,
            piece_bytes: PieceBytes::USUAL,
        };
        let copied = copy::run(&order, watch, Builder::new)?;
        let tokenizer = tokenizer::write(self.source, &target)?;
        let mut manifest = Manifest {
            schema_version: manifest::SCHEMA_VERSION,
            split: (!self.split.is_solo()).then(|| self.split.clone()),
            tensors: self.rows(&outline, &copied)?,
            golden: Golden { prompt_ids: manifest::probe_prompt(&outline.model), logprobs: Vec::new() },
            tokenizer,
            checksum: String::new(),
            model: outline.model,
        };
        manifest.golden = self.golden(target.dir(), &manifest, &jobs)?;
        let file = target.dir().join(manifest::FILE).display().to_string();
        manifest.check(&file)?;
        for rank in rank_manifests(&manifest, &outline.files, &copied) {
            let path = Path::new(&manifest::rank_dir(Rank(rank.rank))).join(manifest::FILE);
            target.write(&path, &rank.to_json())?;
        }
        let json = manifest.to_json();
        // Read again as a reader will, so that what is written can be.
        let manifest = Manifest::parse(&file, &json)?;
        target.write(Path::new(manifest::FILE), &json)?;
        let dir = target.commit()?;
        Ok(Exported { dir, manifest, rank_bytes: outline.files.iter().map(|file| file.length).collect() })
    }

    fn jobs(&self, outline: &Outline) -> Result<Vec<Job>, ExportError> {
        let rows = self.source.manifest().map(|manifest| &manifest.tensors);
        let sources = decoder_specs(self.source.config());
        let jobs = sources.into_iter().zip(&outline.specs).enumerate().map(|(i, (source, target))| {
            let from = self.source.dtype(&source)?;
            Ok(Job {
                from,
                is_transposed: self.source.is_transposed(&source)?,
                // Of a tensor that is cut short, the hash of the whole says nothing.
                expected: rows.filter(|_| source.shape == target.shape).map(|rows| rows[i].sha256),
                source,
                target: target.clone(),
            })
        });
        jobs.collect()
    }

    fn rows(&self, outline: &Outline, copied: &Copied) -> Result<Vec<TensorRow>, ExportError> {
        let sources = decoder_specs(self.source.config());
        let place = |i: usize| {
            let slot = &outline.files[0].slots[i];
            Place { file: manifest::WEIGHTS.to_owned(), offset: slot.offset, length: slot.length }
        };
        let rows = outline.specs.iter().zip(&sources).enumerate().map(|(i, (spec, source))| {
            Ok(TensorRow {
                name: spec.name.clone(),
                dtype: spec.dtype,
                shape: spec.shape.clone(),
                sha256: copied.whole[i],
                origin: self.source.origin(source)?,
                place: self.split.is_solo().then(|| place(i)),
            })
        });
        rows.collect()
    }

    /// What the source has said already where nothing changed; else what is written is asked, a layer at a time.
    fn golden(&self, dir: &Path, manifest: &Manifest, jobs: &[Job]) -> Result<Golden, ExportError> {
        let is_same = jobs.iter().all(|job| job.from == job.target.dtype);
        if let Some(golden) = self.source.golden().filter(|_| is_same) {
            // What follows a token has no part in it.
            let n = golden.prompt_ids.len().min(manifest.model.n_ctx);
            let (prompt_ids, logprobs) = (&golden.prompt_ids[..n], &golden.logprobs[..n - 1]);
            return Ok(Golden { prompt_ids: prompt_ids.to_vec(), logprobs: logprobs.to_vec() });
        }
        let shared = Arc::new(manifest.clone());
        let open = || own::assemble(dir, Arc::clone(&shared), own::Reading::WRITTEN);
        let prompt_ids = &manifest.golden.prompt_ids;
        let logprobs = probe::logprobs_of(&manifest.model, &open, prompt_ids, self.threads)?;
        if let Some(found) = logprobs.iter().find(|logprob| !logprob.is_finite()) {
            return Err(ExportError::NotFinite { found: *found });
        }
        Ok(Golden { logprobs, ..manifest.golden.clone() })
    }
}

/// The files of weights below `dir`, in order of ranks.
fn weight_paths(dir: &Path, split: &Split) -> Vec<PathBuf> {
    if split.is_solo() {
        return vec![dir.join(manifest::WEIGHTS)];
    }
    let ranks = (0..split.mesh().world_size()).map(Rank);
    ranks.map(|rank| dir.join(manifest::rank_dir(rank)).join(manifest::WEIGHTS)).collect()
}

fn rank_manifests(manifest: &Manifest, files: &[FileLayout], copied: &Copied) -> Vec<RankManifest> {
    let Some(split) = &manifest.split else { return Vec::new() };
    let identity = manifest.identity();
    let ranks = files.iter().zip(&copied.parts).enumerate();
    let manifests = ranks.map(|(rank, (layout, digests))| RankManifest {
        schema_version: manifest::SCHEMA_VERSION,
        rank,
        split: split.clone(),
        identity,
        tensors: layout
            .slots
            .iter()
            .zip(digests)
            .map(|(slot, &sha256)| PartRow {
                name: slot.name.clone(),
                dtype: slot.dtype,
                shape: slot.shape.clone(),
                place: Place { file: manifest::WEIGHTS.to_owned(), offset: slot.offset, length: slot.length },
                sha256,
            })
            .collect(),
        checksum: String::new(),
    });
    manifests.collect()
}
