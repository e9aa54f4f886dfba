//! `manifest.json`: what an exported or sharded directory says about itself. Reading one trusts nothing; writing one
//! is the last thing that an export does.
//!
//! An exported directory has one manifest and one file of weights. A sharded directory has the same manifest without
//! places, and below it a directory for each rank with its file of weights and a manifest of its own. Where a tensor
//! lies follows from model, types and split ([`layout`]), so a manifest that says otherwise is wrong.

mod check;
mod digest;
pub mod layout;

use dist_core::plan::PlanError;
use dist_core::shape::split_even;
use dist_core::{DType, Mesh, ModelConfig, Rank, TensorSpec, decoder_specs};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::checkpoint::{CheckpointError, Findings};
pub use digest::Digest;

/// Version of the manifests and of the layout of the files.
pub const SCHEMA_VERSION: u32 = 1;
/// The manifest's file.
pub const FILE: &str = "manifest.json";
/// The file of weights beside a manifest.
pub const WEIGHTS: &str = "weights.safetensors";
/// Bound on a manifest that is read; a model of 4,096 layers needs about 20 MB.
pub const MAX_BYTES: u64 = 64 << 20;
/// Tensors times tensor-parallel ranks that a manifest may speak of; a model of 96 layers for 64 ranks
/// has 75,000.
const MAX_PARTS: usize = 1 << 18;

/// How a model is cut: ranks that share each layer, and the layers of each stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Ranks that share each layer.
    pub tp: usize,
    /// Layers of each pipeline stage, first stage first.
    pub stages: Vec<usize>,
}

impl Split {
    /// One rank that holds everything.
    pub fn solo(model: &ModelConfig) -> Self {
        Self { tp: 1, stages: vec![model.n_layers] }
    }

    /// Stages as alike as can be, the first ones a layer longer where they do not divide.
    pub fn even(model: &ModelConfig, tp: usize, pp: usize) -> Self {
        Self { tp, stages: (0..pp).map(|stage| split_even(model.n_layers, pp.max(1), stage).1).collect() }
    }

    /// Stages.
    pub fn pp(&self) -> usize {
        self.stages.len()
    }

    /// The mesh of one copy of the model.
    pub fn mesh(&self) -> Mesh {
        Mesh { tp: self.tp, pp: self.pp(), dp: 1 }
    }

    /// Whether there is nothing to cut.
    pub fn is_solo(&self) -> bool {
        self.mesh().world_size() == 1
    }

    /// Whether `model` can be cut so; the error names the nearest degrees for which it can.
    pub fn check(&self, model: &ModelConfig) -> Result<(), PlanError> {
        dist_core::plan::check_split(model, self.tp, &self.stages)
    }

    /// The directory that holds the ranks.
    pub fn dir_name(&self) -> String {
        format!("inference_model_pp{}mp{}", self.pp(), self.tp)
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tp {} × pp {}, layers a stage {:?}", self.tp, self.pp(), self.stages)
    }
}

/// The directory of a rank, below the one that [`Split::dir_name`] names.
pub fn rank_dir(rank: Rank) -> String {
    format!("rank_{}", rank.0)
}

/// Where a tensor's values came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Origin {
    /// Tensors of files, stacked along the outputs if several.
    Stored {
        /// Their names there.
        tensors: Vec<String>,
        /// The files.
        files: Vec<String>,
        /// Their type there.
        dtype: DType,
        /// Whether they lay `[inputs, outputs]` there.
        transposed: bool,
    },
    /// Made from a seed.
    Random {
        /// The seed.
        seed: u64,
    },
}

/// Bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The file, in the manifest's own directory.
    pub file: String,
    /// First byte, from the beginning of the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A whole tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRow {
    /// Canonical name.
    pub name: String,
    /// Stored type.
    pub dtype: DType,
    /// Global shape, `[outputs, inputs]` row-major, or the length of a vector.
    pub shape: Vec<usize>,
    /// Of the whole tensor's bytes, in whichever files they are.
    pub sha256: Digest,
    /// Where it came from.
    pub origin: Origin,
    /// Where it is; absent in a sharded directory, whose ranks' manifests say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
}

/// A file that is copied as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRow {
    /// Its name.
    pub file: String,
    /// Its length in bytes.
    pub length: u64,
    /// Of its bytes.
    pub sha256: Digest,
}

/// What the model said about a fixed prompt when it was exported, in f32 on the CPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// The prompt.
    pub prompt_ids: Vec<u32>,
    /// Log-probabilities of `prompt_ids[1..]`.
    pub logprobs: Vec<f32>,
}

/// The manifest of an exported or a sharded directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The model.
    pub model: ModelConfig,
    /// The cut; `None` in an exported directory.
    pub split: Option<Split>,
    /// Every tensor, in canonical order.
    pub tensors: Vec<TensorRow>,
    /// What the model must say.
    pub golden: Golden,
    /// The tokenizer's files.
    pub tokenizer: Vec<FileRow>,
    /// Of this manifest with an empty checksum, as compact JSON.
    pub checksum: String,
}

/// What a rank holds of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartRow {
    /// Canonical name.
    pub name: String,
    /// Stored type.
    pub dtype: DType,
    /// Local shape; rows that pad a vocabulary are in no file.
    pub shape: Vec<usize>,
    /// Where it is.
    pub place: Place,
    /// Of its bytes.
    pub sha256: Digest,
}

/// The manifest of one rank's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankManifest {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The rank.
    pub rank: usize,
    /// The cut that it is a part of.
    pub split: Split,
    /// The [`Manifest::identity`] of the whole.
    pub identity: Digest,
    /// Its tensors, in canonical order.
    pub tensors: Vec<PartRow>,
    /// As in [`Manifest`].
    pub checksum: String,
}

/// A manifest with a checksum over itself.
trait Sealed: Serialize + Clone {
    fn checksum(&mut self) -> &mut String;

    /// The checksum of what it says now.
    fn seal(&self) -> String {
        let mut open = self.clone();
        open.checksum().clear();
        let bytes = serde_json::to_vec(&open).expect("names and finite numbers");
        Digest(Sha256::digest(bytes).into()).to_string()
    }

    fn to_sealed_json(&self) -> Vec<u8> {
        let mut sealed = self.clone();
        *sealed.checksum() = self.seal();
        let mut bytes = serde_json::to_vec_pretty(&sealed).expect("names and finite numbers");
        bytes.push(b'\n');
        bytes
    }
}

impl Sealed for Manifest {
    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl Sealed for RankManifest {
    fn checksum(&mut self) -> &mut String {
        &mut self.checksum
    }
}

impl Manifest {
    /// Reads a manifest that nobody vouches for. `file` names it in messages.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self, CheckpointError> {
        let manifest: Self = check::json(file, json)?;
        manifest.check(file)?;
        check::checksum(file, &manifest.checksum, &manifest.seal())?;
        Ok(manifest)
    }

    /// Whether everything that it says can be true of the model that it names; all that cannot, at once.
    pub fn check(&self, file: &str) -> Result<(), CheckpointError> {
        let mut findings = Findings::default();
        check::manifest(self, &mut findings);
        CheckpointError::of_manifest(file, findings)
    }

    /// The file's bytes, the checksum made anew.
    pub fn to_json(&self) -> Vec<u8> {
        self.to_sealed_json()
    }

    /// The tensors' specs in canonical order, each with its own stored type.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let mut specs = decoder_specs(&self.model);
        for (spec, row) in specs.iter_mut().zip(&self.tensors) {
            spec.dtype = row.dtype;
        }
        specs
    }

    /// What tells checkpoints apart: the model but for its name, and every whole tensor's type and hash. The same for
    /// every split of the same export.
    pub fn identity(&self) -> Digest {
        let model = ModelConfig { name: String::new(), ..self.model.clone() };
        let mut hasher = Sha256::new();
        hasher.update(serde_json::to_vec(&model).expect("names and finite numbers"));
        for row in &self.tensors {
            hasher.update(format!("\n{} {} {:?} {}", row.name, row.dtype, row.shape, row.sha256));
        }
        Digest(hasher.finalize().into())
    }
}

impl RankManifest {
    /// Reads a rank's manifest that nobody vouches for; [`expect`](Self::expect) compares it to the whole's.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self, CheckpointError> {
        let manifest: Self = check::json(file, json)?;
        check::checksum(file, &manifest.checksum, &manifest.seal())?;
        Ok(manifest)
    }

    /// Whether it is the manifest of `rank` of the directory that `whole` describes, and says what `layout` does.
    pub fn expect(
        &self,
        file: &str,
        (whole, identity): (&Manifest, Digest),
        rank: Rank,
        layout: &layout::FileLayout,
    ) -> Result<(), CheckpointError> {
        let mut findings = Findings::default();
        check::rank(self, (whole, identity), rank, layout, &mut findings);
        CheckpointError::of_manifest(file, findings)
    }

    /// The file's bytes, the checksum made anew.
    pub fn to_json(&self) -> Vec<u8> {
        self.to_sealed_json()
    }
}

/// Whether `json` is a rank's manifest and not the whole's.
pub(crate) fn is_of_rank(json: &[u8]) -> bool {
    let value = serde_json::from_slice::<serde_json::Value>(json);
    value.is_ok_and(|value| value.get("rank").is_some() && value.get("model").is_none())
}

/// The fixed prompt: tokens without a pattern, the same for every model of the same vocabulary, no longer than the
/// model's context.
pub fn probe_prompt(model: &ModelConfig) -> Vec<u32> {
    const PROBE_LEN: usize = 32;
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % model.n_vocab as u64) as u32
    };
    (0..PROBE_LEN.min(model.n_ctx)).map(|_| next()).collect()
}
