//! `dist-cli export`: a model in, a checkpoint of this program's own out.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dist_core::{Mesh, ModelConfig};
use dist_models::export::{self, ExportError, Exported, Progress};
use dist_models::manifest::Split;

use crate::flags::export::{CutRequest, ExportArgs};
use crate::generation::Ending;
use crate::interrupt;
use crate::launch::{self, read_plan};
use crate::model::Model;
use crate::problem::Problem;
use crate::render::{self, Console, CopyBar};
use crate::session;

/// Runs the command.
pub fn run(args: ExportArgs, console: &Console) -> anyhow::Result<Ending> {
    let request = args.into_request()?;
    let model = request.model.open()?;
    let split = split(&request.cut, &model)?;
    let out = request.cut.out.clone().unwrap_or_default();
    let order = export::ExportRequest {
        source: &model.checkpoint,
        dtype: request.dtype,
        max_seq_len: request.max_seq_len,
        split: &split,
        out: &out,
        overwrite: request.cut.overwrite,
        threads: request.cut.threads,
    };
    write(&order, request.cut.json, console)
}

/// Writes it, and says what was written.
pub fn write(order: &export::ExportRequest<'_>, json: bool, console: &Console) -> anyhow::Result<Ending> {
    let start = Instant::now();
    if let Some(exported) = watched(console, "writing", |watch| order.write(watch))? {
        return told(&exported, start.elapsed(), json, console);
    }
    console.warning(&format!("interrupted, {} is as it was", order.dir().display()));
    Ok(Ending::Interrupted)
}

fn told(exported: &Exported, took: Duration, json: bool, console: &Console) -> anyhow::Result<Ending> {
    render::result(&if json {
        render::exported_json(exported, took)?
    } else {
        render::exported_text(exported)
    })?;
    console.phase("written", took);
    let flags = exported
        .manifest
        .split
        .as_ref()
        .map_or_else(String::new, |split| format!(" --tp {} --pp {}", split.tp, split.pp()));
    console.note(&format!("run it with: dist-cli infer --model {}{flags}", exported.dir.display()));
    Ok(Ending::Whole)
}

/// Runs what takes a while, with a bar and an ear for Ctrl-C; `None` if that came.
pub fn watched<T>(
    console: &Console,
    what: &'static str,
    run: impl FnOnce(&mut dyn FnMut(Progress) -> ControlFlow<()>) -> Result<T, ExportError>,
) -> anyhow::Result<Option<T>> {
    let interrupt = interrupt::listen()?;
    let mut bar = CopyBar::new(console, what);
    let result = run(&mut |progress| {
        bar.update(progress);
        if interrupt.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    drop(bar);
    match result {
        Err(ExportError::Interrupted) => Ok(None),
        result => Ok(Some(result?)),
    }
}

/// The split that was asked for; stages that were not take the same time each.
pub fn split(cut: &CutRequest, model: &Model) -> anyhow::Result<Split> {
    if let Some(path) = &cut.plan {
        return planned(path, model);
    }
    let (tp, pp) = (cut.degrees.tp.unwrap_or(1), cut.degrees.pp.unwrap_or(1));
    let asked = cut.degrees.stages.clone();
    let stages = match asked {
        Some(stages) => stages,
        None if pp == 1 => vec![model.config().n_layers],
        None => {
            let mesh = Mesh { tp, pp, dp: 1 };
            session::split_plan(model, &launch::Split { mesh, stages: None })?.stages
        }
    };
    Ok(Split { tp, stages })
}

/// Copies of the model would all be the same files, so that one is written.
fn planned(path: &Path, model: &Model) -> anyhow::Result<Split> {
    let plan = read_plan(path)?;
    let config = model.config();
    let (name, weight_dtype) = (plan.model.name.clone(), plan.model.weight_dtype);
    if plan.model != (ModelConfig { name, weight_dtype, ..config.clone() }) {
        let (planned, given) = (&plan.model.name, &model.name);
        let what =
            format!("--plan {} is for {planned}, the model is {given} of another shape", path.display());
        let help = format!("plan again: dist-cli plan --model {given} --json > {}", path.display());
        return Err(Problem::usage(what).help(help).into());
    }
    Ok(Split { tp: plan.mesh.tp, stages: plan.stages })
}
