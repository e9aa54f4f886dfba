//! Which model a name means, and the model once it is open: headers and tokenizer, no weights yet.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dist_core::{ModelConfig, presets};
use dist_kernels::weight::HostBytes;
use dist_models::checkpoint::{self, Checkpoint, HfCache, OpenOptions, is_repo_name};
use dist_models::tokenizer::Tokenizer;

use crate::problem::{Problem, did_you_mean};

/// The name of the model inside this program.
const DEMO: &str = "demo";
const DEMO_CONFIG: &[u8] = include_bytes!("../assets/demo-model/config.json");
const DEMO_TOKENIZER: &[u8] = include_bytes!("../assets/demo-model/tokenizer.json");
static DEMO_WEIGHTS: &[u8] = include_bytes!("../assets/demo-model/model.safetensors");

/// What the demo model goes on from when nothing is asked.
const DEMO_PROMPT: &str = "ROMEO.\nBut soft! what light";
const ANY_PROMPT: &str = "Once upon a time";

/// A model by name, not yet looked at.
#[derive(Clone, Debug)]
pub enum ModelChoice {
    /// The model inside this program.
    Demo,
    /// A published shape with random weights.
    Preset {
        /// The shape.
        config: Box<ModelConfig>,
        /// Seed of the weights.
        weights_seed: u64,
    },
    /// A directory.
    Directory {
        /// Where.
        path: PathBuf,
        /// Whether its files are mapped.
        mmap: bool,
    },
    /// `org/model` in the local Hugging Face cache.
    Published {
        /// Its name.
        name: String,
        /// Whether its files are mapped.
        mmap: bool,
    },
}

impl ModelChoice {
    /// What `name` means: a preset's name, a directory, a published name. An unknown name is refused with those nearby.
    pub fn of(name: &str, window: Option<usize>, weights_seed: u64, mmap: bool) -> anyhow::Result<Self> {
        if let Some(config) = presets::preset(name, window) {
            return Ok(Self::Preset { config: Box::new(config), weights_seed });
        }
        if window.is_some() {
            let problem = Problem::usage(format!("--window is for presets, {name} has its own"));
            return Err(problem.help("leave --window out").into());
        }
        if name == DEMO {
            return Ok(Self::Demo);
        }
        let path = Path::new(name);
        if path.exists() {
            return Ok(Self::Directory { path: path.to_owned(), mmap });
        }
        if is_repo_name(name) {
            return Ok(Self::Published { name: name.to_owned(), mmap });
        }
        if name.contains(['/', std::path::MAIN_SEPARATOR]) || name.starts_with('.') {
            return Ok(Self::Directory { path: path.to_owned(), mmap });
        }
        let known = || presets::names().chain([DEMO]);
        let all =
            || format!("there are {}, directories, and org/model", known().collect::<Vec<_>>().join(", "));
        let help = did_you_mean(name, known()).unwrap_or_else(all);
        Err(Problem::usage(format!("no model is called {name:?}: neither a preset nor a directory"))
            .help(help)
            .into())
    }

    /// Opens it: reads and checks headers, touches no weights.
    pub fn open(&self) -> anyhow::Result<Model> {
        let (checkpoint, holding) = match self {
            Self::Demo => {
                let weights = HostBytes::new(DEMO_WEIGHTS);
                let demo = Checkpoint::from_bytes(DEMO, DEMO_CONFIG, weights, Some(DEMO_TOKENIZER))?;
                (demo, Holding::Embedded)
            }
            Self::Preset { config, weights_seed } => {
                (Checkpoint::random((**config).clone(), *weights_seed), Holding::Random)
            }
            Self::Directory { path, mmap } => (open_directory(path, *mmap)?, Holding::of_file(*mmap)),
            Self::Published { name, mmap } => {
                let path = checkpoint::find(name, &cache()?)?;
                (open_directory(&path, *mmap)?, Holding::of_file(*mmap))
            }
        };
        let tokenizer = checkpoint.tokenizer()?.map(Arc::new);
        Ok(Model { name: self.name(checkpoint.config()), checkpoint, tokenizer, holding })
    }

    /// Where its files are.
    pub fn directory(&self) -> anyhow::Result<PathBuf> {
        match self {
            Self::Directory { path, .. } => Ok(path.clone()),
            Self::Published { name, .. } => Ok(checkpoint::find(name, &cache()?)?),
            Self::Demo | Self::Preset { .. } => {
                let problem = Problem::usage("only a directory has hashes to compare");
                Err(problem.help("give the directory of an exported or cut checkpoint").into())
            }
        }
    }

    fn name(&self, config: &ModelConfig) -> String {
        match self {
            Self::Demo => DEMO.to_owned(),
            Self::Published { name, .. } => name.clone(),
            Self::Preset { .. } | Self::Directory { .. } => config.name.clone(),
        }
    }
}

fn open_directory(path: &Path, mmap: bool) -> anyhow::Result<Checkpoint> {
    Ok(Checkpoint::open(path, &OpenOptions { mmap })?)
}

/// Where Hugging Face's tools keep what they have downloaded; `None` without a home.
pub fn cache_dir() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(hub_dir) = var("HF_HUB_CACHE") {
        return Some(hub_dir);
    }
    let home = || var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    let hf_home = var("HF_HOME").or_else(|| Some(home()?.join("huggingface")))?;
    Some(hf_home.join("hub"))
}

fn cache() -> anyhow::Result<HfCache> {
    let hub_dir = cache_dir().ok_or_else(|| {
        Problem::usage("neither HF_HOME nor HOME is set: no Hugging Face cache to look in")
            .help("set HF_HOME, or give a directory")
    })?;
    Ok(HfCache { hub_dir })
}

/// How a model's weights are in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Part of the program.
    Embedded,
    /// A mapped file, whose pages the system may drop and read again.
    Mapped,
    /// Read from a file.
    Read,
    /// Made from a seed.
    Random,
}

impl Holding {
    fn of_file(mmap: bool) -> Self {
        if mmap { Self::Mapped } else { Self::Read }
    }
}

/// An open model.
pub struct Model {
    /// Name for people.
    pub name: String,
    /// Configuration and weights.
    pub checkpoint: Checkpoint,
    /// Text to tokens and back, if the model knows how.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// How the weights will be in memory.
    pub holding: Holding,
}

impl Model {
    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        self.checkpoint.config()
    }

    /// What to go on from when nothing is asked; `None` where there is no text.
    pub fn default_prompt(&self) -> Option<&'static str> {
        self.tokenizer.as_ref()?;
        Some(if self.holding == Holding::Embedded { DEMO_PROMPT } else { ANY_PROMPT })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{exit_of, help_of};

    fn of(name: &str) -> anyhow::Result<ModelChoice> {
        ModelChoice::of(name, None, 0, true)
    }

    #[test]
    fn names_mean_what_they_look_like() {
        assert!(matches!(of("demo"), Ok(ModelChoice::Demo)));
        assert!(matches!(of("gpt3-125m"), Ok(ModelChoice::Preset { .. })));
        assert!(matches!(of("facebook/opt-125m"), Ok(ModelChoice::Published { .. })));
        assert!(matches!(of("./nothing"), Ok(ModelChoice::Directory { .. })));
        assert!(matches!(of("."), Ok(ModelChoice::Directory { .. })));
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_nearby() {
        let error = of("gpt3-1.3B").unwrap_err();
        assert_eq!(exit_of(&error) as u8, 2);
        assert!(help_of(&error).unwrap().starts_with("did you mean gpt3-1.3b"), "{error}");
        assert!(help_of(&of("zzz").unwrap_err()).unwrap().contains("gpt3-175b"));
    }

    #[test]
    fn a_window_is_for_presets() {
        assert!(ModelChoice::of("gpt3-125m", Some(256), 0, true).is_ok());
        assert!(ModelChoice::of("demo", Some(256), 0, true).is_err());
    }
}
