//! What a user asks for and what comes back, as values. Text stays outside but for stop strings.

use serde::{Deserialize, Serialize};

/// How tokens are drawn and when to stop. Every field is meant as it is written; there is no default here.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Keeps the k likeliest; 0 keeps all.
    pub top_k: u32,
    /// Keeps the likeliest tokens until their sum reaches p; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same tokens, whatever else runs.
    pub seed: u64,
    /// Samples of the prompt.
    pub n: u32,
    /// At most this many new tokens a sample.
    pub max_new_tokens: usize,
    /// Stop tokens and stop strings do not count before this many new tokens.
    pub min_new_tokens: usize,
    /// Texts that end a sample; they are not part of its text.
    pub stop: Vec<String>,
    /// Tokens that end a sample beside the model's own.
    pub stop_ids: Vec<u32>,
    /// Goes on past the model's end-of-text token.
    pub ignore_eos: bool,
    /// Reports the log-probability of each new token, and of this many of the likeliest.
    pub logprobs: Option<u32>,
    /// Reports the log-probability of each prompt token after the first, with as many of the likeliest.
    pub prompt_logprobs: bool,
}

impl Sampling {
    /// The likeliest token each time, nothing else: no penalty, no report, one sample, the model's own end.
    pub const fn greedy(max_new_tokens: usize) -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            n: 1,
            max_new_tokens,
            min_new_tokens: 0,
            stop: Vec::new(),
            stop_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: false,
        }
    }
}

/// Names a request within an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// A prompt and what to do with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Its name.
    pub id: RequestId,
    /// Tokens, at least one.
    pub prompt: Vec<u32>,
    /// The rest.
    pub sampling: Sampling,
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token, the model's end-of-text token, or a stop string.
    Stop,
    /// `max_new_tokens`, or the end of the context.
    Length,
    /// The user took it back.
    Cancelled,
}

/// The log-probability of one token and of the likeliest at its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Its log-probability under the model.
    pub logprob: f32,
    /// The likeliest tokens with theirs, best first.
    pub top: Vec<(u32, f32)>,
}

/// Something that happened to a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Log-probabilities of prompt tokens, in order; the first event starts with the second token.
    Prompt {
        /// The request.
        id: RequestId,
        /// The next ones.
        logprobs: Vec<TokenLogprob>,
    },
    /// A new token. Text may lag behind tokens: it never ends in half a character nor inside a possible stop string.
    Token {
        /// The request.
        id: RequestId,
        /// Which of its samples.
        sample_idx: u32,
        /// The token, with its log-probability.
        token: TokenLogprob,
        /// Text that is now certain; empty without a tokenizer.
        text: String,
    },
    /// A sample ended.
    Finished {
        /// The request.
        id: RequestId,
        /// Which of its samples.
        sample_idx: u32,
        /// Text that was held back until now.
        text: String,
        /// Why.
        reason: FinishReason,
    },
}
