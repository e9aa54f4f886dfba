//! Finds fixtures at run time, and takes safetensors files apart and puts them together in other ways.

#![allow(dead_code, reason = "each test file uses its part of it")]

use std::path::{Path, PathBuf};

use dist_kernels::weight::{HostBytes, HostWeight, Layout};
use dist_models::checkpoint::{Checkpoint, CheckpointError, OpenOptions};
use half::{bf16, f16};
use serde_json::{Map, Value, json};

pub(crate) const FIXTURES: [&str; 6] =
    ["gpt2", "gpt2-erf-inner", "gpt2-scaled-attn", "opt", "opt-post-norm-proj", "gpt-neo-banded"];

pub(crate) const MMAP: OpenOptions = OpenOptions { mmap: true };
pub(crate) const READ: OpenOptions = OpenOptions { mmap: false };

/// The repository: `DIST_REPO`, or the first folder upwards that holds `tests/fixtures`.
pub(crate) fn repo() -> PathBuf {
    if let Some(root) = std::env::var_os("DIST_REPO") {
        return root.into();
    }
    let here = std::env::current_dir().unwrap();
    let root = here.ancestors().find(|dir| dir.join("tests/fixtures").is_dir());
    root.expect("run inside the repository, or set DIST_REPO to it").to_owned()
}

pub(crate) fn fixture_dir(name: &str) -> PathBuf {
    repo().join("tests/fixtures").join(name)
}

pub(crate) fn demo_dir() -> PathBuf {
    repo().join("crates/dist-cli/assets/demo-model")
}

/// A tensor of a file under test.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    pub(crate) name: String,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Raw {
    pub(crate) fn zeros(name: &str, dtype: &str, shape: &[usize]) -> Self {
        let bits = if dtype == "BOOL" || dtype == "U8" { 1 } else { 4 };
        let n_bytes = shape.iter().product::<usize>() * bits;
        Self { name: name.into(), dtype: dtype.into(), shape: shape.into(), bytes: vec![0; n_bytes] }
    }
}

/// A model as its three files, to be disturbed.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) config: Map<String, Value>,
    pub(crate) tensors: Vec<Raw>,
}

pub(crate) fn header_end(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

impl Case {
    pub(crate) fn fixture(name: &str) -> Self {
        let dir = fixture_dir(name);
        let config = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let end = header_end(&bytes);
        let header: Map<String, Value> = serde_json::from_slice(&bytes[8..end]).unwrap();
        let numbers = |value: &Value| -> Vec<usize> {
            value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
        };
        let entries = header.iter().filter(|(name, _)| *name != "__metadata__");
        let tensors = entries.map(|(name, entry)| {
            let range = numbers(&entry["data_offsets"]);
            Raw {
                name: name.clone(),
                dtype: entry["dtype"].as_str().unwrap().into(),
                shape: numbers(&entry["shape"]),
                bytes: bytes[end + range[0]..end + range[1]].to_vec(),
            }
        });
        Self { config, tensors: tensors.collect() }
    }

    pub(crate) fn set(mut self, field: &str, value: Value) -> Self {
        self.config.insert(field.into(), value);
        self
    }

    pub(crate) fn find(&mut self, name: &str) -> &mut Raw {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub(crate) fn rename(mut self, change: impl Fn(&str) -> String) -> Self {
        for tensor in &mut self.tensors {
            tensor.name = change(&tensor.name);
        }
        self
    }

    pub(crate) fn with(mut self, tensor: Raw) -> Self {
        self.tensors.push(tensor);
        self
    }

    pub(crate) fn config_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.config).unwrap()
    }

    pub(crate) fn open(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::from_bytes("case", &self.config_json(), HostBytes::new(write(&self.tensors)), None)
    }

    /// The message of the refusal.
    pub(crate) fn refusal(&self) -> String {
        self.open().expect_err("this must be refused").to_string()
    }

    pub(crate) fn write_to(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config_json()).unwrap();
        std::fs::write(dir.join("model.safetensors"), write(&self.tensors)).unwrap();
    }
}

/// A sound safetensors file.
pub(crate) fn write(tensors: &[Raw]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for tensor in tensors {
        let (start, end) = (data.len(), data.len() + tensor.bytes.len());
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
        data.extend_from_slice(&tensor.bytes);
    }
    with_header(&serde_json::to_string(&header).unwrap(), &data)
}

pub(crate) fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// All elements of a weight, `[n, k]`.
pub(crate) fn elements(weight: &HostWeight) -> Vec<Vec<f32>> {
    weight.check().unwrap();
    let mut rows = Vec::new();
    for part in &weight.parts {
        for n in 0..part.n {
            let at = |k: usize| match weight.layout {
                Layout::Nk => n * part.ld + k,
                Layout::Kn => k * part.ld + n,
            };
            let row = (0..weight.k).map(|k| {
                let size = weight.dtype.bytes();
                let bytes = &part.bytes.as_slice()[part.offset + at(k) * size..][..size];
                match weight.dtype.name() {
                    "f32" => f32::from_le_bytes(bytes.try_into().unwrap()),
                    "f16" => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                    _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                }
            });
            rows.push(row.collect());
        }
    }
    rows
}
