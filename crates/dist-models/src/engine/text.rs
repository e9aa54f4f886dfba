//! Turns committed tokens into text: one stream a sample, stop strings looked for on the way.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::request::{Event, FinishReason, Request, RequestId, Sampling};
use crate::scheduler::{Commit, RequestError, Scheduler};
use crate::stop::{Piece, StopMatcher};
use crate::tokenizer::{TextStream, Tokenizer};

/// The text of one sample.
struct SampleText {
    stream: TextStream,
    stop: StopMatcher,
}

/// The texts of all samples that are going on.
pub(super) struct Texts {
    tokenizer: Option<Arc<Tokenizer>>,
    samples: BTreeMap<(RequestId, u32), SampleText>,
}

impl Texts {
    pub(super) fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self { tokenizer, samples: BTreeMap::new() }
    }

    /// Prepares the texts of a request's samples. The scheduler has looked at the rest of it.
    pub(super) fn begin(&mut self, id: RequestId, s: &Sampling) {
        let Some(tokenizer) = &self.tokenizer else { return };
        for sample_idx in 0..s.n {
            let stop = StopMatcher::new(&s.stop, s.min_new_tokens)
                .expect("the scheduler refuses empty stop strings");
            let stream = TextStream::new(Arc::clone(tokenizer));
            self.samples.insert((id, sample_idx), SampleText { stream, stop });
        }
    }

    /// Refuses what only text can serve where there is none.
    pub(super) fn check(&self, request: &Request) -> Result<(), RequestError> {
        if self.tokenizer.is_none() && !request.sampling.stop.is_empty() {
            return Err(RequestError::StopWithoutTokenizer);
        }
        Ok(())
    }

    /// Events of what was committed. A sample whose text comes to a stop string is ended here.
    pub(super) fn events(&mut self, commits: Vec<Commit>, scheduler: &mut Scheduler) -> Vec<Event> {
        let mut events = Vec::with_capacity(commits.len());
        for commit in commits {
            match commit {
                Commit::Prompt { id, logprobs } => events.push(Event::Prompt { id, logprobs }),
                Commit::Token { id, sample_idx, token, is_stop } => {
                    let piece = self.push(id, sample_idx, token.id, is_stop);
                    events.push(Event::Token { id, sample_idx, token, text: piece.text });
                    if piece.is_stopped {
                        scheduler.finish(id, sample_idx, FinishReason::Stop);
                        self.samples.remove(&(id, sample_idx));
                        let (text, reason) = (String::new(), FinishReason::Stop);
                        events.push(Event::Finished { id, sample_idx, text, reason });
                    }
                }
                Commit::Finished { id, sample_idx, reason } => {
                    // A stop string in the sample's last token has told its end already.
                    if self.tokenizer.is_none() || self.samples.contains_key(&(id, sample_idx)) {
                        let text = self.finish(id, sample_idx);
                        events.push(Event::Finished { id, sample_idx, text, reason });
                    }
                }
            }
        }
        events
    }

    fn push(&mut self, id: RequestId, sample_idx: u32, token: u32, is_stop: bool) -> Piece {
        match self.samples.get_mut(&(id, sample_idx)) {
            Some(sample) if !is_stop => {
                let text = sample.stream.push(token);
                sample.stop.push(&text)
            }
            _ => Piece { text: String::new(), is_stopped: false },
        }
    }

    /// What was held back of a sample that has ended.
    fn finish(&mut self, id: RequestId, sample_idx: u32) -> String {
        let Some(mut sample) = self.samples.remove(&(id, sample_idx)) else { return String::new() };
        let rest = sample.stream.finish();
        let piece = sample.stop.push(&rest);
        if piece.is_stopped { piece.text } else { piece.text + &sample.stop.flush() }
    }
}
