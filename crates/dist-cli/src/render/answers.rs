//! Answers as JSON: one object, or one a line in the order of the prompts.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use dist_models::request::{FinishReason, TokenLogprob};
use serde::Serialize;
use serde_json::Value;

use super::{BatchBar, milliseconds};
use crate::generation::{Answer, Sample, Timings, Watch};
use crate::prompts::Job;

/// Version of the objects below.
const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct AnswerObject<'a> {
    schema_version: u32,
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<&'a str>,
    prompt_ids: &'a [u32],
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_top_logprobs: Option<Vec<Vec<TopObject>>>,
    #[serde(flatten)]
    first: SampleObject<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    samples: Option<Vec<SampleObject<'a>>>,
    timings: TimingsObject,
}

#[derive(Serialize)]
struct SampleObject<'a> {
    ids: Vec<u32>,
    text: &'a str,
    logprobs: Vec<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<Vec<Vec<TopObject>>>,
    finish_reason: Option<FinishReason>,
}

#[derive(Serialize)]
struct TopObject {
    id: u32,
    logprob: f32,
}

#[derive(Serialize)]
struct TimingsObject {
    load_ms: f64,
    ttft_ms: Option<f64>,
    tpot_ms: Option<f64>,
    total_ms: f64,
    tokens_per_s: Option<f64>,
    n_prompt_tokens: usize,
    n_new_tokens: usize,
}

fn tops(tokens: &[TokenLogprob], wanted: Option<u32>) -> Option<Vec<Vec<TopObject>>> {
    let object = |&(id, logprob): &(u32, f32)| TopObject { id, logprob };
    wanted.filter(|&n| n > 0)?;
    Some(tokens.iter().map(|token| token.top.iter().map(object).collect()).collect())
}

fn sample_object<'a>(sample: &'a Sample, job: &Job) -> SampleObject<'a> {
    SampleObject {
        ids: sample.tokens.iter().map(|token| token.id).collect(),
        text: &sample.text,
        logprobs: sample.tokens.iter().map(|token| token.logprob).collect(),
        top_logprobs: tops(&sample.tokens, job.sampling.logprobs),
        finish_reason: sample.finish,
    }
}

/// One answer as one line.
pub fn answer_json(model: &str, job: &Job, answer: &Answer, load: Duration) -> serde_json::Result<String> {
    let timings = Timings::of(answer.samples.iter());
    let scored = job.sampling.prompt_logprobs;
    let samples = || answer.samples.iter().map(|sample| sample_object(sample, job)).collect();
    let object = AnswerObject {
        schema_version: SCHEMA_VERSION,
        model,
        id: job.label.as_ref(),
        prompt: job.text.as_deref(),
        prompt_ids: &job.ids,
        prompt_logprobs: scored.then(|| answer.prompt_logprobs.iter().map(|token| token.logprob).collect()),
        prompt_top_logprobs: tops(&answer.prompt_logprobs, job.sampling.logprobs).filter(|_| scored),
        first: sample_object(&answer.samples[0], job),
        samples: (job.sampling.n > 1).then(samples),
        timings: TimingsObject {
            load_ms: milliseconds(load),
            ttft_ms: timings.ttft.map(milliseconds),
            tpot_ms: timings.tpot.map(milliseconds),
            total_ms: milliseconds(timings.total),
            tokens_per_s: timings.tokens_per_s.map(|rate| (rate * 1e3).round() / 1e3),
            n_prompt_tokens: job.ids.len(),
            n_new_tokens: answer.n_new(),
        },
    };
    serde_json::to_string(&object)
}

/// Watches without a word; the answer is rendered when it is whole.
pub struct Silent;

impl Watch for Silent {
    fn token(&mut self, _job: usize, _sample: usize, _id: u32, _text: &str) -> io::Result<()> {
        Ok(())
    }

    fn end(&mut self, _job: usize, _sample: usize, _text: &str) -> io::Result<()> {
        Ok(())
    }

    fn answer(&mut self, _job: usize, _answer: &Answer) -> io::Result<()> {
        Ok(())
    }
}

/// Writes each answer as soon as all before it are written.
pub struct JsonLines<'a, W> {
    /// Where to.
    pub out: W,
    /// Name of the model.
    pub model: &'a str,
    /// The prompts.
    pub jobs: &'a [Job],
    /// What loading took.
    pub load: Duration,
    /// How far it is.
    pub bar: BatchBar,
    /// Answers that came before their turn.
    pub early: BTreeMap<usize, String>,
    /// The next one to write.
    pub next: usize,
}

impl<W: Write> Watch for JsonLines<'_, W> {
    fn token(&mut self, _job: usize, _sample: usize, _id: u32, _text: &str) -> io::Result<()> {
        Ok(())
    }

    fn end(&mut self, _job: usize, _sample: usize, _text: &str) -> io::Result<()> {
        Ok(())
    }

    fn answer(&mut self, job: usize, answer: &Answer) -> io::Result<()> {
        let line = answer_json(self.model, &self.jobs[job], answer, self.load)?;
        self.early.insert(job, line);
        self.bar.advance();
        while let Some(line) = self.early.remove(&self.next) {
            let out = &mut self.out;
            self.bar.beside(|| writeln!(out, "{line}").and_then(|()| out.flush()))?;
            self.next += 1;
        }
        Ok(())
    }
}
