//! `dist-cli kernels`: compiles the kernels of GPUs beforehand, or says which there are.

use std::collections::BTreeSet;
use std::time::Duration;

use dist_kernels::cuda::cache::{Cubin, Kept, KernelCache, Origin};
use dist_kernels::cuda::compile::{Arch, Compiler, Program};
use dist_kernels::cuda::nvrtc::Nvrtc;
use dist_kernels::cuda::units::{UNITS, Unit};

use crate::flags::kernels::{BuildArgs, KernelsArgs, KernelsTask};
use crate::gpu;
use crate::problem::{Problem, did_you_mean};
use crate::render::{self, Console};

/// A unit that was compiled or found.
pub struct Built {
    /// What it is of.
    pub program: Program,
    /// What came of it, or what the compiler said against it.
    pub outcome: Result<Cubin, String>,
    /// How long that took.
    pub took: Duration,
}

/// A unit as it is listed.
pub struct Listed {
    /// The unit.
    pub unit: &'static Unit,
    /// What it is compiled for beforehand, and what of that is stored.
    pub stored: Vec<(Arch, Kept)>,
}

/// Runs the command.
pub fn run(args: &KernelsArgs, console: &Console) -> anyhow::Result<()> {
    match &args.task {
        KernelsTask::Build(args) => build(args, console),
        KernelsTask::List(args) => {
            let cache = gpu::kernel_cache()?;
            let listed: Vec<_> = UNITS.iter().map(|unit| list(unit, &cache)).collect();
            let told = if args.json {
                render::listed_json(&listed, &cache)?
            } else {
                render::listed_text(&listed, &cache)
            };
            render::result(&told)
        }
    }
}

fn list(unit: &'static Unit, cache: &KernelCache) -> Listed {
    let stored = unit.archs.iter().map(|&arch| (arch, cache.look(&unit.program(arch)))).collect();
    Listed { unit, stored }
}

fn build(args: &BuildArgs, console: &Console) -> anyhow::Result<()> {
    let cache = args.out.clone().map_or_else(gpu::kernel_cache, |out| Ok(KernelCache::new(out)))?;
    let libraries = gpu::libraries();
    let nvrtc = libraries.nvrtc().map_err(|error| {
        let help = error.help();
        Problem::failed("there is no compiler for kernels").because(error).help(help)
    })?;
    known(&args.arch, nvrtc)?;
    let programs: Vec<_> = asked(&args.arch).into_iter().map(|(unit, arch)| unit.program(arch)).collect();
    // What takes a minute to compile and could not be stored is not begun.
    if programs.iter().any(|program| !cache.holds_of(program, nvrtc.version())) {
        cache.try_to_write().map_err(|error| cannot_store(&cache, error))?;
    }
    let outcomes = cache.get_all(&programs, nvrtc, &|program| {
        console.note(&format!("{} for {}", program.unit, program.arch));
    });
    let built = programs.into_iter().zip(outcomes).map(|(program, (outcome, took))| Built {
        program,
        outcome: outcome.map_err(|error| error.to_string()),
        took,
    });
    let built: Vec<_> = built.collect();
    let version = nvrtc.version();
    render::result(&if args.json {
        render::built_json(&built, &cache, version)?
    } else {
        render::built_text(&built, &cache, version)
    })?;
    match fault(&built) {
        None => Ok(()),
        Some(fault) => Err(fault.into()),
    }
}

fn cannot_store(cache: &KernelCache, error: std::io::Error) -> Problem {
    let problem = Problem::failed(format!("kernels cannot be stored in {}", cache.dir().display()));
    problem.because(error).help("name a folder that can be written: --out DIR, or DIST_KERNEL_CACHE")
}

/// Refuses an architecture that the compiler does not know: an unknown one would be taken for the nearest below it.
fn known(archs: &[Arch], nvrtc: &Nvrtc) -> Result<(), Problem> {
    let capabilities = nvrtc.capabilities();
    let Some(wrong) = archs.iter().find(|arch| !capabilities.contains(&arch.capability)) else {
        return Ok(());
    };
    let all = capabilities.into_iter().filter(|&capability| capability >= Arch::SM_80.capability);
    let all: Vec<String> = all.map(|capability| Arch { capability, is_own: false }.to_string()).collect();
    let near = did_you_mean(&wrong.to_string(), all.iter().map(String::as_str));
    let help = format!("NVRTC {} compiles for {}", nvrtc.version(), all.join(", "));
    let help = near.map_or(help.clone(), |near| format!("{near} {help}"));
    Err(Problem::usage(format!("--arch {wrong}: the compiler knows no such architecture")).help(help))
}

/// What is compiled for the architectures: each unit in the form that such a GPU runs, once.
fn asked(archs: &[Arch]) -> Vec<(&'static Unit, Arch)> {
    let all: Vec<Arch> = UNITS.iter().flat_map(|unit| unit.archs.iter().copied()).collect();
    let archs = if archs.is_empty() { &all } else { archs };
    let forms = |unit: &Unit| archs.iter().filter_map(|arch| unit.arch_for(arch.capability)).collect();
    UNITS
        .iter()
        .flat_map(|unit| {
            let forms: BTreeSet<Arch> = forms(unit);
            forms.into_iter().map(move |arch| (unit, arch))
        })
        .collect()
}

/// What is wrong with what was built; kernels are named.
fn fault(built: &[Built]) -> Option<Problem> {
    let mut wrong = Vec::new();
    for Built { program, outcome, .. } in built {
        let place = format!("{} for {}", program.unit, program.arch);
        let cubin = match outcome {
            Ok(cubin) => cubin,
            Err(why) => {
                wrong.push(why.clone());
                continue;
            }
        };
        if cubin.usages.is_empty() {
            wrong.push(format!("{place}: the compiler tells of no kernel"));
        }
        let spilling = cubin.usages.iter().filter(|usage| usage.spills());
        wrong.extend(spilling.map(|usage| {
            let bytes = usage.stack_bytes.max(usage.spill_store_bytes).max(usage.spill_load_bytes);
            format!("{place}: {} spills: {bytes} bytes of local memory", usage.kernel)
        }));
        wrong.extend(cubin.warnings.iter().map(|warning| format!("{place}: {warning}")));
        if let Origin::NotStored(why) = &cubin.origin {
            wrong.push(format!("{place}: not stored: {why}"));
        }
    }
    let n = wrong.len();
    // One cause may be that of many units.
    wrong.dedup();
    let faults = if n == 1 { "1 fault".to_owned() } else { format!("{n} faults") };
    let problem = Problem::failed(format!("{faults} in {} units", built.len()));
    let problem = problem.because(anyhow::anyhow!("{}", wrong.join("\n")));
    let help = "NVRTC 13.0.88 compiles all for the GPUs that `dist-cli kernels list` names: pip install \
                nvidia-cuda-nvrtc==13.0.88; whether the folder has room and can be written: --out DIR takes another";
    (n > 0).then(|| problem.help(help))
}

#[cfg(test)]
mod tests {
    use dist_kernels::cuda::compile::Usage;
    use dist_kernels::cuda::libraries::Version;

    use super::*;

    fn built(outcome: Result<Cubin, String>) -> Vec<Built> {
        vec![Built { program: UNITS[0].program(Arch::SM_80), outcome, took: Duration::ZERO }]
    }

    fn cubin() -> Cubin {
        Cubin {
            bytes: vec![1],
            usages: vec![Usage { kernel: "whole".to_owned(), registers: 8, ..Usage::default() }],
            warnings: Vec::new(),
            compiler: Version { major: 13, minor: 0 },
            origin: Origin::Compiled("here".into()),
        }
    }

    #[test]
    fn faults_are_found_and_kernels_named() {
        assert!(fault(&built(Ok(cubin()))).is_none());
        let spilling = Usage { kernel: "torn".to_owned(), spill_load_bytes: 4, ..Usage::default() };
        for (outcome, expected) in [
            (Ok(Cubin { usages: vec![spilling], ..cubin() }), "torn spills: 4 bytes"),
            (Ok(Cubin { usages: Vec::new(), ..cubin() }), "no kernel"),
            (Ok(Cubin { warnings: vec!["wgmma is serialized".to_owned()], ..cubin() }), "serialized"),
            (Ok(Cubin { origin: Origin::NotStored("full".to_owned()), ..cubin() }), "not stored: full"),
            (Err("line 7".to_owned()), "line 7"),
        ] {
            let error = anyhow::Error::from(fault(&built(outcome)).unwrap());
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
    }

    #[test]
    fn an_architecture_means_all_that_such_a_gpu_runs() {
        let told = |archs: &[&str]| {
            let archs: Vec<Arch> = archs.iter().map(|arch| arch.parse().unwrap()).collect();
            let asked = asked(&archs).into_iter();
            asked.map(|(unit, arch)| format!("{} {arch}", unit.name)).collect::<Vec<_>>()
        };
        let ampere = told(&["sm_80"]);
        assert!(
            ampere.contains(&"norm sm_80".to_owned()) && ampere.iter().all(|line| line.ends_with("sm_80"))
        );
        assert_eq!(told(&["sm_86"]), ampere);
        // No general form runs there, so there is one of its own, as when such a GPU is found.
        let blackwell = told(&["sm_120"]);
        assert!(blackwell.len() == ampere.len() && blackwell.iter().all(|line| line.ends_with("sm_120")));
        let hopper = told(&["sm_90a"]);
        assert!(
            hopper.contains(&"linear_ring sm_90a".to_owned()) && hopper.contains(&"norm sm_90".to_owned())
        );
        assert_eq!(told(&[]).len(), ampere.len() + hopper.len());
        assert_eq!(told(&["sm_90a", "sm_80", "sm_90"]), told(&[]));
    }
}
