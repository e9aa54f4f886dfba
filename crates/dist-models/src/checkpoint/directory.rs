//! Opens a Hugging Face directory: which files are there, which of them hold the tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use dist_kernels::weight::HostBytes;
use serde::Deserialize;

use super::error::{CheckpointError, Findings, cached_name, clip};
use super::header::{self, RawTensor};
use super::stored::{Storage, Stored, TensorFile};
use super::{Checkpoint, OpenOptions, TokenizerFrom, Weights, family, map, own};
use crate::manifest;

/// Bounds on files that are read as a whole.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
const MAX_INDEX_BYTES: u64 = 16 << 20;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files of weights that can carry code.
const PICKLES: [&str; 2] = ["pytorch_model.bin", "pytorch_model.bin.index.json"];

/// The index of a model in several files.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn cannot_read(path: &Path) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Read { path, source }
}

/// Opens a plain file; anything else (a pipe would block) is refused.
pub(super) fn open_file(path: &Path) -> Result<(File, u64), CheckpointError> {
    let metadata = std::fs::metadata(path).map_err(cannot_read(path))?;
    if !metadata.is_file() {
        let message = "not a plain file";
        return Err(cannot_read(path)(std::io::Error::new(std::io::ErrorKind::InvalidInput, message)));
    }
    let file = File::open(path).map_err(cannot_read(path))?;
    let len = file.metadata().map_err(cannot_read(path))?.len();
    Ok((file, len))
}

/// Reads a file of bounded size.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let (file, len) = open_file(path)?;
    let too_large = |found| CheckpointError::TooLarge { file: path.display().to_string(), found, limit };
    if len > limit {
        return Err(too_large(len));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    // It may have grown since.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(cannot_read(path))?;
    if bytes.len() as u64 > limit { Err(too_large(bytes.len() as u64)) } else { Ok(bytes) }
}

pub(super) fn open(dir: &Path, options: OpenOptions) -> Result<Checkpoint, CheckpointError> {
    check_is_directory(dir)?;
    if dir.join(manifest::FILE).exists() {
        return own::open(dir, options);
    }
    let config_path = dir.join("config.json");
    if !config_path.exists() {
        if let Some(sharded) = own::sharded_below(dir)? {
            return own::open(&sharded, options);
        }
        return Err(CheckpointError::NoConfig { dir: dir.to_owned() });
    }
    let config_json = read_bounded(&config_path, MAX_CONFIG_BYTES)?;
    let generation_path = dir.join("generation_config.json");
    let generation_json =
        if generation_path.exists() { Some(read_bounded(&generation_path, MAX_CONFIG_BYTES)?) } else { None };
    let generation_file = generation_path.display().to_string();
    let generation = generation_json.as_deref().map(|json| (generation_file.as_str(), json));
    let config_file = config_path.display().to_string();
    let (family, mut config) = family::read_config(&config_file, &model_name(dir), &config_json, generation)?;
    let (files, raw) = open_weights(dir, options)?;
    let place = match files.as_slice() {
        [only] => only.path().display().to_string(),
        _ => dir.display().to_string(),
    };
    let stored = Stored::resolve(&place, family, &mut config, files, &raw)?;
    let tokenizer = TokenizerFrom::Directory(dir.to_owned());
    Ok(Checkpoint { config, weights: Weights::Stored(Box::new(stored)), tokenizer, manifest: None })
}

fn check_is_directory(dir: &Path) -> Result<(), CheckpointError> {
    let path = dir.to_owned();
    match std::fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => {
            let is_gguf = dir.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("gguf"));
            let is_gguf = is_gguf || {
                let mut magic = [0; 4];
                open_file(dir)
                    .is_ok_and(|(mut file, _)| file.read_exact(&mut magic).is_ok() && magic == *b"GGUF")
            };
            Err(if is_gguf {
                CheckpointError::Gguf { path }
            } else {
                CheckpointError::NotADirectory { path }
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(CheckpointError::NotFound { path }),
        Err(source) => Err(CheckpointError::Read { path, source }),
    }
}

/// What people call the model in `dir`.
fn model_name(dir: &Path) -> String {
    let whole = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let folder = || whole.file_name().map(|name| name.to_string_lossy().into_owned());
    cached_name(&whole).or_else(folder).unwrap_or_else(|| "model".to_owned())
}

type Opened = (Vec<TensorFile>, Vec<Vec<RawTensor>>);

fn open_weights(dir: &Path, options: OpenOptions) -> Result<Opened, CheckpointError> {
    let (single, index) = (dir.join(WEIGHTS), dir.join(INDEX));
    if single.exists() {
        let (file, tensors) = open_tensors(single, options)?;
        return Ok((vec![file], vec![tensors]));
    }
    if index.exists() {
        return open_shards(dir, &index, options);
    }
    if let Some(pickle) = PICKLES.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        return Err(CheckpointError::Pickle { file: pickle });
    }
    Err(CheckpointError::NoWeights { dir: dir.to_owned() })
}

fn open_tensors(
    path: PathBuf,
    options: OpenOptions,
) -> Result<(TensorFile, Vec<RawTensor>), CheckpointError> {
    let (mut file, file_len) = open_file(&path)?;
    let name = path.display().to_string();
    let mut first = Vec::new();
    file.by_ref().take(8).read_to_end(&mut first).map_err(cannot_read(&path))?;
    // The header is no longer than the file, so this reads no more than there is.
    let mut header = vec![0; header::end(&name, &first, file_len)? - 8];
    file.read_exact(&mut header).map_err(cannot_read(&path))?;
    let tensors = header::parse(&name, &header, file_len)?;
    let storage = if options.mmap {
        let bytes = HostBytes::of_file(map::file(&file).map_err(cannot_read(&path))?, file);
        let mapped = bytes.as_slice().len() as u64;
        if mapped < file_len {
            // Truncated between the two looks at it.
            header::parse(&name, &header, mapped)?;
        }
        Storage::Memory(bytes)
    } else {
        Storage::File(file)
    };
    Ok((TensorFile::new(path, storage), tensors))
}

fn open_shards(dir: &Path, path: &Path, options: OpenOptions) -> Result<Opened, CheckpointError> {
    let file = path.display().to_string();
    let json = read_bounded(path, MAX_INDEX_BYTES)?;
    let index: Index = serde_json::from_slice(&json)
        .map_err(|error| CheckpointError::Json { file: file.clone(), message: error.to_string() })?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let mut findings = Findings::default();
    for name in &names {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            findings.add(clip(name), "the name of a file in the same directory", "a path");
        } else if !dir.join(name).exists() {
            findings.add(clip(name), "a shard of the model", "no such file");
        }
    }
    if names.is_empty() {
        findings.add("weight_map", "at least one tensor", "none");
    }
    let (mut files, mut raw) = (Vec::new(), Vec::new());
    if findings.is_empty() {
        for name in &names {
            let (file, tensors) = open_tensors(dir.join(name), options)?;
            check_shard(&index, name, &tensors, &mut findings);
            files.push(file);
            raw.push(tensors);
        }
    }
    if findings.is_empty() { Ok((files, raw)) } else { Err(CheckpointError::Shards { file, findings }) }
}

/// A shard must hold the tensors that the index says it holds, and no other.
fn check_shard(index: &Index, name: &str, tensors: &[RawTensor], findings: &mut Findings) {
    for (tensor, _) in index.weight_map.iter().filter(|(_, shard)| *shard == name) {
        if tensors.binary_search_by(|held| held.name.as_str().cmp(tensor)).is_err() {
            findings.add(clip(tensor), format!("a tensor in {}", clip(name)), "nothing");
        }
    }
    for held in tensors {
        if index.weight_map.get(&held.name).is_none_or(|shard| shard != name) {
            let expected = format!("in the index as in {}", clip(name));
            findings.add(clip(&held.name), expected, "not there");
        }
    }
}
