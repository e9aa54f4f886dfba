//! Errors as people meet them: what went wrong, why, and the next command. Libraries' own errors become causes.

use std::error::Error;
use std::fmt;

use dist_kernels::KernelError;
use dist_models::checkpoint::CheckpointError;
use dist_models::decoder::LoadError;
use dist_models::engine::EngineError;
use dist_models::export::ExportError;
use dist_models::export::probe::ProbeError;
use dist_models::runner::RunError;
use dist_models::tokenizer::TokenizerError;

/// Whose turn it is, as the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A file, the model or the machine.
    Failed = 1,
    /// The command line, the environment or `dist.toml`.
    Usage = 2,
}

/// An error with the way out of it.
#[derive(Debug)]
pub struct Problem {
    what: String,
    help: Option<String>,
    exit: Exit,
    cause: Option<anyhow::Error>,
}

impl Problem {
    /// The run failed.
    pub fn failed(what: impl Into<String>) -> Self {
        Self { what: what.into(), help: None, exit: Exit::Failed, cause: None }
    }

    /// What was asked for makes no sense.
    pub fn usage(what: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::failed(what) }
    }

    /// What to do about it.
    #[must_use]
    pub fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// What is behind it.
    #[must_use]
    pub fn because(self, cause: impl Into<anyhow::Error>) -> Self {
        Self { cause: Some(cause.into()), ..self }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl Error for Problem {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_ref().map(|cause| cause.as_ref() as &(dyn Error + 'static))
    }
}

/// The exit code that `error` ends the process with.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    let problem = error.chain().find_map(|cause| cause.downcast_ref::<Problem>());
    problem.map_or(Exit::Failed, |problem| problem.exit)
}

/// What to do about `error`, if anything behind it knows.
pub fn help_of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        let own = cause.downcast_ref::<Problem>().and_then(|problem| problem.help.clone());
        own.or_else(|| library_help(cause))
    })
}

/// What libraries' errors know to do. Transparent ones hide what they hold from the chain, so they are opened here.
fn library_help(cause: &(dyn Error + 'static)) -> Option<String> {
    if let Some(error) = cause.downcast_ref() {
        return engine_help(error);
    }
    if let Some(ProbeError::Engine(error)) = cause.downcast_ref() {
        return engine_help(error);
    }
    if let Some(error) = cause.downcast_ref() {
        return load_help(error);
    }
    if let Some(RunError::Kernel(error)) = cause.downcast_ref() {
        return error.help();
    }
    if let Some(error) = cause.downcast_ref::<KernelError>() {
        return error.help();
    }
    if let Some(error) = cause.downcast_ref::<ExportError>() {
        return error.help();
    }
    if let Some(error) = cause.downcast_ref::<TokenizerError>() {
        return error.help();
    }
    cause.downcast_ref::<CheckpointError>()?.help()
}

fn engine_help(error: &EngineError) -> Option<String> {
    match error {
        EngineError::Load(error) => load_help(error),
        EngineError::Kernel(error) | EngineError::Run(RunError::Kernel(error)) => error.help(),
        // The device's error is behind it in the chain, if there is one.
        EngineError::Run(_)
        | EngineError::Control(_)
        | EngineError::FollowerLost { .. }
        | EngineError::Broken { .. } => None,
    }
}

fn load_help(error: &LoadError) -> Option<String> {
    match error {
        LoadError::Checkpoint(error) => error.help(),
        LoadError::Kernel(error) => error.help(),
        LoadError::Range { .. } | LoadError::BrokenOff { .. } => None,
    }
}

/// The few names that `name` may have been meant for, best first.
pub fn nearest<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let name = name.to_ascii_lowercase();
    let mut scored: Vec<(f64, &str)> =
        names.into_iter().map(|other| (strsim::jaro_winkler(&name, other), other)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.retain(|(score, _)| *score > 0.75);
    scored.dedup_by_key(|(_, other)| *other);
    scored.into_iter().take(3).map(|(_, other)| other).collect()
}

/// `did you mean …?`, or nothing.
pub fn did_you_mean<'a>(name: &str, names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let near = nearest(name, names);
    (!near.is_empty()).then(|| format!("did you mean {}?", near.join(", ")))
}

#[cfg(test)]
mod tests {
    use dist_kernels::cuda::driver::CudaError;
    use dist_models::runner::{Suspect, Suspects};

    use super::*;

    #[test]
    fn the_help_and_the_exit_code_are_found_behind_causes() {
        let inner = Problem::usage("bad flag").help("write it well");
        let error = anyhow::Error::new(Problem::failed("cannot run").because(inner));
        assert_eq!(help_of(&error).as_deref(), Some("write it well"));
        assert_eq!(exit_of(&error), Exit::Failed);
        assert_eq!(error.chain().count(), 2);
    }

    #[test]
    fn a_step_that_failed_on_a_gpu_has_the_drivers_help() {
        let driver = CudaError::Call {
            call: "cuEventSynchronize",
            what: "what was asked before".to_owned(),
            name: "CUDA_ERROR_ILLEGAL_ADDRESS".to_owned(),
            meaning: "an illegal memory access was encountered".to_owned(),
            status: 700,
        };
        let steps = [12, 13].map(|step| Suspect { step, graph_rows: Some(8) });
        let suspects = Box::new(Suspects { rank: dist_core::Rank(0), steps: steps.to_vec() });
        let error = anyhow::Error::new(EngineError::Run(RunError::Step { suspects, source: driver.into() }));
        let told = error.to_string();
        let expected = "step 12 (the graph of 8 rows) or step 13 (the graph of 8 rows) failed on rank 0";
        assert_eq!(told, expected);
        // What the device says is told once, behind it.
        let causes: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
        assert!(causes.len() == 1 && causes[0].starts_with("cuEventSynchronize failed for"), "{causes:?}");
        let help = help_of(&error).expect("the driver's");
        assert!(help.contains("--no-graphs"), "{help}");
    }

    #[test]
    fn what_a_device_says_while_a_model_is_loaded_has_help_wherever_it_is_kept() {
        let errors: [fn(KernelError) -> anyhow::Error; 8] = [
            |error| EngineError::Load(LoadError::Kernel(error)).into(),
            |error| EngineError::Kernel(error).into(),
            |error| EngineError::Run(RunError::Kernel(error)).into(),
            |error| {
                EngineError::Run(RunError::Record { rows: 1, rank: dist_core::Rank(0), source: error }).into()
            },
            |error| ProbeError::Engine(EngineError::Kernel(error)).into(),
            |error| LoadError::Kernel(error).into(),
            |error| RunError::Kernel(error).into(),
            |error| Problem::failed("no").because(error).into(),
        ];
        for keep in errors {
            let memory = CudaError::OutOfMemory { what: "a weight".to_owned(), needed: 9, free: 5 };
            let error = keep(memory.into());
            let told: Vec<String> = error.chain().map(ToString::to_string).collect();
            assert!(told.join("\n").contains("9 bytes needed, 5 available"), "{told:?}");
            let help = help_of(&error).unwrap_or_else(|| panic!("no help: {told:?}"));
            assert!(help.contains("--max-batch-tokens") && help.contains("another GPU"), "{help}");
            let error = keep(CudaError::NoThread { why: "no".to_owned() }.into());
            assert!(help_of(&error).is_some_and(|help| help.contains("ulimit -u")), "{error:#}");
        }
    }

    #[test]
    fn names_nearby_are_proposed() {
        assert_eq!(nearest("gpt3-1.3B", ["demo", "gpt3-1.3b", "opt"]), ["gpt3-1.3b"]);
        assert_eq!(did_you_mean("xyz", ["demo"]), None);
    }
}
