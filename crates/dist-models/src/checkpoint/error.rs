//! Why a checkpoint is refused: what, where, and what to do about it. Every difference is told at once.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Findings that are printed; the rest are counted.
const N_SHOWN: usize = 20;

/// One thing that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The tensor, the field or the file.
    pub what: String,
    /// What it must be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// All that is wrong with a file: the first ones kept, the rest counted, so that a hostile file cannot fill memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    shown: Vec<Finding>,
    n_more: usize,
}

impl Findings {
    /// The first findings.
    pub fn shown(&self) -> &[Finding] {
        &self.shown
    }

    /// How many findings there are.
    pub fn len(&self) -> usize {
        self.shown.len() + self.n_more
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.shown.is_empty()
    }

    pub(crate) fn add(
        &mut self,
        what: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) {
        if self.shown.len() < N_SHOWN {
            self.shown.push(Finding { what: what.into(), expected: expected.into(), found: found.into() });
        } else {
            self.n_more += 1;
        }
    }

    /// Adds what another look has found, what is there already but once.
    pub(crate) fn extend(&mut self, other: Self) {
        self.n_more += other.n_more;
        for finding in other.shown {
            if !self.shown.contains(&finding) {
                self.add(finding.what, finding.expected, finding.found);
            }
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.shown {
            let (what, expected, found) =
                (clip(&finding.what), clip(&finding.expected), clip(&finding.found));
            write!(f, "\n  {what}: expected {expected}, found {found}")?;
        }
        if self.n_more > 0 {
            write!(f, "\n  … and {} more", self.n_more)?;
        }
        Ok(())
    }
}

/// Text from a file that nobody vouches for: one line, of bounded length, without control characters.
pub(crate) fn clip(text: &str) -> String {
    const LONGEST: usize = 120;
    let mut out: String =
        text.chars().take(LONGEST).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect();
    if text.chars().nth(LONGEST).is_some() {
        out.push('…');
    }
    out
}

/// Why a checkpoint is refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Nothing is there.
    #[error("{}: no such directory", path.display())]
    NotFound {
        /// What was asked for.
        path: PathBuf,
    },
    /// Something else than a directory is there.
    #[error("{}: is a file, expected a directory with config.json and model.safetensors", path.display())]
    NotADirectory {
        /// What was asked for.
        path: PathBuf,
    },
    /// A format that is not read.
    #[error("{}: GGUF files are not supported", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
    },
    /// A directory that is no model.
    #[error("{}: has no config.json", dir.display())]
    NoConfig {
        /// The directory.
        dir: PathBuf,
    },
    /// A model without weights.
    #[error("{}: has neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// Weights in a format that can carry code.
    #[error("{}: pickle files are never read", file.display())]
    Pickle {
        /// The file.
        file: PathBuf,
    },
    /// The placeholder that git leaves for a file that was not fetched.
    #[error("{file}: is a Git LFS pointer, not the weights")]
    LfsPointer {
        /// The file.
        file: String,
    },
    /// The system refused.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is larger than such a file ever is.
    #[error("{file}: {found} bytes, expected at most {limit}")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// A file that does not say what it must.
    #[error("{file}: {message}")]
    Json {
        /// The file.
        file: String,
        /// Where and why.
        message: String,
    },
    /// A family of models that is not supported.
    #[error("{file}: model_type {found:?} is not supported; supported are {supported}")]
    Family {
        /// The file.
        file: String,
        /// The family.
        found: String,
        /// Those that are.
        supported: String,
    },
    /// Fields of config.json that cannot be honoured.
    #[error("{file}: not a model that can be run:{findings}")]
    Config {
        /// The file.
        file: String,
        /// The fields.
        findings: Findings,
    },
    /// A safetensors file that is not sound in itself.
    #[error("{file}: not a sound safetensors file:{findings}")]
    Malformed {
        /// The file.
        file: String,
        /// The tensors.
        findings: Findings,
    },
    /// An index whose shards are not what it says.
    #[error("{file}: the shards are not as the index says:{findings}")]
    Shards {
        /// The index.
        file: String,
        /// The shards and tensors.
        findings: Findings,
    },
    /// Sound tensors, but not those of the model in config.json.
    #[error("{file}: the tensors are not those of the {family} model in config.json:{findings}")]
    Mismatch {
        /// The file or directory.
        file: String,
        /// The family.
        family: &'static str,
        /// The tensors.
        findings: Findings,
    },
    /// A manifest.json that cannot be used.
    #[error("{file}: not a manifest that can be used:{findings}")]
    Manifest {
        /// The file.
        file: String,
        /// What is wrong.
        findings: Findings,
    },
    /// Files of an exported or sharded directory that are not as its manifest says.
    #[error("{}: the files are not as manifest.json says:{findings}", dir.display())]
    Parts {
        /// The directory.
        dir: PathBuf,
        /// The files.
        findings: Findings,
    },
    /// A tensor or a file whose bytes have changed since they were written.
    #[error("{file}: {what} has SHA-256 {found}, the manifest says {expected}")]
    Hash {
        /// The file.
        file: String,
        /// The tensor.
        what: String,
        /// The manifest's.
        expected: String,
        /// That of the bytes.
        found: String,
    },
    /// A directory without hashes.
    #[error("{}: has no manifest.json, so there are no hashes to compare", dir.display())]
    NoManifest {
        /// The directory.
        dir: PathBuf,
    },
    /// One rank's directory instead of the whole.
    #[error("{}: is the part of one rank", dir.display())]
    OneRank {
        /// The directory.
        dir: PathBuf,
    },
    /// Several sharded directories, none of which is meant more than another.
    #[error("{}: holds several sharded directories: {}", dir.display(), found.join(", "))]
    Several {
        /// The directory.
        dir: PathBuf,
        /// Their names.
        found: Vec<String>,
    },
    /// A tensor was asked for that the model does not have.
    #[error("{name}: the checkpoint has no tensor {tensor} of shape {shape:?}")]
    NoTensor {
        /// The model.
        name: String,
        /// The canonical name.
        tensor: String,
        /// The shape asked for.
        shape: Vec<usize>,
    },
    /// No memory for a tensor.
    #[error("{tensor}: no memory for {n_bytes} bytes")]
    Memory {
        /// The canonical name.
        tensor: String,
        /// The size.
        n_bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// A model that is not in the local cache.
    #[error("{name}: not in the local Hugging Face cache ({})", dir.display())]
    NotCached {
        /// `org/model`.
        name: String,
        /// Where it would be.
        dir: PathBuf,
    },
}

impl CheckpointError {
    pub(crate) fn of_manifest(file: &str, findings: Findings) -> Result<(), Self> {
        if findings.is_empty() { Ok(()) } else { Err(Self::Manifest { file: file.to_owned(), findings }) }
    }

    /// What to do about it, where there is something to do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "give a Hugging Face model directory, a preset, or org/model".to_owned(),
            Self::NotADirectory { path } => match path.parent() {
                Some(dir) if !dir.as_os_str().is_empty() => format!("give its directory: {}", dir.display()),
                _ => "give the directory that holds it: .".to_owned(),
            },
            Self::Gguf { .. } => {
                "use the safetensors files that it was made from; they are usually in the same repository \
                 without -GGUF in its name"
                    .to_owned()
            }
            Self::NoConfig { dir } if dir.join("rank_0").is_dir() => {
                "ranks' directories are read with the manifest.json beside them: copy it here too".to_owned()
            }
            Self::NoConfig { dir } => match cached_name(dir) {
                Some(name) => format!("complete the download with: hf download {name}"),
                None => "give the directory that holds the model's config.json".to_owned(),
            },
            Self::NoWeights { dir } => match cached_name(dir) {
                Some(name) => format!("complete the download with: hf download {name}"),
                None => "add the model's safetensors files to it".to_owned(),
            },
            Self::Pickle { file } => convert_command(file),
            Self::LfsPointer { .. } => "fetch the weights with: git lfs pull".to_owned(),
            Self::Read { .. } => "check that the file exists and that you may read it".to_owned(),
            Self::Malformed { .. } => {
                "the file is cut short or damaged: download it again and compare its checksum".to_owned()
            }
            Self::Shards { .. } => "download the missing or damaged shards again".to_owned(),
            Self::Mismatch { .. } => "config.json and the weights must be of the same model".to_owned(),
            Self::Manifest { .. } => {
                "export or shard it again: manifest.json is not changed by hand".to_owned()
            }
            Self::OneRank { dir } => {
                let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
                format!("give the directory above it: {}", parent.unwrap_or(Path::new("..")).display())
            }
            Self::Parts { .. } => {
                "copy the named files again, or make them again with dist-cli shard --overwrite".to_owned()
            }
            Self::Hash { .. } => {
                "a byte has changed: copy the file again; dist-cli shard --verify lists all that are wrong"
                    .to_owned()
            }
            Self::NoManifest { dir } => {
                format!("make one with: dist-cli export --model {} --out DIR", dir.display())
            }
            Self::Several { dir, found } => match found.first() {
                Some(first) => format!("give one of them, e.g. {}", dir.join(first).display()),
                None => return None,
            },
            Self::Family { .. } | Self::Config { .. } | Self::Json { .. } | Self::TooLarge { .. } => {
                return None;
            }
            Self::NoTensor { .. } => return None,
            Self::Memory { .. } => {
                "free memory, use more ranks, or map the weights (no --no-mmap)".to_owned()
            }
            Self::NotCached { name, .. } => format!("fetch it with: hf download {name}"),
        })
    }
}

/// `org/model` of a snapshot in the Hugging Face cache.
pub(super) fn cached_name(dir: &Path) -> Option<String> {
    let snapshots =
        dir.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))?;
    let repo = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    Some(repo.replacen("--", "/", 1))
}

fn convert_command(file: &Path) -> String {
    let dir = file.parent().unwrap_or(Path::new("."));
    let dir = format!("{:?}", dir.display().to_string()).replace('\'', "'\\''");
    format!(
        "convert it once with: python3 -c 'from transformers import AutoModelForCausalLM as M; d = {dir}; \
         M.from_pretrained(d, torch_dtype=\"auto\").save_pretrained(d, safe_serialization=True)'"
    )
}
