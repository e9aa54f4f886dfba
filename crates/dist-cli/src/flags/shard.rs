//! Flags of `shard`, and the request that they make.

use clap::Args;

use super::export::{CutArgs, CutRequest};
use crate::model::ModelChoice;
use crate::problem::Problem;

const AFTER_HELP: &str = "\
Takes any checkpoint: of Hugging Face, exported, or cut for another split, and
writes OUT/inference_model_pp{PP}mp{TP}/rank_{R}. Without degrees (or with
--tp 1 --pp 1) it joins the parts again: OUT is then an exported directory, byte
for byte. Cutting beforehand is optional: ranks of infer read their own bytes of
an uncut directory too.

Copying takes less than 100 MB of memory whatever the model's size; a model of
Hugging Face is asked for its golden log-probabilities too, a layer at a time.
All bytes are hashed on the way, and compared to the source's hashes where it
has some. It is written beside its place and renamed when all of it is on the
disk: a run that is killed leaves what was there as it was.

Exit codes: 0 done, 1 it failed or hashes differ, 2 a flag is wrong, 130 interrupted.

Examples:
  dist-cli shard --model exported --tp 2 --pp 2 --out cut
  dist-cli shard --model exported --tp 2 --stages 10,14 --dry-run
  dist-cli shard --model ~/models/gpt2 --plan plan.json --out cut
  dist-cli shard --model cut/inference_model_pp2mp2 --tp 4 --out cut
  dist-cli shard --model cut/inference_model_pp2mp2 --verify
  dist-cli infer --model cut/inference_model_pp2mp2 --tp 2 --pp 2";

/// Flags of `shard`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct ShardArgs {
    /// Directory of a checkpoint, cut or not, published name in the local Hugging Face cache, or `demo`
    #[arg(long, short, value_name = "DIR|ORG/NAME")]
    pub model: String,
    /// Says what each rank would hold, and writes nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Compares every hash of an exported or cut directory, and writes nothing
    #[arg(long, conflicts_with_all = ["dry_run", "out", "overwrite", "tp", "pp", "stages", "plan"])]
    pub verify: bool,
    /// How to cut it and where to write it.
    #[command(flatten)]
    pub cut: CutArgs,
}

/// What to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Write it.
    Write,
    /// Say what would be written.
    List,
    /// Compare its hashes.
    Verify,
}

/// What `shard` shall do.
#[derive(Clone, Debug)]
pub struct ShardRequest {
    /// The model.
    pub model: ModelChoice,
    /// What to do with it.
    pub task: Task,
    /// How to cut, and where to.
    pub cut: CutRequest,
}

impl ShardArgs {
    /// Everything that can be wrong without opening a file is said here.
    pub fn into_request(self) -> anyhow::Result<ShardRequest> {
        let model = ModelChoice::of(&self.model, None, 0, false)?;
        let task = match (self.verify, self.dry_run) {
            (true, _) => Task::Verify,
            (_, true) => Task::List,
            _ => Task::Write,
        };
        // What a preset would be cut into can be told; there is nothing to cut.
        if matches!(model, ModelChoice::Preset { .. }) && task != Task::List {
            let problem = Problem::usage(format!("{} is a shape without weights", self.model));
            let help =
                format!("make some: dist-cli export --model {} --random-weights --out DIR", self.model);
            return Err(problem.help(help).into());
        }
        let cut = self.cut.into_request()?;
        if cut.out.is_none() && task == Task::Write {
            let problem = Problem::usage("shard needs a directory to write");
            return Err(problem.help("add --out DIR, or --dry-run to see what would be written").into());
        }
        Ok(ShardRequest { model, task, cut })
    }
}
