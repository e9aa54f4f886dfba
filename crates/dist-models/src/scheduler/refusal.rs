//! What a request must be to be taken in. Every user error of a request ends here, none inside a step.

use crate::kv_blocks::BlockPool;
use crate::request::{Request, RequestId, Sampling};
use crate::scheduler::Limits;
use crate::scheduler::sequence::n_rows_max;
use crate::stop::EmptyStop;

/// Most tokens whose log-probabilities are reported at a place.
pub const MAX_LOGPROBS: u32 = dist_core::plan::MAX_TOP as u32;

/// Why a request cannot be served, now or ever.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Another request of that name is still here.
    #[error("a request with this id has not ended yet: {}", id.0)]
    DuplicateId {
        /// The name.
        id: RequestId,
    },
    /// There is nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt leaves no room for a new token.
    #[error(
        "the prompt is too long: {prompt_len} tokens (longest that leaves room: {longest}, context: {max_seq_len})"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_len: usize,
        /// Tokens of the longest prompt that would do.
        longest: usize,
        /// Tokens of the context.
        max_seq_len: usize,
    },
    /// Nothing is asked for.
    #[error("max_new_tokens is 0 and no prompt log-probabilities are asked for: nothing to do")]
    NothingToDo,
    /// A number that has no meaning.
    #[error("{name} must be {allowed}: {value}")]
    OutOfRange {
        /// The field.
        name: &'static str,
        /// What it may be.
        allowed: &'static str,
        /// What it is.
        value: f32,
    },
    /// No samples, or more than run at once.
    #[error("n must be from 1 to {max_seqs} (the sequences that run at once): {n}")]
    Samples {
        /// Samples asked for.
        n: u32,
        /// Sequences that run at once.
        max_seqs: usize,
    },
    /// More log-probabilities than are ever reported.
    #[error("logprobs must be at most {max}: {n}")]
    TooManyLogprobs {
        /// Asked for.
        n: u32,
        /// The bound.
        max: u32,
    },
    /// A token that the vocabulary lacks.
    #[error("{place} has a token outside the vocabulary of {n_vocab}: {id}")]
    UnknownToken {
        /// The field.
        place: &'static str,
        /// The token.
        id: u32,
        /// Tokens of the vocabulary.
        n_vocab: usize,
    },
    /// The KV cache could not hold one sample even if it were alone.
    #[error(
        "the KV cache is too small for prompt and new tokens: {available} blocks of {block_size} tokens (needed: {needed})"
    )]
    NoRoom {
        /// Blocks needed.
        needed: usize,
        /// Blocks there are.
        available: usize,
        /// Tokens of a block.
        block_size: usize,
    },
    /// Stop strings are found in text, and there is no tokenizer to make any.
    #[error("stop strings need a tokenizer, use stop ids instead")]
    StopWithoutTokenizer,
    /// A stop string that would match everywhere.
    #[error(transparent)]
    EmptyStop(#[from] EmptyStop),
    /// No engine is left that could serve it.
    #[error("the engine has failed and takes no more requests, build a new one: {first}")]
    EngineFailed {
        /// What went wrong first.
        first: String,
    },
}

/// Checks all that can be said without knowing the other requests.
pub(crate) fn check(
    request: &Request,
    limits: &Limits,
    pool: &BlockPool,
    n_vocab: usize,
) -> Result<(), RequestError> {
    check_lengths(request, limits)?;
    check_numbers(&request.sampling)?;
    check_counts(&request.sampling, limits)?;
    check_tokens(request, n_vocab)?;
    if request.sampling.stop.iter().any(String::is_empty) {
        return Err(EmptyStop.into());
    }
    let needed = pool.blocks_for(n_rows_max(request, limits));
    let (available, block_size) = (pool.n_blocks(), pool.block_size());
    if needed > available {
        return Err(RequestError::NoRoom { needed, available, block_size });
    }
    Ok(())
}

fn check_lengths(request: &Request, limits: &Limits) -> Result<(), RequestError> {
    let (prompt_len, max_seq_len) = (request.prompt.len(), limits.max_seq_len);
    let sampling = &request.sampling;
    if prompt_len == 0 {
        return Err(RequestError::EmptyPrompt);
    }
    if sampling.max_new_tokens == 0 && !sampling.prompt_logprobs {
        return Err(RequestError::NothingToDo);
    }
    let longest = max_seq_len.saturating_sub(usize::from(sampling.max_new_tokens > 0));
    if prompt_len > longest {
        return Err(RequestError::PromptTooLong { prompt_len, longest, max_seq_len });
    }
    Ok(())
}

fn check_numbers(sampling: &Sampling) -> Result<(), RequestError> {
    let at_least_0 = |x: f32| x.is_finite() && x >= 0.0;
    let fraction = |x: f32| (0.0..=1.0).contains(&x);
    let s = sampling;
    let rules = [
        ("temperature", "a finite number of at least 0", s.temperature, at_least_0(s.temperature)),
        ("top_p", "above 0 and at most 1", s.top_p, fraction(s.top_p) && s.top_p > 0.0),
        ("min_p", "from 0 to 1", s.min_p, fraction(s.min_p)),
        (
            "repetition_penalty",
            "a finite number above 0",
            s.repetition_penalty,
            at_least_0(s.repetition_penalty) && s.repetition_penalty > 0.0,
        ),
        ("presence_penalty", "a finite number", s.presence_penalty, s.presence_penalty.is_finite()),
        ("frequency_penalty", "a finite number", s.frequency_penalty, s.frequency_penalty.is_finite()),
    ];
    if let Some(&(name, allowed, value, _)) = rules.iter().find(|(.., holds)| !holds) {
        return Err(RequestError::OutOfRange { name, allowed, value });
    }
    // An infinite bias bans or forces a token; only NaN has no meaning.
    match s.logit_bias.iter().find(|(_, bias)| bias.is_nan()) {
        Some(&(_, value)) => Err(RequestError::OutOfRange { name: "logit_bias", allowed: "a number", value }),
        None => Ok(()),
    }
}

fn check_counts(sampling: &Sampling, limits: &Limits) -> Result<(), RequestError> {
    let (n, max_seqs) = (sampling.n, limits.max_seqs);
    if n == 0 || n as usize > max_seqs {
        return Err(RequestError::Samples { n, max_seqs });
    }
    match sampling.logprobs {
        Some(n) if n > MAX_LOGPROBS => Err(RequestError::TooManyLogprobs { n, max: MAX_LOGPROBS }),
        _ => Ok(()),
    }
}

fn check_tokens(request: &Request, n_vocab: usize) -> Result<(), RequestError> {
    let sampling = &request.sampling;
    let prompt = request.prompt.iter().map(|&id| ("prompt", id));
    let bias = sampling.logit_bias.iter().map(|&(id, _)| ("logit_bias", id));
    let stop_ids = sampling.stop_ids.iter().map(|&id| ("stop_ids", id));
    match prompt.chain(bias).chain(stop_ids).find(|&(_, id)| id as usize >= n_vocab) {
        Some((place, id)) => Err(RequestError::UnknownToken { place, id, n_vocab }),
        None => Ok(()),
    }
}
