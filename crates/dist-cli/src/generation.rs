//! Runs jobs to their end on an engine, keeps what they gave, and tells who watches. It writes nothing itself.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dist_kernels::Backend;
use dist_models::engine::Engine;
use dist_models::request::{Event, FinishReason, Request, RequestId, TokenLogprob};
use dist_models::scheduler::RequestError;

use crate::problem::Problem;
use crate::prompts::Job;

/// One sample of a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Its tokens.
    pub tokens: Vec<TokenLogprob>,
    /// Its text; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish: Option<FinishReason>,
    /// When its first token came, from the start of the run.
    pub first: Option<Duration>,
    /// When its last token came.
    pub last: Option<Duration>,
}

/// What a job gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Log-probabilities of the prompt's tokens after the first, if asked for.
    pub prompt_logprobs: Vec<TokenLogprob>,
    /// Its samples.
    pub samples: Vec<Sample>,
}

impl Answer {
    fn is_whole(&self) -> bool {
        self.samples.iter().all(|sample| sample.finish.is_some())
    }

    /// New tokens of all samples.
    pub fn n_new(&self) -> usize {
        self.samples.iter().map(|sample| sample.tokens.len()).sum()
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything was done.
    Whole,
    /// The user stopped it.
    Interrupted,
    /// Nobody reads the output any more.
    OutputClosed,
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// One a job, in order.
    pub answers: Vec<Answer>,
    /// How it ended.
    pub ending: Ending,
}

/// Who sees results as they come.
pub trait Watch {
    /// A token came, and text that is now certain.
    fn token(&mut self, job: usize, sample: usize, id: u32, text: &str) -> io::Result<()>;
    /// A sample ended, with text that was held back.
    fn end(&mut self, job: usize, sample: usize, text: &str) -> io::Result<()>;
    /// All samples of a job ended.
    fn answer(&mut self, job: usize, answer: &Answer) -> io::Result<()>;
}

/// Hands all jobs to the engine: whatever can be refused is refused before anything runs.
pub fn add_all<B: Backend>(engine: &mut Engine<B>, jobs: &[Job]) -> anyhow::Result<()> {
    for (idx, job) in jobs.iter().enumerate() {
        let request =
            Request { id: RequestId(idx as u64), prompt: job.ids.clone(), sampling: job.sampling.clone() };
        engine.add(request).map_err(|error| refusal(job, &error))?;
    }
    Ok(())
}

fn refusal(job: &Job, error: &RequestError) -> Problem {
    let what = job.place.as_ref().map_or_else(|| error.to_string(), |place| format!("{place}: {error}"));
    let problem = Problem::failed(what);
    match error {
        RequestError::Samples { .. } => problem.help("raise --max-seqs or lower n"),
        RequestError::NoRoom { .. } => problem.help("ask for fewer new tokens, or lower --max-seqs"),
        RequestError::UnknownToken { .. } => problem.help("use token ids of this model"),
        RequestError::StopWithoutTokenizer => problem.help("end with tokens instead: --stop-ids"),
        RequestError::PromptTooLong { .. } => problem.help("shorten the prompt; it is never cut"),
        _ => problem.help("see: dist-cli infer --help"),
    }
}

/// Steps until every job has ended, the user interrupts, or `watch` cannot write any more.
pub fn run<B: Backend>(
    engine: &mut Engine<B>,
    jobs: &[Job],
    interrupt: &AtomicBool,
    watch: &mut dyn Watch,
) -> anyhow::Result<Run> {
    let n_samples = |job: &Job| vec![Sample::default(); job.sampling.n as usize];
    let answers =
        jobs.iter().map(|job| Answer { prompt_logprobs: Vec::new(), samples: n_samples(job) }).collect();
    let start = Instant::now();
    let mut run = Run { answers, ending: Ending::Whole };
    while !engine.is_idle() {
        if interrupt.load(Ordering::Relaxed) && run.ending == Ending::Whole {
            run.ending = Ending::Interrupted;
            for idx in 0..jobs.len() {
                engine.cancel(RequestId(idx as u64));
            }
        }
        let events = engine.step()?;
        let now = start.elapsed();
        for event in events {
            match run.take(event, now, watch) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(Run { ending: Ending::OutputClosed, ..run });
                }
                Err(error) => return Err(output_problem(error).into()),
            }
        }
    }
    Ok(run)
}

/// Standard output cannot be written.
pub fn output_problem(error: io::Error) -> Problem {
    Problem::failed("cannot write to standard output").because(error).help("check that the disk has room")
}

impl Run {
    fn take(&mut self, event: Event, now: Duration, watch: &mut dyn Watch) -> io::Result<()> {
        match event {
            Event::Prompt { id, logprobs } => {
                self.answers[id.0 as usize].prompt_logprobs.extend(logprobs);
                Ok(())
            }
            Event::Token { id, sample_idx, token, text } => {
                let (job, idx) = (id.0 as usize, sample_idx as usize);
                let sample = &mut self.answers[job].samples[idx];
                let token_id = token.id;
                sample.tokens.push(token);
                sample.text.push_str(&text);
                sample.first.get_or_insert(now);
                sample.last = Some(now);
                watch.token(job, idx, token_id, &text)
            }
            Event::Finished { id, sample_idx, text, reason } => {
                let (job, idx) = (id.0 as usize, sample_idx as usize);
                let sample = &mut self.answers[job].samples[idx];
                sample.text.push_str(&text);
                sample.finish = Some(reason);
                watch.end(job, idx, &text)?;
                let answer = &self.answers[job];
                if answer.is_whole() { watch.answer(job, answer) } else { Ok(()) }
            }
        }
    }
}

/// What a set of samples took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timings {
    /// From the start to the first token.
    pub ttft: Option<Duration>,
    /// Between two tokens of a sample, on average.
    pub tpot: Option<Duration>,
    /// From the start to the last token.
    pub total: Duration,
    /// New tokens a second, from the start to the last token.
    pub tokens_per_s: Option<f64>,
}

impl Timings {
    /// Of these samples together.
    pub fn of<'a>(samples: impl Iterator<Item = &'a Sample> + Clone) -> Self {
        let ttft = samples.clone().filter_map(|sample| sample.first).min();
        let total = samples.clone().filter_map(|sample| sample.last).max().unwrap_or_default();
        let n_new: usize = samples.clone().map(|sample| sample.tokens.len()).sum();
        let gaps = samples.filter_map(|sample| {
            let n_gaps = u32::try_from(sample.tokens.len().checked_sub(1)?).ok()?;
            let gap = sample.last?.checked_sub(sample.first?)?;
            (n_gaps > 0).then_some((gap, n_gaps))
        });
        let (sum, n_gaps) = gaps.fold((Duration::ZERO, 0), |(sum, n), (gap, m)| (sum + gap, n + m));
        let tokens_per_s = (!total.is_zero()).then(|| n_new as f64 / total.as_secs_f64());
        Self { ttft, tpot: (n_gaps > 0).then(|| sum / n_gaps), total, tokens_per_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_count_gaps_between_tokens() {
        let ms = |n| Some(Duration::from_millis(n));
        let token = TokenLogprob { id: 1, logprob: 0.0, top: Vec::new() };
        let sample = |n, first, last| Sample {
            tokens: vec![token.clone(); n],
            first: ms(first),
            last: ms(last),
            ..Sample::default()
        };
        let samples = [sample(5, 10, 50), sample(1, 20, 20)];
        let timings = Timings::of(samples.iter());
        assert_eq!((timings.ttft, timings.tpot, timings.total), (ms(10), ms(10), Duration::from_millis(50)));
        assert!((timings.tokens_per_s.unwrap() - 120.0).abs() < 1e-6);
        assert_eq!(Timings::of([Sample::default()].iter()).tpot, None);
    }
}
