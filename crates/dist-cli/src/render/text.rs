//! Text as it comes: each piece is written and flushed at once. Of several samples the first unfinished one streams
//! and the others wait their turn, so that each text is whole.

use std::io::{self, Write};

use crate::generation::{Answer, Watch};

/// Streams the samples of one prompt.
pub struct TextWatch<W> {
    out: W,
    /// Written before each sample.
    prompt: String,
    /// Whether tokens are written as numbers, for want of text.
    as_ids: bool,
    current: usize,
    waiting: Vec<Waiting>,
    ends_line: bool,
}

#[derive(Clone, Default)]
struct Waiting {
    text: String,
    has_ended: bool,
}

impl<W: Write> TextWatch<W> {
    /// `prompt` is written before each of `n_samples` texts.
    pub fn new(out: W, prompt: String, n_samples: usize, as_ids: bool) -> Self {
        let waiting = vec![Waiting::default(); n_samples];
        Self { out, prompt, as_ids, current: 0, waiting, ends_line: true }
    }

    /// Writes the prompt, before there is any answer.
    pub fn begin(&mut self) -> io::Result<()> {
        let prompt = self.prompt.clone();
        self.write(&prompt)
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.ends_line = text.ends_with('\n');
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    fn piece(&mut self, sample: usize, text: &str) -> io::Result<()> {
        if sample == self.current {
            return self.write(text);
        }
        self.waiting[sample].text.push_str(text);
        Ok(())
    }
}

impl<W: Write> Watch for TextWatch<W> {
    fn token(&mut self, _job: usize, sample: usize, id: u32, text: &str) -> io::Result<()> {
        if self.as_ids { self.piece(sample, &format!("{id} ")) } else { self.piece(sample, text) }
    }

    fn end(&mut self, _job: usize, sample: usize, text: &str) -> io::Result<()> {
        self.piece(sample, text)?;
        self.waiting[sample].has_ended = true;
        while self.waiting.get(self.current).is_some_and(|waiting| waiting.has_ended) {
            if !self.ends_line {
                self.write("\n")?;
            }
            self.current += 1;
            if let Some(waiting) = self.waiting.get_mut(self.current) {
                let text = std::mem::take(&mut waiting.text);
                self.write("\n")?;
                self.begin()?;
                self.write(&text)?;
            }
        }
        Ok(())
    }

    fn answer(&mut self, _job: usize, _answer: &Answer) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_stay_apart() {
        let mut out = Vec::new();
        let mut watch = TextWatch::new(&mut out, "P".into(), 3, false);
        watch.begin().unwrap();
        for (sample, text) in [(0, " a"), (1, " b"), (2, " c"), (0, "a"), (2, "c")] {
            watch.token(0, sample, 0, text).unwrap();
        }
        watch.end(0, 2, "!").unwrap();
        watch.end(0, 0, "\n").unwrap();
        watch.token(0, 1, 0, "b").unwrap();
        watch.end(0, 1, "").unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "P aa\n\nP bb\n\nP cc!\n");
    }

    #[test]
    fn tokens_without_text_are_numbers() {
        let mut out = Vec::new();
        let mut watch = TextWatch::new(&mut out, String::new(), 1, true);
        watch.token(0, 0, 5, "").unwrap();
        watch.token(0, 0, 17, "").unwrap();
        watch.end(0, 0, "").unwrap();
        assert_eq!(out, b"5 17 \n");
    }
}
