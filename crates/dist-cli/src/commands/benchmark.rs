//! `dist-cli benchmark`: a grid of measurements beside the machine's limits and the plan's word.

use dist_core::DeviceKind;
use dist_core::plan::Limits;
use dist_core::planner::Workload;
use dist_kernels::cpu::CpuBackend;
use dist_kernels::cuda::CudaBackend;

use crate::bench::{self, Ceilings, Cell, Measured, Origin, Report};
use crate::flags::benchmark::{BenchmarkArgs, BenchmarkRequest};
use crate::generation::Ending;
use crate::interrupt;
use crate::launch::{self, Launch};
use crate::problem::Problem;
use crate::render::{self, Console, LoadBar};
use crate::session::{self, Crew, Device, Rates, Session, Setting};

/// Runs the command.
pub fn run(args: BenchmarkArgs, console: &Console) -> anyhow::Result<Ending> {
    let mut request = args.into_request()?;
    let launch = Launch::of(&request.mesh)?;
    request.device = session::for_ranks(request.device, &launch)?;
    if launch.is_follower() {
        return session::follow(&launch, &request.model, request.device, console);
    }
    let report = match request.device.kind {
        DeviceKind::Cpu => report::<CpuBackend>(&request, &launch, console)?,
        DeviceKind::Cuda => report::<CudaBackend>(&request, &launch, console)?,
    };
    let Some(report) = report else { return Ok(Ending::Interrupted) };
    let rendered =
        if request.json { render::benchmark_json(&report)? } else { render::benchmark_table(&report) };
    render::result(&rendered)?;
    Ok(Ending::Whole)
}

/// `None` if the user interrupted.
fn report<B: Device>(
    request: &BenchmarkRequest,
    launch: &Launch,
    console: &Console,
) -> anyhow::Result<Option<Report>> {
    let model = request.model.open()?;
    let limits = limits(request, model.config().n_ctx)?;
    console.note("measuring what this machine can do");
    // All its ranks together, before any of them runs.
    let (mut all_cores, device) = B::open_as(request.device)?;
    session::tell_cast(console, &model, &device);
    let ceilings = all_cores.ceilings()?;
    drop(all_cores);
    let (backend, _) = B::open_as(launch.share(request.device))?;
    let crew = Crew::gather(launch, &model, backend.free_bytes()?, console)?;
    // Machines are taken to be alike.
    let ceilings = ceilings.times(launch.world_size() as f64 / launch.local_size as f64);
    let rates = Rates {
        read_bytes_per_s: ceilings.read_bytes_per_s / launch.world_size() as f64,
        flops_per_s: ceilings.flops_per_s / launch.world_size() as f64,
    };
    let (split, ranks) = (&launch.split, crew.facts.as_slice());
    let setting = Setting { model: &model, device: &device, rates, limits, split, ranks };
    let largest = request.cells.iter().max_by_key(|cell| cell.batch * (cell.prompt_len + cell.new_tokens));
    let largest = *largest.expect("clap asks for at least one of each");
    let (plan, warning) = setting.plan(workload(largest))?;
    if let Some(warning) = warning {
        console.warning(&warning);
    }
    let mut predicted = Vec::new();
    for &cell in &request.cells {
        predicted.push(setting.plan(workload(cell))?.0.predictions);
    }
    let mut bar = LoadBar::new(console);
    let mut session = crew.begin(backend, &model, &plan, (console, &mut |progress| bar.update(progress)))?;
    bar.finish();
    console.phase("load weights", session.load);

    let interrupt = interrupt::listen()?;
    let mut cells = Vec::new();
    // A machine that is shared reads faster at one time than at another, so each cell has its own limit: the better of
    // before and after. One rank alone cannot tell for others that read at the same time.
    let is_alone = launch.world_size() == 1;
    let rate = |session: &mut Session<B>| is_alone.then(|| session.engine.backend().read_rate()).transpose();
    let mut before = rate(&mut session)?;
    for (&cell, predictions) in request.cells.iter().zip(predicted) {
        let Cell { batch, prompt_len, new_tokens } = cell;
        console.note(&format!("measuring batch {batch}, prompt {prompt_len}, new tokens {new_tokens}"));
        let rounds = (request.warmups, request.repeats);
        let n_vocab = model.config().n_vocab;
        let times = bench::measure(&mut session.engine, cell, n_vocab, rounds, &interrupt);
        let times = times.map_err(|error| launch::explain(error, &mut session.locals))?;
        let Some(times) = times else { return Ok(None) };
        // Steps are timed once all have begun: then no more run than may.
        let running = Cell { batch: batch.min(limits.max_seqs), ..cell };
        let (decode, prefill) = bench::work_of(&plan, running);
        let after = rate(&mut session)?;
        let around = before.zip(after).map(|(before, after)| before.max(after));
        before = after;
        let ceilings = around.map_or(ceilings, |read_bytes_per_s| Ceilings { read_bytes_per_s, ..ceilings });
        cells.push(Measured { cell, times, predictions, decode, prefill, ceilings });
    }
    let (warmups, repeats) = (request.warmups, request.repeats);
    let origin = Origin::now();
    let (model, load) = (model.name, session.load);
    Ok(Some(Report { origin, device, ceilings, model, plan, load, warmups, repeats, cells }))
}

fn workload(cell: Cell) -> Workload {
    Workload { n_seqs: cell.batch, prompt_len: cell.prompt_len, new_tokens: cell.new_tokens }
}

/// Room for every cell.
fn limits(request: &BenchmarkRequest, n_ctx: usize) -> anyhow::Result<Limits> {
    let most = |of: fn(&Cell) -> usize| request.cells.iter().map(of).max().unwrap_or(1);
    let (batch, max_seq_len) = (most(|cell| cell.batch), most(|cell| cell.prompt_len + cell.new_tokens));
    let max_seqs = request.max_seqs.map_or(batch, |most| most.min(batch));
    if max_seq_len > n_ctx {
        let what =
            format!("prompt and new tokens are {max_seq_len} together, the model knows {n_ctx} positions");
        return Err(Problem::failed(what).help("lower --prompt-len or --new-tokens").into());
    }
    Ok(Limits {
        max_seq_len,
        max_seqs,
        max_batch_tokens: request.max_batch_tokens,
        max_sample_rows: max_seqs,
    })
}
