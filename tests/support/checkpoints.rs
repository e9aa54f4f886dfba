//! Exports and shards fixtures, reads directories whole, and damages them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use dist_core::plan::{TOKEN_TABLE, stage_specs};
use dist_core::{DType, ModelConfig, Rank, decoder_specs};
use dist_kernels::weight::{HostWeight, Layout};
use dist_models::checkpoint::{Checkpoint, CheckpointError, OpenOptions};
use dist_models::export::{ExportRequest, Progress};
use dist_models::manifest::{Digest, Place, Split, WEIGHTS};
use half::{bf16, f16};
use sha2::{Digest as _, Sha256};

/// The repository: `DIST_REPO`, or the first folder upwards that holds `tests/fixtures`.
fn repo() -> PathBuf {
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

pub(crate) fn try_open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(dir, &OpenOptions { mmap: true })
}

pub(crate) fn open(dir: &Path) -> Checkpoint {
    try_open(dir).unwrap()
}

pub(crate) fn open_unmapped(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, &OpenOptions { mmap: false }).unwrap()
}

/// Nobody says to stop.
pub(crate) fn keep_on() -> impl FnMut(Progress) -> ControlFlow<()> {
    |_| ControlFlow::Continue(())
}

pub(crate) fn request<'a>(source: &'a Checkpoint, split: &'a Split, out: &'a Path) -> ExportRequest<'a> {
    ExportRequest { source, dtype: None, max_seq_len: None, split, out, overwrite: false, threads: 1 }
}

/// Exports as it is; the directory with the manifest.
pub(crate) fn export(source: &Checkpoint, split: &Split, out: &Path) -> PathBuf {
    request(source, split, out).write(&mut keep_on()).unwrap().dir
}

/// The same by another name: a cut is an export that changes nothing.
pub(crate) fn shard(source: &Checkpoint, split: &Split, out: &Path) -> PathBuf {
    export(source, split, out)
}

/// Every legal split up to tp 4 × pp 3.
pub(crate) fn splits(config: &ModelConfig) -> impl Iterator<Item = Split> {
    let meshes = (1..=4).flat_map(|tp| (1..=3).map(move |pp| (tp, pp)));
    meshes.map(|(tp, pp)| Split::even(config, tp, pp)).filter(|split| split.check(config).is_ok())
}

/// All files of a directory by their relative names.
pub(crate) fn read_all(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// All elements of a weight, `[n, k]` row-major.
pub(crate) fn cells(weight: &HostWeight) -> Vec<f32> {
    weight.check().unwrap();
    let size = weight.dtype.bytes();
    let mut cells = Vec::new();
    for part in &weight.parts {
        for n in 0..part.n {
            for k in 0..weight.k {
                let at = if weight.layout == Layout::Nk { n * part.ld + k } else { k * part.ld + n };
                let bytes = &part.bytes.as_slice()[part.offset + at * size..][..size];
                cells.push(match weight.dtype.name() {
                    "f32" => f32::from_le_bytes(bytes.try_into().unwrap()),
                    "f16" => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                    _ => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
                });
            }
        }
    }
    cells
}

/// Takes in everything that a rank holds, as a load does; its bytes by the specs.
pub(crate) fn take_rank(checkpoint: &Checkpoint, split: &Split, rank: Rank) -> u64 {
    try_take_rank(checkpoint, split, rank).unwrap()
}

fn try_take_rank(checkpoint: &Checkpoint, split: &Split, rank: Rank) -> Result<u64, CheckpointError> {
    let (coord, tp) = (split.mesh().coord(rank), split.tp);
    let mut n_bytes = 0;
    for spec in stage_specs(checkpoint.config(), &split.stages, coord.pp) {
        n_bytes += spec.byte_ranges(tp, coord.tp).iter().map(|range| range.len() as u64).sum::<u64>();
        if spec.shape.len() == 1 {
            checkpoint.vector(&spec, tp, coord.tp)?;
        } else if spec.name == TOKEN_TABLE && coord.pp > 0 {
            checkpoint.head_table(&spec, tp, coord.tp)?;
        } else {
            checkpoint.weight(&spec, tp, coord.tp)?;
        }
    }
    checkpoint.compared()?;
    Ok(n_bytes)
}

/// A directory to be damaged.
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
    split: Split,
    _root: tempfile::TempDir,
}

impl Files {
    pub(crate) fn sharded(name: &str, split: &Split) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = shard(&open(&fixture_dir(name)), split, root.path());
        Self { dir, split: split.clone(), _root: root }
    }

    pub(crate) fn exported(name: &str) -> Self {
        let source = open(&fixture_dir(name));
        Self::sharded(name, &Split::solo(source.config()))
    }

    /// What is said when the directory is opened, or when a rank takes its part in.
    pub(crate) fn refusal(&self) -> Option<String> {
        let checkpoint = match try_open(&self.dir) {
            Ok(checkpoint) => checkpoint,
            Err(error) => return Some(error.to_string()),
        };
        let ranks = (0..self.split.mesh().world_size()).map(Rank);
        let mut taken = ranks.map(|rank| try_take_rank(&checkpoint, &self.split, rank));
        taken.find_map(Result::err).map(|error| error.to_string())
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.dir.join(name)).unwrap()
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.dir.join(name), bytes).unwrap();
    }

    /// Changes one byte; negative places count from the end.
    pub(crate) fn flip(&self, name: &str, at: isize) {
        let mut bytes = self.read(name);
        let at = if at < 0 { bytes.len() - at.unsigned_abs() } else { at.unsigned_abs() };
        bytes[at] ^= 1;
        self.write(name, &bytes);
    }

    pub(crate) fn truncate(&self, name: &str) {
        let bytes = self.read(name);
        self.write(name, &bytes[..bytes.len() - 64]);
    }

    pub(crate) fn remove(&self, name: &str) {
        let path = self.dir.join(name);
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
    }

    pub(crate) fn swap(&self, a: &str, b: &str) {
        let (a, b, between) = (self.dir.join(a), self.dir.join(b), self.dir.join("between"));
        std::fs::rename(&a, &between).unwrap();
        std::fs::rename(&b, &a).unwrap();
        std::fs::rename(&between, &b).unwrap();
    }

    pub(crate) fn replace(&self, name: &str, from: &str, to: &str) {
        let text = String::from_utf8(self.read(name)).unwrap();
        assert!(text.contains(from), "{from} is not in {name}");
        self.write(name, text.replace(from, to).as_bytes());
    }

    /// Puts a rank's directory of another sharding in the place of this one's.
    pub(crate) fn bring(&self, name: &str, split: &Split, model: &str) {
        let root = tempfile::tempdir().unwrap();
        let source = match model.strip_suffix("-changed") {
            None => open(&fixture_dir(model)),
            Some(base) => Checkpoint::random(open(&fixture_dir(base)).config().clone(), 1),
        };
        let other = shard(&source, split, root.path());
        self.remove(name);
        std::fs::rename(other.join(name), self.dir.join(name)).unwrap();
    }
}

/// An exported directory whose matrices are bf16 and whose vectors are f32, made by hand of one that is all f32.
pub(crate) fn with_halved_matrices(whole: &Checkpoint, dir: &Path) -> Checkpoint {
    let mut manifest = whole.manifest().unwrap().clone();
    for row in manifest.tensors.iter_mut().filter(|row| row.shape.len() == 2) {
        row.dtype = DType::BF16;
    }
    let files = manifest.files();
    let mut bytes = vec![0; files[0].length as usize];
    bytes[..files[0].header.len()].copy_from_slice(&files[0].header);
    for (slot, row) in files[0].slots.iter().zip(&mut manifest.tensors) {
        let spec = decoder_specs(whole.config()).swap_remove(slot.tensor);
        let data: Vec<u8> = if slot.dtype == DType::BF16 {
            let cells = cells(&whole.weight(&spec, 1, 0).unwrap());
            cells.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
        } else {
            whole.vector(&spec, 1, 0).unwrap().iter().flat_map(|x| x.to_le_bytes()).collect()
        };
        row.sha256 = Digest(Sha256::digest(&data).into());
        row.place = Some(Place { file: WEIGHTS.into(), offset: slot.offset, length: slot.length });
        bytes[slot.offset as usize..][..data.len()].copy_from_slice(&data);
    }
    std::fs::create_dir(dir).unwrap();
    std::fs::write(dir.join(WEIGHTS), bytes).unwrap();
    std::fs::write(dir.join("manifest.json"), manifest.to_json()).unwrap();
    open(dir)
}
