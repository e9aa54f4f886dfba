//! The sizes that memory is taken for.

use clap::Args;

use super::numbers;
use crate::problem::Problem;

/// Flags about sizes.
#[expect(clippy::struct_field_names, reason = "fields are named as the flags are")]
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sizes")]
pub struct LimitArgs {
    /// Tokens of the longest sequence, prompt and new ones; by default the model's context
    #[arg(long, visible_alias = "max-model-len", value_name = "N", value_parser = numbers::count)]
    pub max_seq_len: Option<usize>,
    /// Tokens of one step: longer prompts are taken in chunks; by default 512 on a CPU, 8192 on a GPU
    #[arg(long, visible_alias = "max-num-batched-tokens", value_name = "N", value_parser = numbers::count)]
    pub max_batch_tokens: Option<usize>,
    /// Sequences that run at the same time; by default as many as there are, at most 16 on a CPU, 256 on a GPU
    #[arg(long, visible_alias = "max-num-seqs", value_name = "N", value_parser = numbers::count)]
    pub max_seqs: Option<usize>,
}

/// Refuses a step that has no room for a token of each of the `running` sequences.
pub fn check_room(max_batch_tokens: Option<usize>, running: usize) -> Result<(), Problem> {
    let Some(tokens) = max_batch_tokens.filter(|&tokens| tokens < running) else { return Ok(()) };
    let what = format!(
        "--max-batch-tokens {tokens} is less than the {running} sequences that run at the same time: a step has a token \
         of each"
    );
    let help = format!("raise it to {running}, or let sequences wait: --max-seqs {tokens}");
    Err(Problem::usage(what).help(help))
}
