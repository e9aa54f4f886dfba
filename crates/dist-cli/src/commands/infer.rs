//! `dist-cli infer`: prompts in, text or JSON out.

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use dist_core::DeviceKind;
use dist_core::planner::Workload;
use dist_kernels::cpu::CpuBackend;
use dist_kernels::cuda::CudaBackend;

use crate::flags::infer::{Format, InferArgs, InferRequest};
use crate::generation::{self, Ending, Run};
use crate::interrupt;
use crate::launch::{self, Launch};
use crate::model::Model;
use crate::probe;
use crate::prompts::{self, Job, PromptSource};
use crate::render::{self, BatchBar, Console, JsonLines, LoadBar, Silent, TextWatch};
use crate::session::{self, Crew, Demand, Device, DeviceReport, Rates, Session, Setting};

/// Runs the command.
pub fn run(args: InferArgs, console: &Console) -> anyhow::Result<Ending> {
    let mut request = args.into_request()?;
    let launch = Launch::of(&request.mesh)?;
    request.device = session::for_ranks(request.device, &launch)?;
    if launch.is_follower() {
        return session::follow(&launch, &request.model, request.device, console);
    }
    match request.device.kind {
        DeviceKind::Cpu => run_on::<CpuBackend>(request, &launch, console),
        DeviceKind::Cuda => run_on::<CudaBackend>(request, &launch, console),
    }
}

fn run_on<B: Device>(request: InferRequest, launch: &Launch, console: &Console) -> anyhow::Result<Ending> {
    let mut ready = Ready::<B>::of(request, launch, console)?;
    ready.answer(console).map_err(|error| launch::explain(error, &mut ready.session.locals))
}

/// Everything that answering takes.
struct Ready<B: Device> {
    model: Model,
    device: DeviceReport,
    session: Session<B>,
    jobs: Vec<Job>,
    format: Format,
    echo: bool,
    lists_logprobs: bool,
    is_default_prompt: bool,
}

impl<B: Device> Ready<B> {
    /// Reads the prompts, opens the model, plans, loads. What is wrong with a prompt is said before weights are touched.
    fn of(request: InferRequest, launch: &Launch, console: &Console) -> anyhow::Result<Self> {
        let is_default_prompt = request.source == PromptSource::Default;
        let prompts = prompts::read(request.source, &request.sampling)?;
        let start = Instant::now();
        let model = request.model.open()?;
        let golden = if request.verify { Some(probe::golden(&model)?) } else { None };
        let max_seq_len = session::max_seq_len(&request.limits, model.config())?;
        let jobs = prompts::encode(prompts, &model, max_seq_len)?;
        console.phase("open model, encode prompts", start.elapsed());

        let (backend, device) = B::open_as(launch.share(request.device))?;
        session::tell_cast(console, &model, &device);
        let crew = Crew::gather(launch, &model, backend.free_bytes()?, console)?;
        let start = Instant::now();
        let demand = demand(&jobs, max_seq_len);
        let limits = session::limits(&request.limits, max_seq_len, demand, device.kind);
        let (split, ranks) = (&launch.split, crew.facts.as_slice());
        let setting = Setting { model: &model, device: &device, rates: Rates::UNKNOWN, limits, split, ranks };
        let Demand { n_samples, prompt_len, new_tokens, .. } = demand;
        let workload = Workload { n_seqs: n_samples.min(limits.max_seqs), prompt_len, new_tokens };
        let (plan, warning) = setting.plan(workload)?;
        if let Some(warning) = warning {
            console.warning(&warning);
        }
        console.phase("plan", start.elapsed());

        let mut bar = LoadBar::new(console);
        let mut session =
            crew.begin(backend, &model, &plan, (console, &mut |progress| bar.update(progress)))?;
        bar.finish();
        console.phase("load weights", session.load);
        if let Some(golden) = golden {
            let start = Instant::now();
            probe::ask(&mut session, &golden, &plan)?;
            console.phase("probe", start.elapsed());
        }
        generation::add_all(&mut session.engine, &jobs)?;
        Ok(Self {
            model,
            device,
            session,
            jobs,
            format: request.format,
            echo: request.echo,
            lists_logprobs: request.lists_logprobs,
            is_default_prompt,
        })
    }

    /// Generates, and writes as the format says.
    fn answer(&mut self, console: &Console) -> anyhow::Result<Ending> {
        let interrupt = interrupt::listen()?;
        let (jobs, load) = (&self.jobs, self.session.load);
        let engine = &mut self.session.engine;
        let run = match self.format {
            Format::Text => {
                let job = &jobs[0];
                let prompt = prompt_text(job, &self.model);
                if self.is_default_prompt && !self.echo && console.is_conversation() {
                    console.lead_in(&prompt);
                }
                let prompt = if self.echo { prompt } else { String::new() };
                let as_ids = self.model.tokenizer.is_none();
                let mut watch = TextWatch::new(io::stdout(), prompt, job.sampling.n as usize, as_ids);
                match watch.begin() {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        return Ok(Ending::OutputClosed);
                    }
                    begun => begun.map_err(generation::output_problem)?,
                }
                generation::run(engine, jobs, &interrupt, &mut watch)?
            }
            Format::Json => {
                let run = generation::run(engine, jobs, &interrupt, &mut Silent)?;
                let mut line = render::answer_json(&self.model.name, &jobs[0], &run.answers[0], load)?;
                line.push('\n');
                render::result(&line)?;
                run
            }
            Format::JsonLines => {
                let bar = BatchBar::new(console, jobs.len());
                let (out, model, early) = (io::stdout(), self.model.name.as_str(), BTreeMap::new());
                let mut watch = JsonLines { out, model, jobs, load, bar, early, next: 0 };
                generation::run(engine, jobs, &interrupt, &mut watch)?
            }
        };
        self.close(&run, console);
        Ok(run.ending)
    }

    fn close(&self, run: &Run, console: &Console) {
        if run.ending == Ending::OutputClosed {
            return;
        }
        if self.lists_logprobs {
            Console::logprobs(run, &|id| {
                let text = self.model.tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&[id]));
                text.map_or_else(|| id.to_string(), |text| format!("{text:?}"))
            });
        }
        console.summary(&self.model.name, &self.device, &self.jobs, run);
    }
}

fn prompt_text(job: &Job, model: &Model) -> String {
    match (&job.text, &model.tokenizer) {
        (Some(text), _) => text.clone(),
        (None, Some(tokenizer)) => tokenizer.decode(&job.ids),
        (None, None) => job.ids.iter().flat_map(|id| [id.to_string(), " ".to_owned()]).collect(),
    }
}

/// What the jobs ask for, new tokens cut to what a sequence can hold.
fn demand(jobs: &[Job], max_seq_len: usize) -> Demand {
    let most = |of: fn(&Job) -> usize| jobs.iter().map(of).max().unwrap_or(1);
    let prompt_len = most(|job| job.ids.len()).min(max_seq_len.saturating_sub(1)).max(1);
    let new_tokens = most(|job| job.sampling.max_new_tokens);
    Demand {
        n_samples: jobs.iter().map(|job| job.sampling.n as usize).sum(),
        n_most: most(|job| job.sampling.n as usize),
        prompt_len,
        new_tokens: new_tokens.min(max_seq_len - prompt_len.min(max_seq_len - 1)).max(1),
        scores_prompts: jobs.iter().any(|job| job.sampling.prompt_logprobs),
    }
}
