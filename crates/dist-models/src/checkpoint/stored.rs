//! Tensors of files under their canonical names, and the cuts of them that a rank holds.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use dist_core::{DType, ModelConfig, Placement, TensorSpec, decoder_specs};
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};
use half::{bf16, f16};

use super::error::{CheckpointError, Findings, clip};
use super::family::Family;
use super::header::RawTensor;
use super::map::Fresh;

/// Where a file's bytes are.
pub(super) enum Storage {
    /// In memory or mapped; parts of weights are views of it.
    Memory(HostBytes),
    /// In the file; what a rank needs is read when it is asked for.
    File(File),
}

/// A file of tensors.
pub(super) struct TensorFile {
    pub(super) path: PathBuf,
    pub(super) storage: Storage,
}

/// A tensor in a file.
#[derive(Clone, Debug)]
struct Source {
    file: usize,
    dtype: DType,
    /// Byte offset in the file.
    start: usize,
    /// Outputs, or elements of a vector.
    n: usize,
}

/// A canonical tensor: one or several sources stacked along the outputs.
#[derive(Debug)]
struct Entry {
    sources: Vec<Source>,
    layout: Layout,
    /// Canonical shape.
    shape: Vec<usize>,
}

/// A rectangle of a stored matrix: rows and columns as they lie in the file.
struct Rect {
    file: usize,
    offset: usize,
    rows: usize,
    cols: usize,
    /// Elements from one row to the next.
    ld: usize,
}

/// All tensors of a model, by canonical name.
pub(super) struct Stored {
    name: String,
    files: Vec<TensorFile>,
    entries: HashMap<String, Entry>,
    n_bytes: u64,
}

/// The type of a weight.
fn weight_dtype(dtype: &str) -> Option<DType> {
    match dtype {
        "F32" => Some(DType::F32),
        "F16" => Some(DType::F16),
        "BF16" => Some(DType::BF16),
        _ => None,
    }
}

/// Outputs of each source of `spec`.
fn source_lens(spec: &TensorSpec, n_sources: usize) -> Vec<usize> {
    match &spec.placement {
        Placement::Sharded { dim: 0, parts } if n_sources > 1 => parts.iter().map(|part| part.len).collect(),
        _ => vec![spec.shape[0]],
    }
}

/// A source's shape in the file.
fn stored_shape(spec: &TensorSpec, layout: Layout, n: usize) -> Vec<usize> {
    match (spec.shape.get(1), layout) {
        (Some(&k), Layout::Nk) => vec![n, k],
        (Some(&k), Layout::Kn) => vec![k, n],
        (None, _) => vec![n],
    }
}

/// The tensors of all files by their names without prefixes, each until it is used.
struct Found<'a> {
    tensors: HashMap<&'a str, (usize, &'a RawTensor)>,
    findings: Findings,
}

impl<'a> Found<'a> {
    fn new(family: &Family, raw: &'a [Vec<RawTensor>]) -> Self {
        let mut found = Self { tensors: HashMap::new(), findings: Findings::default() };
        for (file, tensors) in raw.iter().enumerate() {
            for tensor in tensors {
                if let Some((_, twin)) = found.tensors.insert(family.bare(&tensor.name), (file, tensor)) {
                    let also = format!("{} as well", clip(&twin.name));
                    found.findings.add(&tensor.name, "one tensor of this name", also);
                }
            }
        }
        found
    }

    fn take(&mut self, name: &str, shape: &[usize], n: usize) -> Option<Source> {
        let Some((file, tensor)) = self.tensors.remove(name) else {
            self.findings.add(name, format!("a tensor of shape {shape:?}"), "nothing");
            return None;
        };
        if tensor.shape != shape {
            self.findings.add(&tensor.name, format!("shape {shape:?}"), format!("{:?}", tensor.shape));
        }
        let Some(dtype) = weight_dtype(&tensor.dtype) else {
            self.findings.add(&tensor.name, "type F32, F16 or BF16", &tensor.dtype);
            return None;
        };
        (tensor.shape == shape).then_some(Source { file, dtype, start: tensor.start, n })
    }

    fn entry(&mut self, family: &Family, spec: &TensorSpec) -> Option<Entry> {
        let stored = family.stored(&spec.name).expect("a family's table names every tensor of its decoder");
        let lens = source_lens(spec, stored.names.len());
        let mut sources = Vec::with_capacity(lens.len());
        for (name, n) in stored.names.iter().zip(lens) {
            sources.extend(self.take(name, &stored_shape(spec, stored.layout, n), n));
        }
        let first = sources.first()?.dtype;
        // A weight in parts is one weight to a kernel, so it has one type; vectors are converted anyway.
        if let Some(other) = sources.iter().find(|source| source.dtype != first && spec.shape.len() > 1) {
            let expected = format!("the same type in {}", stored.names.join(", "));
            self.findings.add(&spec.name, expected, format!("{first} and {}", other.dtype));
        }
        (sources.len() == stored.names.len()).then(|| Entry {
            sources,
            layout: stored.layout,
            shape: spec.shape.clone(),
        })
    }

    fn surplus(&mut self, config: &ModelConfig, family: &Family) {
        let is_surplus = |name: &&str| !family.is_ignored(name, config);
        let mut rest: Vec<&RawTensor> = self
            .tensors
            .iter()
            .filter(|(name, _)| is_surplus(name))
            .map(|(_, (_, tensor))| *tensor)
            .collect();
        rest.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        for tensor in rest {
            let found = format!("{} {:?}", tensor.dtype, tensor.shape);
            self.findings.add(&tensor.name, "no such tensor", found);
        }
    }
}

impl Stored {
    /// Finds every tensor of the model in `files`, or says all that is different. Sets the configuration's weight type
    /// to the one that most bytes have.
    pub(super) fn resolve(
        place: &str,
        family: &'static Family,
        config: &mut ModelConfig,
        files: Vec<TensorFile>,
        raw: &[Vec<RawTensor>],
    ) -> Result<Self, CheckpointError> {
        let mut found = Found::new(family, raw);
        let (mut entries, mut n_bytes, mut bytes_of) = (HashMap::new(), 0, HashMap::<DType, u64>::new());
        for spec in decoder_specs(config) {
            let Some(entry) = found.entry(family, &spec) else { continue };
            let k = spec.shape.get(1).copied().unwrap_or(1);
            for source in &entry.sources {
                let size = (source.n * k * source.dtype.bytes()) as u64;
                n_bytes += size;
                *bytes_of.entry(source.dtype).or_default() += size;
            }
            entries.insert(spec.name, entry);
        }
        found.surplus(config, family);
        if !found.findings.is_empty() {
            let (file, family) = (place.to_owned(), family.name);
            return Err(CheckpointError::Mismatch { file, family, findings: found.findings });
        }
        let most = bytes_of.into_iter().max_by_key(|&(dtype, size)| (size, dtype.bytes()));
        config.weight_dtype = most.map_or(config.weight_dtype, |(dtype, _)| dtype);
        Ok(Self { name: config.name.clone(), files, entries, n_bytes })
    }

    pub(super) fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    fn entry(&self, spec: &TensorSpec) -> Result<&Entry, CheckpointError> {
        let entry = self.entries.get(&spec.name).filter(|entry| entry.shape == spec.shape);
        entry.ok_or_else(|| CheckpointError::NoTensor {
            name: self.name.clone(),
            tensor: spec.name.clone(),
            shape: spec.shape.clone(),
        })
    }

    pub(super) fn weight(
        &self,
        spec: &TensorSpec,
        tp: usize,
        tp_rank: usize,
    ) -> Result<HostWeight, CheckpointError> {
        let entry = self.entry(spec)?;
        assert_eq!(entry.shape.len(), 2, "{} is a vector", spec.name);
        let (slice, k_total) = (spec.slice(tp, tp_rank), entry.shape[1]);
        // Outputs and inputs of the cut: one of them is whole.
        let all_inputs = 0..k_total;
        let (outputs, inputs) = match slice.dim {
            0 => (slice.ranges, all_inputs),
            _ => (std::iter::once(0..entry.shape[0]).collect(), slice.ranges[0].clone()),
        };
        let mut parts = Vec::new();
        for output in outputs {
            let mut base = 0;
            for source in &entry.sources {
                let (start, end) = (output.start.max(base), output.end.min(base + source.n));
                if start < end {
                    let rect = rect(source, entry.layout, k_total, start - base..end - base, inputs.clone());
                    parts.push(self.part(&spec.name, &rect, source.dtype, entry.layout)?);
                }
                base += source.n;
            }
        }
        Ok(HostWeight { parts, dtype: entry.sources[0].dtype, layout: entry.layout, k: inputs.len() })
    }

    fn part(
        &self,
        tensor: &str,
        rect: &Rect,
        dtype: DType,
        layout: Layout,
    ) -> Result<HostPart, CheckpointError> {
        let n = if layout == Layout::Nk { rect.rows } else { rect.cols };
        let file = &self.files[rect.file];
        match &file.storage {
            Storage::Memory(bytes) => {
                Ok(HostPart { bytes: bytes.clone(), offset: rect.offset, n, ld: rect.ld })
            }
            Storage::File(from) => {
                let n_bytes = rect.rows * rect.cols * dtype.bytes();
                let mut fresh = Fresh::zeroed(n_bytes).map_err(|source| CheckpointError::Memory {
                    tensor: tensor.to_owned(),
                    n_bytes,
                    source,
                })?;
                read_rect(from, rect, dtype, fresh.as_mut_slice())
                    .map_err(|source| CheckpointError::Read { path: file.path.clone(), source })?;
                Ok(HostPart { bytes: fresh.share(), offset: 0, n, ld: rect.cols })
            }
        }
    }

    pub(super) fn vector(
        &self,
        spec: &TensorSpec,
        tp: usize,
        tp_rank: usize,
    ) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.entry(spec)?;
        assert_eq!(entry.shape.len(), 1, "{} is a matrix", spec.name);
        let mut all = Vec::with_capacity(entry.shape[0]);
        for source in &entry.sources {
            let n_bytes = source.n * source.dtype.bytes();
            let file = &self.files[source.file];
            match &file.storage {
                Storage::Memory(bytes) => {
                    extend_f32(
                        &mut all,
                        &bytes.as_slice()[source.start..source.start + n_bytes],
                        source.dtype,
                    );
                }
                Storage::File(from) => {
                    let mut bytes = vec![0; n_bytes];
                    from.read_exact_at(&mut bytes, source.start as u64)
                        .map_err(|source| CheckpointError::Read { path: file.path.clone(), source })?;
                    extend_f32(&mut all, &bytes, source.dtype);
                }
            }
        }
        let ranges = spec.slice(tp, tp_rank).ranges;
        Ok(ranges.into_iter().flat_map(|range| all[range].iter().copied()).collect())
    }
}

/// Where outputs × inputs of a source lie in its file.
fn rect(
    source: &Source,
    layout: Layout,
    k_total: usize,
    outputs: std::ops::Range<usize>,
    inputs: std::ops::Range<usize>,
) -> Rect {
    let (rows, cols, ld) = match layout {
        Layout::Nk => (outputs, inputs, k_total),
        Layout::Kn => (inputs, outputs, source.n),
    };
    let offset = source.start + (rows.start * ld + cols.start) * source.dtype.bytes();
    Rect { file: source.file, offset, rows: rows.len(), cols: cols.len(), ld }
}

/// Reads a rectangle without gaps.
fn read_rect(file: &File, rect: &Rect, dtype: DType, out: &mut [u8]) -> io::Result<()> {
    if rect.cols == rect.ld || out.is_empty() {
        return file.read_exact_at(out, rect.offset as u64);
    }
    let (row_bytes, stride) = (rect.cols * dtype.bytes(), rect.ld * dtype.bytes());
    for (row, out) in out.chunks_exact_mut(row_bytes).enumerate() {
        file.read_exact_at(out, (rect.offset + row * stride) as u64)?;
    }
    Ok(())
}

fn extend_f32(out: &mut Vec<f32>, bytes: &[u8], dtype: DType) {
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        DType::F16 => out.extend(pairs().map(|b| f16::from_le_bytes(b).to_f32())),
        DType::BF16 => out.extend(pairs().map(|b| bf16::from_le_bytes(b).to_f32())),
        _ => out.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    }
}
