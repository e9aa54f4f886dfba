//! Where prompts come from: text is read and lines are parsed before any model is opened, then turned into tokens.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use dist_models::request::Sampling;
use serde_json::Value;

use crate::model::Model;
use crate::problem::{Problem, did_you_mean};
use crate::prompt_line::{FIELDS, LineError, LinePrompt, MAX_LINE_BYTES, Overrides, parse_prompt_line};

/// Bytes of the longest prompt that is read.
const MAX_PROMPT_BYTES: u64 = 64 << 20;
/// What a model without a tokenizer goes on from when nothing is asked.
const DEFAULT_IDS: [u32; 4] = [1, 2, 3, 4];

/// What the user pointed at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PromptSource {
    /// Nothing.
    Default,
    /// A text.
    Text(String),
    /// The text of a file.
    File(PathBuf),
    /// The text of standard input.
    StandardInput,
    /// Tokens.
    Ids(Vec<u32>),
    /// Many prompts, one a line.
    Lines(PathBuf),
}

/// What a prompt is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Default,
    Text(String),
    Ids(Vec<u32>),
}

/// A prompt as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    content: Content,
    sampling: Sampling,
    /// The line that it stood on.
    place: Option<String>,
    label: Option<Value>,
}

/// A prompt ready to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its text, unless it came as tokens.
    pub text: Option<String>,
    /// Its tokens.
    pub ids: Vec<u32>,
    /// How to go on.
    pub sampling: Sampling,
    /// The line that it stood on.
    pub place: Option<String>,
    /// The user's name for it.
    pub label: Option<Value>,
}

/// Reads what `source` points at; `sampling` is for all that say nothing else.
pub fn read(source: PromptSource, sampling: &Sampling) -> anyhow::Result<Vec<Prompt>> {
    let one = |content| vec![Prompt { content, sampling: sampling.clone(), place: None, label: None }];
    Ok(match source {
        PromptSource::Default => one(Content::Default),
        PromptSource::Text(text) => one(Content::Text(text)),
        PromptSource::Ids(ids) => one(Content::Ids(ids)),
        PromptSource::StandardInput => one(Content::Text(text_of(io::stdin().lock(), "standard input")?)),
        PromptSource::File(path) => {
            let file = open(&path)?;
            one(Content::Text(text_of(file, &path.display().to_string())?))
        }
        PromptSource::Lines(path) if path == Path::new("-") => {
            lines(io::stdin().lock(), "standard input", sampling)?
        }
        PromptSource::Lines(path) => {
            lines(BufReader::new(open(&path)?), &path.display().to_string(), sampling)?
        }
    })
}

fn open(path: &Path) -> anyhow::Result<File> {
    let problem = |error: io::Error| {
        let problem = Problem::failed(format!("cannot read {}", path.display())).because(error);
        problem.help("check that the file exists and that you may read it")
    };
    let file = File::open(path).map_err(problem)?;
    let meta = file.metadata().map_err(problem)?;
    if meta.is_dir() {
        return Err(Problem::failed(format!("cannot read {}: is a directory", path.display()))
            .help("give a file")
            .into());
    }
    Ok(file)
}

/// A whole text without its last line end.
fn text_of(reader: impl Read, name: &str) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let problem = |error: io::Error| Problem::failed(format!("cannot read {name}")).because(error);
    reader.take(MAX_PROMPT_BYTES + 1).read_to_end(&mut bytes).map_err(problem)?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        return Err(Problem::failed(format!("{name} is longer than {MAX_PROMPT_BYTES} bytes")).into());
    }
    let mut text = utf8(bytes, name)?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

fn utf8(bytes: Vec<u8>, name: &str) -> anyhow::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let problem = Problem::failed(format!("{name} is not UTF-8: byte {at} starts no character"));
        problem.help("convert it first: iconv -t UTF-8").into()
    })
}

/// Every line is parsed before any is run; the first bad one is named.
fn lines(mut reader: impl BufRead, name: &str, sampling: &Sampling) -> anyhow::Result<Vec<Prompt>> {
    let mut prompts = Vec::new();
    for number in 1.. {
        let place = format!("{name}:{number}");
        let mut bytes = Vec::new();
        let problem = |error: io::Error| Problem::failed(format!("cannot read {name}")).because(error);
        let bounded = (&mut reader).take(MAX_LINE_BYTES as u64 + 2);
        if { bounded }.read_until(b'\n', &mut bytes).map_err(problem)? == 0 {
            break;
        }
        let line = utf8(bytes, &place)?;
        let line = line.strip_prefix('\u{FEFF}').filter(|_| number == 1).unwrap_or(&line);
        if line.trim().is_empty() {
            continue;
        }
        let parsed = parse_prompt_line(line.trim_end()).map_err(|error| refusal(&place, &error))?;
        let content = match parsed.prompt {
            LinePrompt::Text(text) => Content::Text(text),
            LinePrompt::Ids(ids) => Content::Ids(ids),
        };
        let label = parsed.overrides.id.clone();
        let sampling = overridden(sampling, parsed.overrides);
        prompts.push(Prompt { content, sampling, place: Some(place), label });
    }
    if prompts.is_empty() {
        let problem = Problem::failed(format!("{name} has no prompts"));
        return Err(problem.help("write one JSON object a line, such as {\"prompt\": \"…\"}").into());
    }
    Ok(prompts)
}

fn refusal(place: &str, error: &LineError) -> anyhow::Error {
    let help = match error {
        LineError::UnknownField(name) => did_you_mean(name, FIELDS),
        _ => None,
    };
    let help = help.unwrap_or_else(|| "the fields are listed by: dist-cli infer --help".to_owned());
    Problem::failed(format!("{place}: {error}")).help(help).into()
}

fn overridden(flags: &Sampling, line: Overrides) -> Sampling {
    let flags = flags.clone();
    Sampling {
        temperature: line.temperature.unwrap_or(flags.temperature),
        top_k: line.top_k.unwrap_or(flags.top_k),
        top_p: line.top_p.unwrap_or(flags.top_p),
        min_p: line.min_p.unwrap_or(flags.min_p),
        repetition_penalty: line.repetition_penalty.unwrap_or(flags.repetition_penalty),
        presence_penalty: line.presence_penalty.unwrap_or(flags.presence_penalty),
        frequency_penalty: line.frequency_penalty.unwrap_or(flags.frequency_penalty),
        logit_bias: line.logit_bias.unwrap_or(flags.logit_bias),
        seed: line.seed.unwrap_or(flags.seed),
        n: line.n.unwrap_or(flags.n),
        max_new_tokens: line.max_new_tokens.unwrap_or(flags.max_new_tokens),
        min_new_tokens: line.min_new_tokens.unwrap_or(flags.min_new_tokens),
        stop: line.stop.unwrap_or(flags.stop),
        stop_ids: line.stop_ids.unwrap_or(flags.stop_ids),
        ignore_eos: line.ignore_eos.unwrap_or(flags.ignore_eos),
        logprobs: line.logprobs.or(flags.logprobs),
        prompt_logprobs: line.echo.unwrap_or(flags.prompt_logprobs),
    }
}

/// Turns prompts into tokens of `model`, and refuses those that leave no room within `max_seq_len`.
pub fn encode(prompts: Vec<Prompt>, model: &Model, max_seq_len: usize) -> anyhow::Result<Vec<Job>> {
    let job = |prompt: Prompt| {
        let Prompt { content, sampling, place, label } = prompt;
        let at = |what: String| place.as_ref().map_or(what.clone(), |place| format!("{place}: {what}"));
        let (text, ids) = match content {
            Content::Ids(ids) => (None, ids),
            Content::Text(text) => (Some(text.clone()), tokens(&text, model)?),
            Content::Default => match model.default_prompt() {
                Some(text) => (Some(text.to_owned()), tokens(text, model)?),
                None => (None, DEFAULT_IDS.to_vec()),
            },
        };
        if ids.is_empty() {
            let problem = Problem::failed(at("the prompt is empty".to_owned()));
            return Err(problem.help("give at least one character to go on from").into());
        }
        let room = usize::from(sampling.max_new_tokens > 0);
        if ids.len() + room > max_seq_len {
            return Err(too_long(at, ids.len(), max_seq_len, model).into());
        }
        Ok(Job { text, ids, sampling, place, label })
    };
    prompts.into_iter().map(job).collect()
}

fn too_long(at: impl Fn(String) -> String, len: usize, max_seq_len: usize, model: &Model) -> Problem {
    let n_ctx = model.config().n_ctx;
    let what = format!("the prompt has {len} tokens, too many for a context of {max_seq_len} with a new one");
    let help = if max_seq_len < n_ctx && len < n_ctx {
        format!("raise --max-seq-len: {} knows up to {n_ctx}", model.name)
    } else {
        "shorten the prompt; it is never cut".to_owned()
    };
    Problem::failed(at(what)).help(help)
}

fn tokens(text: &str, model: &Model) -> anyhow::Result<Vec<u32>> {
    // No text is no tokens, whatever a tokenizer puts before every text.
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let Some(tokenizer) = &model.tokenizer else {
        let problem =
            Problem::failed(format!("{} has no tokenizer, so text means nothing to it", model.name));
        return Err(problem.help("give tokens: --prompt-ids 5,17,42").into());
    };
    Ok(tokenizer.encode(text)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::help_of;

    fn sampling() -> Sampling {
        use clap::FromArgMatches;
        let command = <crate::flags::SamplingArgs as clap::Args>::augment_args(clap::Command::new("a"));
        let matches = command.try_get_matches_from(["a", "--seed", "7"]).unwrap();
        crate::flags::SamplingArgs::from_arg_matches(&matches).unwrap().to_sampling(true)
    }

    #[test]
    fn one_line_end_is_no_part_of_a_prompt() {
        let text = |bytes: &[u8]| text_of(bytes, "a").unwrap();
        assert_eq!([text(b"a\n\n"), text(b"a\r\n"), text(b"a"), text(b"\n")], ["a\n", "a", "a", ""]);
        let error = text_of(&b"ab\xff"[..], "standard input").unwrap_err();
        assert_eq!(error.to_string(), "standard input is not UTF-8: byte 2 starts no character");
    }

    #[test]
    fn lines_keep_the_flags_that_they_do_not_name() {
        let text = "{\"prompt\":\"a\",\"temperature\":0}\n\n{\"prompt_ids\":[3],\"echo\":true}\r\n";
        let prompts = lines(text.as_bytes(), "p", &sampling()).unwrap();
        assert_eq!(prompts[1].place.as_deref(), Some("p:3"));
        assert_eq!((prompts[0].sampling.temperature, prompts[0].sampling.seed), (0.0, 7));
        assert_eq!((prompts[1].sampling.temperature, prompts[1].sampling.prompt_logprobs), (0.8, true));
    }

    #[test]
    fn a_bad_line_is_named() {
        let refused = |text: &[u8]| lines(text, "p", &sampling()).unwrap_err();
        let error = refused(b"{\"prompt\":\"a\"}\n{\"prompt\":\"a\",\"tempature\":1}\n");
        assert_eq!(error.to_string(), "p:2: unknown field \"tempature\"");
        assert!(help_of(&error).unwrap().starts_with("did you mean temperature"));
        assert!(refused(b"{\"prompt\":\"\xff\"}").to_string().starts_with("p:1 is not UTF-8"));
        assert_eq!(refused(b"\n").to_string(), "p has no prompts");
    }
}
