//! Checkpoints: a model's configuration and where each of its tensors is. Weights stay in their stored type and layout,
//! and a rank takes only its own cuts of them; no second copy is made.
//!
//! Files are untrusted: sizes are checked before memory is taken, all differences are told at once, nothing panics.

mod cache;
mod directory;
mod error;
mod family;
mod fields;
mod header;
mod map;
pub(crate) mod own;
mod random;
mod stored;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dist_core::{DType, ModelConfig, TensorSpec};
use dist_kernels::weight::{HostBytes, HostWeight};

pub use cache::{HfCache, find, is_repo_name};
pub(crate) use directory::read_bounded;
pub(crate) use error::clip;
pub use error::{CheckpointError, Finding, Findings};
pub use stored::Touched;

use crate::manifest::{Digest, Golden, Manifest, Origin};
use crate::tokenizer::{Tokenizer, TokenizerError};
use random::Random;
use stored::{Storage, Stored, TensorFile};

/// How weights are brought in.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Whether files are mapped: nothing is copied, and ranks on one machine share the pages. Truncating a mapped file
    /// kills the process; where that may happen, say no, and each rank reads its cuts into memory of its own.
    pub mmap: bool,
}

/// Where the weights come from.
enum Weights {
    Stored(Box<Stored>),
    Random(Random),
}

/// Where the tokenizer comes from.
pub(crate) enum TokenizerFrom {
    Nowhere,
    Json { file: String, bytes: Vec<u8> },
    Directory(PathBuf),
}

/// A model: its configuration, its tensors by canonical name, its tokenizer.
pub struct Checkpoint {
    config: ModelConfig,
    weights: Weights,
    tokenizer: TokenizerFrom,
    /// What an exported or sharded directory says about itself.
    manifest: Option<Arc<Manifest>>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens a directory: of Hugging Face, exported, or sharded for any mesh; `manifest.json` tells which. Headers are
    /// read and checked, weights are not touched.
    pub fn open(dir: &Path, options: &OpenOptions) -> Result<Self, CheckpointError> {
        directory::open(dir, *options)
    }

    /// A model whose files are in memory, as the embedded one. Weights are views of `safetensors`.
    pub fn from_bytes(
        name: &str,
        config_json: &[u8],
        safetensors: HostBytes,
        tokenizer_json: Option<&[u8]>,
    ) -> Result<Self, CheckpointError> {
        let file = |file: &str| format!("{name}/{file}");
        let (family, mut config) = family::read_config(&file("config.json"), name, config_json, None)?;
        let path = file("model.safetensors");
        let bytes = safetensors.as_slice();
        let file_len = bytes.len() as u64;
        let end = header::end(&path, &bytes[..bytes.len().min(8)], file_len)?;
        let raw = header::parse(&path, &bytes[8..end], file_len)?;
        let files = vec![TensorFile::new((&path).into(), Storage::Memory(safetensors))];
        let stored = Stored::resolve(&path, family, &mut config, files, &[raw])?;
        let tokenizer = tokenizer_json.map_or(TokenizerFrom::Nowhere, |bytes| TokenizerFrom::Json {
            file: file("tokenizer.json"),
            bytes: bytes.to_vec(),
        });
        Ok(Self { config, weights: Weights::Stored(Box::new(stored)), tokenizer, manifest: None })
    }

    /// A model of random weights, N(0, 0.02), for measuring: a function of seed, canonical name and global row-major
    /// element index, the same for every mesh. Norms are one and zero, biases zero. Made when they are asked for.
    pub fn random(config: ModelConfig, seed: u64) -> Self {
        let (weights, tokenizer) = (Weights::Random(Random::new(seed)), TokenizerFrom::Nowhere);
        Self { config, weights, tokenizer, manifest: None }
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The model's tokenizer, if it has one.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        let n_vocab = self.config.n_vocab;
        match &self.tokenizer {
            TokenizerFrom::Nowhere => Ok(None),
            TokenizerFrom::Json { file, bytes } => Tokenizer::from_json(file, bytes, n_vocab).map(Some),
            TokenizerFrom::Directory(dir) => Tokenizer::open(dir, n_vocab),
        }
    }

    /// What rank `tp_rank` of `tp` holds of a matrix, in the stored type and layout: views of mapped files, or memory
    /// that holds the cut alone. Parts follow each other along the outputs; empty ones are left out.
    ///
    /// Rows that pad a vocabulary ([`TensorSlice::n_padding`](dist_core::TensorSlice)) are in no file and are not made
    /// here: the last ranks get fewer rows, possibly none.
    ///
    /// In a directory of our own, a tensor that is taken whole of a file is compared to its hash first.
    ///
    /// Panics if `spec` is a vector.
    pub fn weight(
        &self,
        spec: &TensorSpec,
        tp: usize,
        tp_rank: usize,
    ) -> Result<HostWeight, CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.weight(spec, (tp, tp_rank), false),
            Weights::Random(random) => random.weight(spec, tp, tp_rank),
        }
    }

    /// As [`weight`](Self::weight), for a rank of the last stage: a tied token table is in its own file too.
    pub fn head_table(
        &self,
        spec: &TensorSpec,
        tp: usize,
        tp_rank: usize,
    ) -> Result<HostWeight, CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.weight(spec, (tp, tp_rank), true),
            Weights::Random(random) => random.weight(spec, tp, tp_rank),
        }
    }

    /// What rank `tp_rank` of `tp` holds of a bias or a norm, in f32.
    ///
    /// Panics if `spec` is a matrix.
    pub fn vector(&self, spec: &TensorSpec, tp: usize, tp_rank: usize) -> Result<Vec<f32>, CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.vector(spec, tp, tp_rank),
            Weights::Random(_) => Ok(Random::vector(spec, tp, tp_rank)),
        }
    }

    /// Bytes of all tensors in use; a tied head counts once.
    pub fn weight_bytes(&self) -> u64 {
        match &self.weights {
            Weights::Stored(stored) => stored.n_bytes(),
            Weights::Random(_) => {
                dist_core::decoder_specs(&self.config).iter().map(|spec| spec.n_bytes() as u64).sum()
            }
        }
    }

    /// What an exported or sharded directory says about itself.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_deref()
    }

    /// What the model said about a fixed prompt when it was exported.
    pub fn golden(&self) -> Option<&Golden> {
        self.manifest.as_ref().map(|manifest| &manifest.golden)
    }

    /// What tells exported checkpoints apart, the same for every split of the same export.
    pub fn identity(&self) -> Option<Digest> {
        self.manifest.as_ref().map(|manifest| manifest.identity())
    }

    /// Waits until all that was taken so far has been compared to its hashes, and names what is not as it was written.
    /// Small tensors are compared when they are taken, large ones meanwhile.
    pub fn compared(&self) -> Result<(), CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.compared(),
            Weights::Random(_) => Ok(()),
        }
    }

    /// How much of each file was read or lent out until now.
    pub fn touched(&self) -> Vec<Touched> {
        match &self.weights {
            Weights::Stored(stored) => stored.touched(),
            Weights::Random(_) => Vec::new(),
        }
    }

    /// The stored type of a tensor.
    pub(crate) fn dtype(&self, spec: &TensorSpec) -> Result<DType, CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.dtype(spec),
            Weights::Random(_) => Ok(spec.dtype),
        }
    }

    /// Whether a tensor's outputs lie across its file.
    pub(crate) fn is_transposed(&self, spec: &TensorSpec) -> Result<bool, CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.is_transposed(spec),
            Weights::Random(_) => Ok(false),
        }
    }

    /// Where a tensor's values come from.
    pub(crate) fn origin(&self, spec: &TensorSpec) -> Result<Origin, CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.origin(spec).cloned(),
            Weights::Random(random) => Ok(Origin::Random { seed: random.seed() }),
        }
    }

    /// Fills `out` with rows of the canonical `[outputs, inputs]` tensor, or elements of a vector, in its stored type.
    pub(crate) fn read_rows(
        &self,
        spec: &TensorSpec,
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        match &self.weights {
            Weights::Stored(stored) => stored.read_rows(spec, rows, out),
            Weights::Random(random) => {
                random.rows(spec, rows, out);
                Ok(())
            }
        }
    }

    pub(crate) fn tokenizer_from(&self) -> &TokenizerFrom {
        &self.tokenizer
    }
}
