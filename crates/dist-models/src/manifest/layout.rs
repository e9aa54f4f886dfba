//! Where each tensor lies in a file of weights: a function of the specs and the cut, the same for who writes and who
//! reads.

use dist_core::plan::stages_of;
use dist_core::{DType, ModelConfig, Rank, TensorSpec};
use serde_json::{Map, Value, json};

use super::{Manifest, Split};

/// Tensors begin at a multiple of this, as far as their own lengths allow.
const DATA_ALIGN: usize = 64;

/// A tensor, or a rank's cut of one, in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which of the model's tensors, in canonical order.
    pub tensor: usize,
    /// Canonical name.
    pub name: String,
    /// Type.
    pub dtype: DType,
    /// Local shape without padding.
    pub shape: Vec<usize>,
    /// First byte, from the beginning of the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A file of weights: a safetensors file whose header is known to the byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileLayout {
    /// Everything before the data.
    pub header: Vec<u8>,
    /// The tensors, in canonical order.
    pub slots: Vec<Slot>,
    /// Length of the file.
    pub length: u64,
}

impl FileLayout {
    /// The file of tensor-parallel rank `tp_rank` of `tp` that holds its cut of `specs`, each with its number in the
    /// model.
    pub fn of<'a>(
        specs: impl IntoIterator<Item = (usize, &'a TensorSpec)>,
        tp: usize,
        tp_rank: usize,
    ) -> Self {
        let mut slots: Vec<Slot> = Vec::new();
        for (tensor, spec) in specs {
            let slice = spec.slice(tp, tp_rank);
            let mut shape = spec.shape.clone();
            shape[slice.dim] = slice.local_len() - slice.n_padding;
            let length = (shape.iter().product::<usize>() * spec.dtype.bytes()) as u64;
            let (name, dtype) = (spec.name.clone(), spec.dtype);
            slots.push(Slot { tensor, name, dtype, shape, offset: 0, length });
        }
        // Wide types first, so that every tensor is aligned to its own type.
        let mut order: Vec<usize> = (0..slots.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(slots[i].dtype.bytes()));
        let mut end = 0;
        for &i in &order {
            slots[i].offset = end;
            end += slots[i].length;
        }
        let header = header(order.iter().map(|&i| &slots[i]));
        for slot in &mut slots {
            slot.offset += header.len() as u64;
        }
        Self { length: header.len() as u64 + end, header, slots }
    }

    /// The slot of a tensor by its canonical name.
    pub fn slot(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|slot| slot.name == name)
    }
}

fn header<'a>(slots: impl Iterator<Item = &'a Slot>) -> Vec<u8> {
    let mut entries = Map::new();
    for Slot { name, dtype, shape, offset, length, .. } in slots {
        let dtype = dtype.name().to_ascii_uppercase();
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + length]});
        entries.insert(name.clone(), entry);
    }
    let mut json = serde_json::to_vec(&Value::Object(entries)).expect("names and numbers");
    let len = (8 + json.len()).next_multiple_of(DATA_ALIGN) - 8;
    json.resize(len, b' ');
    [&(len as u64).to_le_bytes()[..], &json].concat()
}

/// The files of every rank, in order of ranks; one file where nothing is cut. `specs` are the model's, in canonical
/// order.
pub fn files(model: &ModelConfig, specs: &[TensorSpec], split: &Split) -> Vec<FileLayout> {
    let mesh = split.mesh();
    let mut held = vec![Vec::new(); split.pp()];
    for (i, spec) in specs.iter().enumerate() {
        for stage in stages_of(model, &split.stages, spec) {
            held[stage].push((i, spec));
        }
    }
    let ranks = (0..mesh.world_size()).map(Rank);
    ranks
        .map(|rank| {
            let coord = mesh.coord(rank);
            FileLayout::of(held[coord.pp].iter().copied(), split.tp, coord.tp)
        })
        .collect()
}

impl Manifest {
    /// The files that hold its tensors, in order of ranks.
    pub fn files(&self) -> Vec<FileLayout> {
        let solo = Split::solo(&self.model);
        files(&self.model, &self.specs(), self.split.as_ref().unwrap_or(&solo))
    }
}
