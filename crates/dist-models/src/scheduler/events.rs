//! What the scheduler tells: what became of samples, and how busy it is.

use crate::request::{FinishReason, RequestId, TokenLogprob};

/// What a step, or a call between steps, did to a sample. Text is the engine's.
#[derive(Clone, Debug, PartialEq)]
pub enum Commit {
    /// The next prompt tokens' log-probabilities, once a request whatever its number of samples.
    Prompt {
        /// The request.
        id: RequestId,
        /// In order; the first of all is the second prompt token's.
        logprobs: Vec<TokenLogprob>,
    },
    /// A new token.
    Token {
        /// The request.
        id: RequestId,
        /// Which of its samples.
        sample_idx: u32,
        /// The token.
        token: TokenLogprob,
        /// It ended the sample as a stop token: it counts as a token, but its text is no part of the sample's.
        is_stop: bool,
    },
    /// A sample ended; nothing more comes for it.
    Finished {
        /// The request.
        id: RequestId,
        /// Which of its samples.
        sample_idx: u32,
        /// Why.
        reason: FinishReason,
    },
}

/// How busy the scheduler is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Samples that hold blocks.
    pub n_running: usize,
    /// Samples that wait for room.
    pub n_waiting: usize,
    /// Blocks that nobody holds.
    pub n_free_blocks: usize,
    /// Times that a sample gave up its blocks, since the start.
    pub n_preemptions: u64,
}
