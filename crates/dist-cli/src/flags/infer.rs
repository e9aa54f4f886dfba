//! Flags of `infer`, and the request that they make.

use clap::parser::ValueSource;
use clap::{ArgMatches, Args};

use super::{DeviceArgs, LimitArgs, MeshArgs, ModelArgs, SamplingArgs};
use crate::flags::{DeviceRequest, MeshRequest};
use crate::model::ModelChoice;
use crate::problem::Problem;
use crate::prompts::PromptSource;
use dist_models::request::Sampling;

const AFTER_HELP: &str = "\
The new text goes to standard output as it comes, everything else to standard
error. The defaults (temperature 0.8, the 40 likeliest tokens, seed 0) make
lively text that is the same each time; --temperature 0 is greedy.

Each line of a --prompts file is an object with `prompt` (text) or
`prompt_ids`, and any of the sampling flags as fields: temperature, top_k,
top_p, min_p, seed, repetition_penalty, presence_penalty, frequency_penalty,
logit_bias ({\"ID\": VALUE}), max_new_tokens, min_new_tokens, stop, stop_ids,
ignore_eos, n, logprobs, echo; `id` comes back with the answer. A wrong line is
refused by its number before anything runs.

--json writes one object: schema_version, model, prompt, prompt_ids, ids, text,
logprobs of the new tokens, top_logprobs with --logprobs, prompt_logprobs with
--echo (one per prompt token after the first), finish_reason, timings; with -n
also samples.

Exit codes: 0 done, 1 the run failed, 2 a flag is wrong, 130 interrupted (the text until then is kept).

Examples:
  dist-cli infer
  dist-cli infer --prompt 'ROMEO.' --temperature 0 --max-new-tokens 48
  echo 'Once upon a time' | dist-cli infer --model ~/models/gpt2 -
  dist-cli infer --model facebook/opt-125m --prompt 'The house' --stop '.' --json
  dist-cli infer --model gpt3-125m --prompt-ids 5,17,42 --threads 2
  dist-cli infer --model exported --verify --prompt 'The house'
  dist-cli infer --prompts prompts.jsonl > answers.jsonl
  dist-cli infer --model ~/models/gpt2-xl --tp 2 --pp 2
  dist-cli infer --model ~/models/gpt2-xl --tp 2 --nnodes 2 --node-rank 0 --master node1:29500 --secret-file secret
  mpirun -n 4 dist-cli infer --model ~/models/gpt2-xl --tp 2 --pp 2";

/// Flags of `infer`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct InferArgs {
    /// Where the prompts come from.
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// How to draw.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// How much memory to take.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Where to run.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// On how many ranks.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Asks the probe prompt first, and refuses to go on where the log-probabilities are not those of the export
    #[arg(long, help_heading = "Model")]
    pub verify: bool,
    /// Writes one JSON object instead of text
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// Flags about the prompt.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Prompt")]
pub struct PromptArgs {
    /// `-` reads the prompt from standard input
    #[arg(value_name = "-", value_parser = ["-"], hide_possible_values = true)]
    pub input: Option<String>,
    /// Text to go on from; `-` is standard input
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// File whose text to go on from, without its last line end; `-` is standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<String>,
    /// Token ids to go on from; needs no tokenizer
    #[arg(long, value_name = "ID,…", value_delimiter = ',')]
    pub prompt_ids: Option<Vec<u32>>,
    /// Many prompts, a JSON object a line; answers likewise, in the same order; `-` is standard input
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: Option<String>,
}

const PROMPT_FLAGS: [&str; 5] = ["input", "prompt", "prompt_file", "prompt_ids", "prompts"];

impl PromptArgs {
    /// Forgets prompts of the environment where the command line has one.
    pub fn settle(&mut self, matches: &ArgMatches) {
        let source = |id| matches.value_source(id);
        if !PROMPT_FLAGS.iter().any(|id| source(id) == Some(ValueSource::CommandLine)) {
            return;
        }
        let is_outside = |id| source(id) == Some(ValueSource::EnvVariable);
        self.prompt.take_if(|_| is_outside("prompt"));
        self.prompt_file.take_if(|_| is_outside("prompt_file"));
        self.prompt_ids.take_if(|_| is_outside("prompt_ids"));
        self.prompts.take_if(|_| is_outside("prompts"));
    }

    fn into_source(self) -> anyhow::Result<PromptSource> {
        let Self { input, prompt, prompt_file, prompt_ids, prompts } = self;
        let text = |prompt: String| match prompt.as_str() {
            "-" => PromptSource::StandardInput,
            _ => PromptSource::Text(prompt),
        };
        let file = |path: String| match path.as_str() {
            "-" => PromptSource::StandardInput,
            _ => PromptSource::File(path.into()),
        };
        let given = [
            ("-", input.map(|_| PromptSource::StandardInput)),
            ("--prompt", prompt.map(text)),
            ("--prompt-file", prompt_file.map(file)),
            ("--prompt-ids", prompt_ids.map(PromptSource::Ids)),
            ("--prompts", prompts.map(|path| PromptSource::Lines(path.into()))),
        ];
        let mut given = given.into_iter().filter_map(|(flag, source)| Some((flag, source?)));
        let Some((flag, source)) = given.next() else { return Ok(PromptSource::Default) };
        match given.next() {
            Some((other, _)) => Err(Problem::usage(format!("{flag} and {other} cannot be used together"))
                .help("give one prompt; many go into a --prompts file")
                .into()),
            None => Ok(source),
        }
    }
}

/// How the answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As it comes.
    Text,
    /// One object.
    Json,
    /// One object a prompt.
    JsonLines,
}

/// What `infer` shall do.
#[derive(Debug)]
pub struct InferRequest {
    /// Where the prompts come from.
    pub source: PromptSource,
    /// Which model.
    pub model: ModelChoice,
    /// How to draw, unless a prompt says otherwise.
    pub sampling: Sampling,
    /// Whether the prompt comes before the text.
    pub echo: bool,
    /// Whether to list log-probabilities under the text.
    pub lists_logprobs: bool,
    /// How much memory to take.
    pub limits: LimitArgs,
    /// Where to run.
    pub device: DeviceRequest,
    /// On how many ranks.
    pub mesh: MeshRequest,
    /// How to write.
    pub format: Format,
    /// Whether the model must say first what it said at export.
    pub verify: bool,
}

impl InferArgs {
    /// Everything that can be wrong without opening a file is said here.
    pub fn into_request(self) -> anyhow::Result<InferRequest> {
        let source = self.prompts.into_source()?;
        let format = match (&source, self.json) {
            (PromptSource::Lines(_), _) => Format::JsonLines,
            (_, true) => Format::Json,
            (_, false) => Format::Text,
        };
        if matches!(&source, PromptSource::Text(text) if text.is_empty()) {
            let problem = Problem::usage("the prompt is empty");
            return Err(problem.help("write something after --prompt, or leave it out").into());
        }
        let scores = format != Format::Text;
        let sampling = self.sampling.to_sampling(scores);
        if sampling.max_new_tokens == 0 && !sampling.prompt_logprobs {
            let problem = Problem::usage("--max-new-tokens 0 leaves nothing to do");
            return Err(problem.help("ask for at least 1; --echo --json scores a prompt alone").into());
        }
        if sampling.min_new_tokens > sampling.max_new_tokens {
            let (min, max) = (sampling.min_new_tokens, sampling.max_new_tokens);
            let what = format!("--min-new-tokens {min} is more than --max-new-tokens {max}");
            return Err(Problem::usage(what).help("raise --max-new-tokens").into());
        }
        Ok(InferRequest {
            source,
            model: self.model.to_choice()?,
            echo: self.sampling.echo,
            lists_logprobs: self.sampling.logprobs.is_some() && format == Format::Text,
            sampling,
            limits: self.limits,
            device: self.device.to_request()?,
            mesh: self.mesh.to_request()?,
            format,
            verify: self.verify,
        })
    }
}
