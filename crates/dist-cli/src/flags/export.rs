//! Flags of `export`, and the request that they make.

use std::path::PathBuf;

use clap::Args;
use dist_core::DType;

use super::{DegreeArgs, Degrees, numbers};
use crate::model::ModelChoice;
use crate::problem::Problem;

const AFTER_HELP: &str = "\
The directory holds weights.safetensors (this program's own tensor names,
weights [outputs, inputs]), manifest.json (model, every tensor's type, shape,
place, SHA-256 and origin), the tokenizer, and golden log-probabilities of a
fixed prompt, which infer --verify asks again. It knows no degree: any number
of ranks reads it. With --tp, --pp, --stages or --plan it is cut at once, into
OUT/inference_model_pp{PP}mp{TP}/rank_{R}.

It is written beside OUT and renamed when all of it is on the disk: a run that
is killed leaves OUT as it was.

Exit codes: 0 done, 1 the export failed, 2 a flag is wrong, 130 interrupted.

Examples:
  dist-cli export --model ~/models/gpt2 --out gpt2
  dist-cli export --model facebook/opt-125m --dtype bf16 --max-seq-len 1024 --out opt
  dist-cli export --model gpt3-1.3b --random-weights --seed 7 --out random-1.3b
  dist-cli export --model ~/models/gpt2 --tp 2 --pp 2 --out gpt2-cut
  dist-cli infer --model gpt2 --verify --prompt 'The house'";

/// Flags of `export`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct ExportArgs {
    /// Directory of a checkpoint, published name in the local Hugging Face cache, `demo`, or a preset (with
    /// --random-weights)
    #[arg(long, short, value_name = "DIR|ORG/NAME|PRESET", help_heading = "Model")]
    pub model: String,
    /// Makes a preset's weights from a seed, N(0, 0.02)
    #[arg(long, help_heading = "Model")]
    pub random_weights: bool,
    /// Seed of the random weights
    #[arg(long, value_name = "SEED", help_heading = "Model")]
    pub seed: Option<u64>,
    /// Makes every second layer of a preset see only the last N positions
    #[arg(long, value_name = "N", value_parser = numbers::count, help_heading = "Model")]
    pub window: Option<usize>,
    /// Type of all tensors: f32, f16 or bf16; by default each keeps its own
    #[arg(long, value_name = "TYPE", value_parser = dtype)]
    pub dtype: Option<DType>,
    /// Positions to keep; by default all that the model knows
    #[arg(long, visible_alias = "max-model-len", value_name = "N", value_parser = numbers::count)]
    pub max_seq_len: Option<usize>,
    /// How to cut it and where to write it.
    #[command(flatten)]
    pub cut: CutArgs,
}

/// Flags about the cut and its place.
#[derive(Args, Clone, Debug)]
pub struct CutArgs {
    /// Directory to write
    #[arg(long, short, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Replaces a checkpoint of this program that is there already
    #[arg(long)]
    pub overwrite: bool,
    /// The split.
    #[command(flatten)]
    pub degrees: DegreeArgs,
    /// Splits as a file of `dist-cli plan --json` says; takes the place of --tp, --pp and --stages
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tp", "pp", "stages"], help_heading = "Split")]
    pub plan: Option<PathBuf>,
    /// Threads that compute the golden log-probabilities; by default all cores of this process
    #[arg(long, value_name = "N", value_parser = numbers::threads)]
    pub threads: Option<usize>,
    /// Writes one JSON object
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// How to cut, and where to.
#[derive(Clone, Debug)]
pub struct CutRequest {
    /// The degrees, as far as they were asked for.
    pub degrees: Degrees,
    /// The plan whose split is taken.
    pub plan: Option<PathBuf>,
    /// The directory.
    pub out: Option<PathBuf>,
    /// Whether what is there is replaced.
    pub overwrite: bool,
    /// Threads that compute.
    pub threads: usize,
    /// Whether to write JSON.
    pub json: bool,
}

/// What `export` shall do.
#[derive(Clone, Debug)]
pub struct ExportRequest {
    /// The model.
    pub model: ModelChoice,
    /// Type of all tensors.
    pub dtype: Option<DType>,
    /// Positions to keep.
    pub max_seq_len: Option<usize>,
    /// How to cut, and where to.
    pub cut: CutRequest,
}

impl CutArgs {
    /// The request; no file is opened.
    pub fn into_request(self) -> anyhow::Result<CutRequest> {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(CutRequest {
            degrees: self.degrees.to_degrees()?,
            plan: self.plan,
            out: self.out,
            overwrite: self.overwrite,
            threads: self.threads.unwrap_or_else(cores),
            json: self.json,
        })
    }
}

impl ExportArgs {
    /// Everything that can be wrong without opening a file is said here.
    pub fn into_request(self) -> anyhow::Result<ExportRequest> {
        let seed = self.seed.unwrap_or(0);
        let model = ModelChoice::of(&self.model, self.window, seed, false)?;
        let is_preset = matches!(model, ModelChoice::Preset { .. });
        if is_preset && !self.random_weights {
            let problem = Problem::usage(format!("{} is a shape without weights", self.model));
            return Err(problem.help("add --random-weights to make some from a --seed").into());
        }
        if !is_preset && (self.random_weights || self.seed.is_some()) {
            let flag = if self.random_weights { "--random-weights" } else { "--seed" };
            let problem = Problem::usage(format!("{flag} is for presets, {} has weights", self.model));
            return Err(problem.help(format!("leave {flag} out, or name a preset such as gpt3-125m")).into());
        }
        let cut = self.cut.into_request()?;
        if cut.out.is_none() {
            return Err(Problem::usage("export needs a directory to write").help("add --out DIR").into());
        }
        Ok(ExportRequest { model, dtype: self.dtype, max_seq_len: self.max_seq_len, cut })
    }
}

fn dtype(text: &str) -> Result<DType, String> {
    DType::parse(text).ok_or_else(|| "must be f32, f16 or bf16".to_owned())
}
