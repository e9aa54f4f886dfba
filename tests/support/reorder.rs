//! A fixture's model with its inner dimensions in another order: the same mathematics, other orders of summation.
//!
//! Residual width, embedding width, the MLP's hidden units, heads and the elements of a head are each permuted in every
//! tensor that has them. Only the files are rewritten, so what runs is the product as it is.

use dist_core::philox::{philox4x32, stream_key};
use dist_kernels::weight::HostBytes;
use dist_models::checkpoint::Checkpoint;
use serde_json::{Map, Value};

use super::fixtures::repo;

/// What a dimension of a tensor counts, and so which permutation it gets.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Axis {
    /// Tokens and positions stay.
    Fixed,
    /// Elements of the residual stream.
    Model,
    /// Elements of an embedding.
    Embed,
    /// Hidden units of a layer's MLP.
    Hidden,
    /// Elements of a layer's queries or keys, by heads.
    Query,
    /// Elements of a layer's values, by heads.
    Value,
    /// Queries, keys and values of a layer after each other.
    Qkv,
}

use Axis::{Embed, Fixed, Hidden, Model, Qkv, Query, Value as Values};

/// How the name of a linear layer, a table or a norm ends; its outputs; its inputs.
const NAMES: [(&str, Axis, Axis); 21] = [
    ("wte", Fixed, Embed),
    ("embed_tokens", Fixed, Embed),
    ("lm_head", Fixed, Embed),
    ("wpe", Fixed, Model),
    ("embed_positions", Fixed, Model),
    ("project_in", Model, Embed),
    ("project_out", Embed, Model),
    ("ln_1", Model, Fixed),
    ("ln_2", Model, Fixed),
    ("ln_f", Model, Fixed),
    ("layer_norm", Model, Fixed),
    ("attn.c_attn", Qkv, Model),
    ("attn.c_proj", Model, Values),
    ("q_proj", Query, Model),
    ("k_proj", Query, Model),
    ("v_proj", Values, Model),
    ("out_proj", Model, Values),
    ("mlp.c_fc", Hidden, Model),
    ("mlp.c_proj", Model, Hidden),
    ("fc1", Hidden, Model),
    ("fc2", Model, Hidden),
];

/// Draws the permutations of one order.
struct Orders {
    seed: u64,
    n_heads: usize,
    /// Whether embeddings go through a projection; elsewhere they are the residual stream itself.
    has_projections: bool,
    /// Whether linear layers are stored `[inputs, outputs]`.
    is_conv: bool,
}

/// The fixture with every inner dimension permuted as `seed` says.
pub(crate) fn reordered(name: &str, seed: u64) -> Checkpoint {
    let dir = repo().join("tests/fixtures").join(name);
    let config_json = std::fs::read(dir.join("config.json")).expect("config.json");
    let config: Value = serde_json::from_slice(&config_json).expect("a configuration");
    let heads = ["n_head", "num_attention_heads", "num_heads"];
    let n_heads = heads.iter().find_map(|field| config[*field].as_u64()).expect("a number of heads") as usize;
    let mut bytes = std::fs::read(dir.join("model.safetensors")).expect("model.safetensors");
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..data]).expect("a header");
    let has_projections = header.keys().any(|name| name.contains("project_in"));
    let orders = Orders { seed, n_heads, has_projections, is_conv: config["model_type"] == "gpt2" };
    for (tensor, entry) in header.iter().filter(|(tensor, _)| *tensor != "__metadata__") {
        assert_eq!(entry["dtype"], "F32", "{tensor}");
        let range = numbers(&entry["data_offsets"]);
        let (_, data) = bytes.split_at_mut(data);
        orders.permute(tensor, &numbers(&entry["shape"]), &mut data[range[0]..range[1]]);
    }
    Checkpoint::from_bytes(name, &config_json, HostBytes::new(bytes), None).expect("a permuted fixture opens")
}

fn numbers(value: &Value) -> Vec<usize> {
    let list = value.as_array().expect("a list");
    list.iter().map(|n| n.as_u64().expect("a number") as usize).collect()
}

impl Orders {
    fn permute(&self, tensor: &str, shape: &[usize], bytes: &mut [u8]) {
        let (stem, _) = tensor.rsplit_once('.').expect("a weight or a bias");
        let row = NAMES.iter().find(|(end, ..)| stem.ends_with(end));
        let &(end, outputs, inputs) = row.unwrap_or_else(|| panic!("{tensor} is in no list"));
        let is_conv = self.is_conv && end.contains("c_");
        // A vector is a matrix of one row.
        let ((rows, n_rows), (columns, n_columns)) = match *shape {
            [len] => ((Fixed, 1), (outputs, len)),
            [k, n] if is_conv => ((inputs, k), (outputs, n)),
            [n, k] => ((outputs, n), (inputs, k)),
            _ => panic!("{tensor} has shape {shape:?}"),
        };
        // The number of the layer, if the name has one.
        let layer = tensor.split('.').find(|part| part.parse::<usize>().is_ok()).unwrap_or("");
        let (rows, columns) = (self.order(rows, layer, n_rows), self.order(columns, layer, n_columns));
        let old = bytes.to_owned();
        let mut places = bytes.chunks_exact_mut(4);
        for row in rows {
            for (column, place) in columns.iter().zip(&mut places) {
                let at = 4 * (row * n_columns + column);
                place.copy_from_slice(&old[at..at + 4]);
            }
        }
    }

    /// For each place of a dimension, which old place it takes its element from.
    fn order(&self, axis: Axis, layer: &str, len: usize) -> Vec<usize> {
        let d_head = len / self.n_heads;
        match axis {
            Fixed => (0..len).collect(),
            Model => self.draw("model", len),
            Embed => self.draw(if self.has_projections { "embed" } else { "model" }, len),
            Hidden => self.draw(&format!("hidden {layer}"), len),
            Query | Values => {
                let heads = self.draw(&format!("heads {layer}"), self.n_heads);
                let within = self.draw(&format!("{axis:?} {layer}"), d_head);
                heads.iter().flat_map(|head| within.iter().map(move |i| head * d_head + i)).collect()
            }
            Qkv => {
                let part = |(idx, axis)| {
                    let order = self.order(axis, layer, len / 3);
                    order.into_iter().map(move |i| idx * (len / 3) + i)
                };
                [Query, Query, Values].into_iter().enumerate().flat_map(part).collect()
            }
        }
    }

    /// The permutation of `len` elements with this name: Fisher and Yates.
    fn draw(&self, name: &str, len: usize) -> Vec<usize> {
        let key = stream_key(self.seed, name);
        let mut order: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            let drawn = philox4x32([last as u32, 0, 0, 0], key)[0] as usize;
            order.swap(last, drawn % (last + 1));
        }
        order
    }
}
