//! Stop strings over text that comes in pieces.
//!
//! Text that may be the beginning of a stop string is held back until it is certain. All that is emitted, put together,
//! is the text up to the beginning of the stop string that is complete first (of those that end together, the longest),
//! whatever the pieces were. It owns no tokens and no detokeniser.

/// A stop string that would match everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a stop string is empty")]
pub struct EmptyStop;

/// What has become certain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Text that is part of the sample.
    pub text: String,
    /// A stop string is complete: the sample ends behind `text`.
    pub is_stopped: bool,
}

/// Looks for stop strings in the text of one sample.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stop: Vec<String>,
    /// Pieces to come whose text is not looked at.
    n_free: usize,
    /// Text that begins with what may be the beginning of a stop string.
    held: String,
    is_stopped: bool,
}

impl StopMatcher {
    /// Looks for any of `stop` in the text of the tokens after the first `min_new_tokens`.
    pub fn new(stop: &[String], min_new_tokens: usize) -> Result<Self, EmptyStop> {
        if stop.iter().any(String::is_empty) {
            return Err(EmptyStop);
        }
        Ok(Self { stop: stop.to_vec(), n_free: min_new_tokens, held: String::new(), is_stopped: false })
    }

    /// The text of the next token, called once a token even if it has none.
    ///
    /// The text of the first `min_new_tokens` calls is emitted at once and never part of a match: a stop string counts
    /// only if it lies as a whole in the text of later calls. Text after a complete stop string is dropped.
    pub fn push(&mut self, text: &str) -> Piece {
        if self.is_stopped {
            return Piece { text: String::new(), is_stopped: true };
        }
        if self.n_free > 0 {
            self.n_free -= 1;
            return Piece { text: text.to_owned(), is_stopped: false };
        }
        self.held.push_str(text);
        if let Some(start) = self.first_match() {
            self.is_stopped = true;
            let mut text = std::mem::take(&mut self.held);
            text.truncate(start);
            return Piece { text, is_stopped: true };
        }
        let rest = self.held.split_off(self.uncertain_from());
        Piece { text: std::mem::replace(&mut self.held, rest), is_stopped: false }
    }

    /// Where the stop string begins that is complete first; of those that end together the longest.
    fn first_match(&self) -> Option<usize> {
        let matches =
            self.stop.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)));
        matches.min().map(|(_, at)| at)
    }

    /// Where the longest end of the text begins that a stop string may begin with.
    fn uncertain_from(&self) -> usize {
        let may_begin = |at: usize| self.stop.iter().any(|stop| stop.starts_with(&self.held[at..]));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        starts.find(|&at| may_begin(at)).unwrap_or(self.held.len())
    }

    /// The sample has ended: what was held back is text after all.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}
