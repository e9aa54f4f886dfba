//! Finds a published model's tensors in its files, or says all that is different.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use dist_core::{DType, ModelConfig, Placement, TensorSpec, decoder_specs};
use dist_kernels::weight::Layout;

use super::{Entry, Source, Stored, TensorFile};
use crate::checkpoint::error::{CheckpointError, Findings, clip};
use crate::checkpoint::family::Family;
use crate::checkpoint::header::RawTensor;
use crate::manifest::Origin;

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

/// The names of the files that hold `sources`, each once.
fn file_names(sources: &[Source], files: &[TensorFile]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for source in sources {
        let name = files[source.file].path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
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

    fn take(&mut self, name: &str, shape: &[usize], outputs: Range<usize>) -> Option<(Source, &'a str)> {
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
        let k = shape.iter().product::<usize>().checked_div(outputs.len()).unwrap_or(0);
        let start = tensor.start;
        let source = Source { file, dtype, start, outputs, inputs: 0..k, holder: 0, is_copy: false };
        (tensor.shape == shape).then_some((source, tensor.name.as_str()))
    }

    fn entry(&mut self, family: &Family, spec: &TensorSpec, files: &[TensorFile]) -> Option<Entry> {
        let stored = family.stored(&spec.name).expect("a family's table names every tensor of its decoder");
        let lens = source_lens(spec, stored.names.len());
        let (mut sources, mut names, mut n_before) = (Vec::with_capacity(lens.len()), Vec::new(), 0);
        for (name, n) in stored.names.iter().zip(lens) {
            let shape = stored_shape(spec, stored.layout, n);
            if let Some((source, name)) = self.take(name, &shape, n_before..n_before + n) {
                sources.push(source);
                names.push(name.to_owned());
            }
            n_before += n;
        }
        let first = sources.first()?.dtype;
        // A weight in parts is one weight to a kernel, so it has one type; vectors are converted anyway.
        if let Some(other) = sources.iter().find(|source| source.dtype != first && spec.shape.len() > 1) {
            let expected = format!("the same type in {}", stored.names.join(", "));
            self.findings.add(&spec.name, expected, format!("{first} and {}", other.dtype));
        }
        let layout = if spec.shape.len() > 1 { stored.layout } else { Layout::Nk };
        (sources.len() == stored.names.len()).then(|| Entry {
            origin: Origin::Stored {
                tensors: names,
                files: file_names(&sources, files),
                dtype: first,
                transposed: layout == Layout::Kn,
            },
            sources,
            layout,
            shape: spec.shape.clone(),
            tp: 1,
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
    pub(in crate::checkpoint) fn resolve(
        place: &str,
        family: &'static Family,
        config: &mut ModelConfig,
        files: Vec<TensorFile>,
        raw: &[Vec<RawTensor>],
    ) -> Result<Self, CheckpointError> {
        let mut found = Found::new(family, raw);
        let (mut entries, mut n_bytes, mut bytes_of) = (HashMap::new(), 0, HashMap::<DType, u64>::new());
        for spec in decoder_specs(config) {
            let Some(entry) = found.entry(family, &spec, &files) else { continue };
            for source in &entry.sources {
                let size = (source.outputs.len() * source.inputs.len() * source.dtype.bytes()) as u64;
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
        let (name, hashing) = (config.name.clone(), Mutex::default());
        Ok(Self { name, files, entries, head_table: None, n_bytes, hashing })
    }
}
