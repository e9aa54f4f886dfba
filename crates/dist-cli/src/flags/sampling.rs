//! How tokens are drawn and when to stop.

use clap::Args;
use dist_models::request::Sampling;

use super::numbers;

/// Flags about sampling.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Divides the logits; 0 always takes the likeliest token
    #[arg(long, value_name = "T", value_parser = numbers::at_least_0, default_value = "0.8", allow_negative_numbers = true)]
    pub temperature: f32,
    /// Draws from the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: u32,
    /// Draws from the likeliest tokens that together reach probability P; 1 keeps all
    #[arg(long, value_name = "P", value_parser = numbers::share, default_value = "1", allow_negative_numbers = true)]
    pub top_p: f32,
    /// Draws from tokens at least P times as likely as the likeliest; 0 keeps all
    #[arg(long, value_name = "P", value_parser = numbers::share_or_0, default_value = "0", allow_negative_numbers = true)]
    pub min_p: f32,
    /// Seed: the same request with the same seed gives the same tokens
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
    /// Makes tokens seen before less likely; 1 is off
    #[arg(long, value_name = "X", value_parser = numbers::above_0, default_value = "1", allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens in the output; 0 is off
    #[arg(long, value_name = "X", value_parser = numbers::finite, default_value = "0", allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Taken from the logits of tokens once per occurrence in the output; 0 is off
    #[arg(long, value_name = "X", value_parser = numbers::finite, default_value = "0", allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Added to the logit of a token; may be given several times
    #[arg(long, value_name = "ID=VALUE", value_parser = numbers::bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// At most this many new tokens
    #[arg(long, visible_alias = "max-tokens", value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Nothing ends the text before this many new tokens
    #[arg(long, visible_alias = "min-tokens", value_name = "N", default_value_t = 0)]
    pub min_new_tokens: usize,
    /// Text that ends the output and is no part of it; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = numbers::some_text, allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Token ids that end the output
    #[arg(long, visible_alias = "stop-token-ids", value_name = "ID,…", value_delimiter = ',')]
    pub stop_ids: Vec<u32>,
    /// Goes on past the model's end-of-text token
    #[arg(long)]
    pub ignore_eos: bool,
    /// Samples of each prompt
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub n: u32,
    /// Tells the log-probabilities of the new tokens, and of the K likeliest beside each
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(0..=64))]
    pub logprobs: Option<u32>,
    /// Writes the prompt before the new text; with --json tells the prompt's log-probabilities
    #[arg(long)]
    pub echo: bool,
}

impl SamplingArgs {
    /// The same as a value of the engine. `scores` asks for log-probabilities even where no flag does.
    pub fn to_sampling(&self, scores: bool) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            n: self.n,
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            stop: self.stop.clone(),
            stop_ids: self.stop_ids.clone(),
            ignore_eos: self.ignore_eos,
            logprobs: self.logprobs.or(scores.then_some(0)),
            prompt_logprobs: self.echo && scores,
        }
    }
}
