//! Reads the fields of a config.json, collecting all that cannot be honoured instead of stopping at the first.

use dist_core::Activation;
use serde_json::{Map, Value};

use super::error::{CheckpointError, Findings, clip};

/// No dimension of a published model comes near.
const MAX_SIZE: u64 = 1 << 24;
/// Activation functions by the names that Hugging Face gives them.
const ACTIVATIONS: [(&str, Activation); 6] = [
    ("gelu", Activation::GeluErf),
    ("gelu_python", Activation::GeluErf),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
];

/// The fields of a config.json and what was found wrong with them. A field that is wrong reads as something harmless;
/// whoever reads asks [`Fields::finish`] before the values are used.
pub(super) struct Fields {
    map: Map<String, Value>,
    findings: Findings,
}

/// Parses a JSON object; an error shows the line, which names the field.
pub(super) fn object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>, CheckpointError> {
    serde_json::from_slice(bytes).map_err(|error| {
        let text = String::from_utf8_lossy(bytes);
        let line = text.lines().nth(error.line().saturating_sub(1)).unwrap_or_default().trim();
        let is_float = ["NaN", "Infinity"].iter().any(|word| line.contains(word));
        let hint = if is_float { " (NaN and Infinity are not JSON numbers)" } else { "" };
        CheckpointError::Json { file: file.to_owned(), message: format!("{error}{hint}: {}", clip(line)) }
    })
}

fn shown(value: &Value) -> String {
    match value {
        // A hostile file may hold a huge one.
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".to_owned(),
        other => clip(&other.to_string()),
    }
}

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self { map, findings: Findings::default() }
    }

    /// The field under the first of its names that is there; `null` is not there.
    fn get(&self, names: &[&str]) -> Option<&Value> {
        names.iter().find_map(|name| self.map.get(*name)).filter(|value| !value.is_null())
    }

    pub(super) fn raw(&self, name: &str) -> Option<&Value> {
        self.get(&[name])
    }

    pub(super) fn refuse(&mut self, name: &str, expected: impl Into<String>) {
        let found = self.map.get(name).map_or_else(|| "nothing".to_owned(), shown);
        self.findings.add(name, expected, found);
    }

    /// A size that must be there, by its name or an alias.
    pub(super) fn size(&mut self, names: &[&str]) -> usize {
        self.size_or(names, None)
    }

    /// A size; `default` where it is not there.
    pub(super) fn size_or(&mut self, names: &[&str], default: Option<usize>) -> usize {
        let found = match (self.get(names), default) {
            (None, Some(default)) => return default,
            (None, None) => "nothing".to_owned(),
            (Some(value), _) => match value.as_u64().filter(|size| (1..=MAX_SIZE).contains(size)) {
                Some(size) => return size as usize,
                None => shown(value),
            },
        };
        self.findings.add(names[0], format!("a whole number from 1 to {MAX_SIZE}"), found);
        1
    }

    /// Layers, bounded further since values are kept for each.
    pub(super) fn layers(&mut self, names: &[&str]) -> usize {
        const MAX_LAYERS: usize = 4096;
        let n_layers = self.size(names);
        if n_layers > MAX_LAYERS {
            self.findings.add(names[0], format!("at most {MAX_LAYERS} layers"), n_layers.to_string());
        }
        n_layers.min(MAX_LAYERS)
    }

    /// Width of a head.
    pub(super) fn d_head(&mut self, names: &[&str], d_model: usize, n_heads: usize) -> usize {
        if let Some(d_head) = dist_core::shape::div_exact(d_model, n_heads) {
            return d_head;
        }
        self.findings.add(names[0], format!("a divisor of the width {d_model}"), n_heads.to_string());
        1
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.raw(name).map(Value::as_bool) {
            None => default,
            Some(Some(flag)) => flag,
            Some(None) => {
                self.refuse(name, "true or false");
                default
            }
        }
    }

    /// What is added to a variance.
    pub(super) fn epsilon(&mut self, name: &str) -> f32 {
        match self.raw(name).map(Value::as_f64) {
            None => 1e-5,
            Some(Some(eps)) if eps.is_finite() && (eps as f32) > 0.0 && eps < 1.0 => eps as f32,
            Some(_) => {
                self.refuse(name, "a number above 0 and below 1");
                1e-5
            }
        }
    }

    pub(super) fn activation(&mut self, default: &str) -> Activation {
        let field = "activation_function";
        let name = self.raw(field).map_or(Some(default), Value::as_str);
        let known = name.and_then(|name| ACTIVATIONS.iter().find(|(known, _)| *known == name));
        if let Some((_, activation)) = known {
            return *activation;
        }
        let names: Vec<&str> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
        self.refuse(field, format!("one of {}", names.join(", ")));
        Activation::Relu
    }

    /// Refuses a field that would change the result, unless it has the only value that is supported.
    pub(super) fn only(&mut self, name: &str, supported: bool) {
        if self.flag(name, supported) != supported {
            self.refuse(name, supported.to_string());
        }
    }

    /// Refuses a field that must not be there; empty lists and objects are as good as nothing.
    pub(super) fn absent(&mut self, name: &str) {
        let is_empty = match self.raw(name) {
            None => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !is_empty {
            self.refuse(name, "nothing (not supported)");
        }
    }

    /// Token ids, one or a list. Ids that the model has no row for, as some published configurations carry, can never
    /// be drawn and are left out; −1 stands for none.
    pub(super) fn ids(&mut self, name: &str, n_vocab: usize) -> Vec<u32> {
        let values = match self.raw(name) {
            None => return Vec::new(),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        if values.len() > 64 || values.iter().any(|value| value.as_i64().is_none_or(|id| id < -1)) {
            self.refuse(name, "a token id, or a list of at most 64");
            return Vec::new();
        }
        let ids = values.iter().filter_map(Value::as_u64).filter(|&id| id < n_vocab as u64);
        ids.map(|id| id as u32).collect()
    }

    /// The error, if anything was found wrong.
    pub(super) fn finish(self, file: &str) -> Result<(), CheckpointError> {
        if self.findings.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Config { file: file.to_owned(), findings: self.findings })
    }
}
