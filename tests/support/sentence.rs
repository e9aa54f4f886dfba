//! The sentence with which a rank ends when another one is lost, taken apart.

use std::time::Duration;

/// A line that begins with `error:`.
#[derive(Debug)]
pub(crate) struct Sentence {
    /// All of it.
    pub(crate) text: String,
    /// The rank that it blames: the first one that it names.
    pub(crate) rank: usize,
    /// How long that rank was waited for or not seen, if it says so.
    pub(crate) waited: Option<Duration>,
}

impl Sentence {
    /// The one error of a process's standard error.
    pub(crate) fn of(err: &str) -> Result<Self, String> {
        let mut errors = err.lines().filter(|line| line.starts_with("error: "));
        let (Some(text), None) = (errors.next(), errors.next()) else {
            return Err(format!("no single error in:\n{err}"));
        };
        let number = |text: &str| -> String { text.chars().take_while(char::is_ascii_digit).collect() };
        let rank = text.split("rank ").skip(1).find_map(|after| number(after).parse().ok());
        let rank = rank.ok_or_else(|| format!("no rank in: {text}"))?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let seconds = words.windows(2).find(|pair| pair[1].trim_end_matches([';', '.', ',']) == "s");
        let waited = seconds.and_then(|pair| pair[0].parse().ok()).map(Duration::from_secs_f64);
        Ok(Self { text: text.to_owned(), rank, waited })
    }
}
