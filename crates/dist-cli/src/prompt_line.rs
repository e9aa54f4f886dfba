//! One line of a `--prompts` file. Pure: text in, value or error out; lines come from outside and may hold anything.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

/// Bytes of the longest line that is looked at.
pub const MAX_LINE_BYTES: usize = 16 << 20;
/// Most tokens of a prompt, stop strings, stop ids or biases on a line.
pub const MAX_LIST_LEN: usize = 1 << 20;

/// The fields, with the names that others use for them.
pub const FIELDS: [&str; 23] = [
    "prompt",
    "prompt_ids",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "max_new_tokens",
    "max_tokens",
    "min_new_tokens",
    "min_tokens",
    "stop",
    "stop_ids",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "logprobs",
    "echo",
    "id",
];

/// Why a line is no prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LineError {
    /// It is longer than [`MAX_LINE_BYTES`].
    TooLong(usize),
    /// A field that means nothing.
    UnknownField(String),
    /// It is no JSON, or a field has the wrong type; the sentence says which.
    Json(String),
    /// Neither `prompt` nor `prompt_ids`, or both.
    Prompt,
    /// A list of more than [`MAX_LIST_LEN`] entries.
    LongList(&'static str),
    /// A key of `logit_bias` that is no token id.
    BiasKey(String),
}

impl std::fmt::Display for LineError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooLong(bytes) => write!(f, "{bytes} bytes, at most {MAX_LINE_BYTES}"),
            Self::UnknownField(name) => write!(f, "unknown field {name:?}"),
            Self::Json(told) => f.write_str(told),
            Self::Prompt => f.write_str("needs either prompt or prompt_ids"),
            Self::LongList(field) => write!(f, "{field} has more than {MAX_LIST_LEN} entries"),
            Self::BiasKey(key) => write!(f, "logit_bias has a key that is no token id: {key:?}"),
        }
    }
}

impl std::error::Error for LineError {}

/// What a line asks for. A field that is not there, or null, leaves the flag's value.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLine {
    /// Where to go on from.
    pub prompt: LinePrompt,
    /// The fields that it has.
    pub overrides: Overrides,
}

/// A prompt as a line has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinePrompt {
    /// Text.
    Text(String),
    /// Tokens.
    Ids(Vec<u32>),
}

/// Sampling fields of a line.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overrides {
    prompt: Option<String>,
    prompt_ids: Option<Vec<u32>>,
    /// Given back with the answer.
    pub id: Option<Value>,
    /// See the flags.
    pub temperature: Option<f32>,
    /// See the flags.
    pub top_k: Option<u32>,
    /// See the flags.
    pub top_p: Option<f32>,
    /// See the flags.
    pub min_p: Option<f32>,
    /// See the flags.
    pub seed: Option<u64>,
    /// See the flags.
    pub repetition_penalty: Option<f32>,
    /// See the flags.
    pub presence_penalty: Option<f32>,
    /// See the flags.
    pub frequency_penalty: Option<f32>,
    #[serde(rename = "logit_bias")]
    bias: Option<BTreeMap<String, f32>>,
    /// See the flags.
    #[serde(skip)]
    pub logit_bias: Option<Vec<(u32, f32)>>,
    /// See the flags.
    #[serde(alias = "max_tokens")]
    pub max_new_tokens: Option<usize>,
    /// See the flags.
    #[serde(alias = "min_tokens")]
    pub min_new_tokens: Option<usize>,
    #[serde(rename = "stop")]
    stops: Option<OneOrMany>,
    /// See the flags.
    #[serde(skip)]
    pub stop: Option<Vec<String>>,
    /// See the flags.
    #[serde(alias = "stop_token_ids")]
    pub stop_ids: Option<Vec<u32>>,
    /// See the flags.
    pub ignore_eos: Option<bool>,
    /// See the flags.
    pub n: Option<u32>,
    /// See the flags.
    pub logprobs: Option<u32>,
    /// See the flags.
    pub echo: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Reads one line.
pub fn parse_prompt_line(line: &str) -> Result<PromptLine, LineError> {
    if line.len() > MAX_LINE_BYTES {
        return Err(LineError::TooLong(line.len()));
    }
    let mut overrides: Overrides = serde_json::from_str(line).map_err(|error| refusal(line, &error))?;
    let prompt = match (overrides.prompt.take(), overrides.prompt_ids.take()) {
        (Some(text), None) => LinePrompt::Text(text),
        (None, Some(ids)) => LinePrompt::Ids(ids),
        _ => return Err(LineError::Prompt),
    };
    overrides.stop = overrides.stops.take().map(|stops| match stops {
        OneOrMany::One(stop) => vec![stop],
        OneOrMany::Many(stops) => stops,
    });
    let bias = overrides.bias.take().map(|bias| {
        let id = |(key, value): (String, f32)| match key.parse() {
            Ok(id) => Ok((id, value)),
            Err(_) => Err(LineError::BiasKey(key)),
        };
        bias.into_iter().map(id).collect::<Result<Vec<_>, _>>()
    });
    overrides.logit_bias = bias.transpose()?;
    let lens = [
        ("prompt_ids", if let LinePrompt::Ids(ids) = &prompt { ids.len() } else { 0 }),
        ("stop", overrides.stop.as_ref().map_or(0, Vec::len)),
        ("stop_ids", overrides.stop_ids.as_ref().map_or(0, Vec::len)),
        ("logit_bias", overrides.logit_bias.as_ref().map_or(0, Vec::len)),
    ];
    match lens.into_iter().find(|(_, len)| *len > MAX_LIST_LEN) {
        Some((field, _)) => Err(LineError::LongList(field)),
        None => Ok(PromptLine { prompt, overrides }),
    }
}

/// Names the unknown field if that is what is wrong, else says what serde says, without its line number.
fn refusal(line: &str, error: &serde_json::Error) -> LineError {
    if let Ok(object) = serde_json::from_str::<Map<String, Value>>(line)
        && let Some(name) = object.keys().find(|name| !FIELDS.contains(&name.as_str()))
    {
        return LineError::UnknownField(name.clone());
    }
    let told = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let column = format!(" at column {}", error.column());
    LineError::Json(told.replace(&place, &column))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_override_flags() {
        let line = parse_prompt_line(
            r#"{"prompt":"a","max_tokens":3,"stop":"x","logit_bias":{"5":-1.5},"temperature":null,"id":"q1"}"#,
        );
        let line = line.unwrap();
        assert_eq!(line.prompt, LinePrompt::Text("a".into()));
        let Overrides { max_new_tokens, stop, logit_bias, temperature, id, .. } = line.overrides;
        assert_eq!((max_new_tokens, stop, temperature), (Some(3), Some(vec!["x".to_owned()]), None));
        assert_eq!((logit_bias, id), (Some(vec![(5, -1.5)]), Some(Value::from("q1"))));
        let ids = parse_prompt_line(r#"{"prompt_ids":[1,2],"stop":["a","b"]}"#).unwrap();
        assert_eq!(ids.prompt, LinePrompt::Ids(vec![1, 2]));
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        let told = |line: &str| parse_prompt_line(line).unwrap_err().to_string();
        assert_eq!(told(r#"{"prompt":"a","temprature":1}"#), r#"unknown field "temprature""#);
        assert_eq!(told("{}"), "needs either prompt or prompt_ids");
        assert_eq!(told(r#"{"prompt":"a","prompt_ids":[1]}"#), "needs either prompt or prompt_ids");
        assert!(told(r#"{"prompt":"a","n":-1}"#).contains("invalid value: integer `-1`"));
        assert!(told("[1]").contains("expected"), "{}", told("[1]"));
        assert!(told("nonsense").contains("at column"), "{}", told("nonsense"));
        assert!(told(r#"{"prompt":"a","logit_bias":{"x":1}}"#).contains("no token id"));
        assert!(told(r#"{"prompt":"a","n":1,"n":2}"#).contains("duplicate field"));
        assert!(told(&" ".repeat(MAX_LINE_BYTES + 1)).contains("at most"));
        assert!(parse_prompt_line(&"[".repeat(10_000)).is_err());
    }

    #[test]
    fn the_list_of_fields_is_complete() {
        for name in FIELDS {
            let line = format!(r#"{{"prompt":"a","{name}":null}}"#);
            let told = parse_prompt_line(&line).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(!told.contains("unknown"), "{told}");
        }
    }
}
