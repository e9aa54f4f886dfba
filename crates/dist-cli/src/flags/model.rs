//! Which model.

use clap::Args;

use super::numbers;
use crate::model::ModelChoice;

/// Flags about the model.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Directory of a checkpoint, published name in the local Hugging Face cache, preset with random weights
    /// (gpt3-125m … gpt3-175b, fleetx-345m … fleetx-175b), or `demo`, the model inside this program
    #[arg(long, short, value_name = "DIR|ORG/NAME|PRESET", default_value = "demo")]
    pub model: String,
    /// Makes every second layer of a preset see only the last N positions, as GPT-3's sparse layers do
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    pub window: Option<usize>,
    /// Seed of a preset's random weights
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub weights_seed: u64,
    /// Reads the weights into memory instead of mapping the file (safe against a file that shrinks meanwhile)
    #[arg(long)]
    pub no_mmap: bool,
}

impl ModelArgs {
    /// The model that is meant; only names are looked at.
    pub fn to_choice(&self) -> anyhow::Result<ModelChoice> {
        ModelChoice::of(&self.model, self.window, self.weights_seed, !self.no_mmap)
    }
}
