//! The supported families of published models: how each spells its configuration and its tensors. One value a family.

mod gpt2;
mod gpt_neo;
mod opt;

use dist_core::ModelConfig;
use dist_kernels::weight::Layout;
use serde_json::Value;

use super::error::{CheckpointError, clip};
use super::fields::{Fields, object};

/// Where a canonical tensor's values are in a family's files.
pub(super) struct Row {
    /// Canonical name without `layers.N.` and without `.weight` or `.bias`.
    canonical: &'static str,
    /// The family's name for it, likewise; several are stacked along the outputs.
    stored: &'static [&'static str],
    /// How weights lie.
    layout: Layout,
}

const fn nk(canonical: &'static str, stored: &'static [&'static str]) -> Row {
    Row { canonical, stored, layout: Layout::Nk }
}

const fn kn(canonical: &'static str, stored: &'static [&'static str]) -> Row {
    Row { canonical, stored, layout: Layout::Kn }
}

/// A family of published models.
pub(super) struct Family {
    /// `model_type` of its config.json.
    pub(super) name: &'static str,
    /// What tensor names may begin with, longest first.
    prefixes: &'static [&'static str],
    /// What the names of a layer's tensors begin with, before the layer's number.
    layer: &'static str,
    /// Tensors of each layer.
    in_layer: &'static [Row],
    /// The others.
    whole: &'static [Row],
    /// Buffers of each layer that hold no weights.
    masks: &'static [&'static str],
    read: fn(&mut Fields) -> ModelConfig,
}

const FAMILIES: [&Family; 3] = [&gpt2::FAMILY, &gpt_neo::FAMILY, &opt::FAMILY];

/// The names of a canonical tensor in a family's files, prefixes left out.
pub(super) struct Stored {
    pub(super) names: Vec<String>,
    pub(super) layout: Layout,
}

impl Family {
    /// Where `canonical` is stored.
    pub(super) fn stored(&self, canonical: &str) -> Option<Stored> {
        let (stem, kind) = canonical.rsplit_once('.')?;
        let in_layer = stem.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
        let (rows, stem, prefix) = match in_layer {
            Some((layer, stem)) => (self.in_layer, stem, format!("{}.{layer}.", self.layer)),
            None => (self.whole, stem, String::new()),
        };
        let row = rows.iter().find(|row| row.canonical == stem)?;
        let names = row.stored.iter().map(|name| format!("{prefix}{name}.{kind}")).collect();
        Some(Stored { names, layout: row.layout })
    }

    /// A name as found in a file, without its prefix.
    pub(super) fn bare<'a>(&self, name: &'a str) -> &'a str {
        self.prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
    }

    /// Whether a tensor that is not among the model's may be there all the same: attention masks, and a head's own copy
    /// of the table that it is tied to.
    pub(super) fn is_ignored(&self, bare: &str, config: &ModelConfig) -> bool {
        if bare == "lm_head.weight" {
            return config.tied_head;
        }
        let mask = bare.strip_prefix(self.layer).and_then(|rest| rest.strip_prefix('.')?.split_once('.'));
        mask.is_some_and(|(layer, mask)| {
            self.masks.contains(&mask) && layer.parse().is_ok_and(|layer: usize| layer < config.n_layers)
        })
    }
}

/// Reads a config.json. The weights' type is not known from it; `weight_dtype` is filled in from the tensors.
pub(super) fn read_config(
    file: &str,
    name: &str,
    config_json: &[u8],
    generation_json: Option<(&str, &[u8])>,
) -> Result<(&'static Family, ModelConfig), CheckpointError> {
    let map = object(file, config_json)?;
    let found = map.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let Some(family) = FAMILIES.iter().find(|family| family.name == found) else {
        let supported: Vec<&str> = FAMILIES.iter().map(|family| family.name).collect();
        return Err(CheckpointError::Family {
            file: file.to_owned(),
            found: clip(found),
            supported: supported.join(", "),
        });
    };
    let mut fields = Fields::new(map);
    fields.only("is_encoder_decoder", false);
    fields.only("add_cross_attention", false);
    fields.absent("quantization_config");
    fields.absent("pruned_heads");
    let mut config = (family.read)(&mut fields);
    name.clone_into(&mut config.name);
    config.bos_id = fields.ids("bos_token_id", config.n_vocab).first().copied();
    config.eos_ids = fields.ids("eos_token_id", config.n_vocab);
    fields.finish(file)?;
    if let Some((file, json)) = generation_json {
        // What ends a text is said here where both files say it, as Hugging Face's generate has it.
        let mut fields = Fields::new(object(file, json)?);
        let eos_ids = fields.ids("eos_token_id", config.n_vocab);
        fields.finish(file)?;
        if !eos_ids.is_empty() {
            config.eos_ids = eos_ids;
        }
    }
    if let Err(errors) = config.check() {
        let mut findings = super::error::Findings::default();
        for error in errors {
            findings.add(error.field, error.expected, error.found);
        }
        return Err(CheckpointError::Config { file: file.to_owned(), findings });
    }
    Ok((*family, config))
}
