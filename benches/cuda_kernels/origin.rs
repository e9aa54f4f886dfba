//! Where a figure comes from: device, clocks, driver, compiler, commit, command, date.

use std::process::Command;

use dist_kernels::cuda::compile::Compiler;
use serde_json::{Value, json};

use crate::gpu::Gpu;

/// What a program says, if there is such a program and it knows.
fn said(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!said.is_empty()).then_some(said)
}

/// From `DIST_COMMIT` where the binary was carried to a machine without the repository.
fn commit() -> Option<String> {
    let told = std::env::var("DIST_COMMIT").ok().filter(|commit| !commit.is_empty());
    told.or_else(|| said("git", &["rev-parse", "--short=12", "HEAD"]))
}

/// Fields of a results file that are the same for all of its lines. Clocks are those of a GPU that multiplies.
pub(crate) fn origin(gpu: &mut Gpu) -> dist_kernels::Result<Value> {
    let query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit";
    let index = format!("--id={}", gpu.backend.describe().ordinal);
    let smi = gpu.while_busy(|| said("nvidia-smi", &[query, "--format=csv,noheader,nounits", &index]))?;
    let smi = smi.unwrap_or_default();
    let info = gpu.backend.describe();
    let facts: Vec<&str> = smi.split(',').map(str::trim).collect();
    let number = |idx: usize| facts.get(idx).and_then(|fact| fact.parse::<f64>().ok());
    let driver = facts.first().filter(|fact| !fact.is_empty());
    let cuda = gpu.libraries.driver().ok().map(|opened| opened.version.to_string());
    let nvrtc = gpu.libraries.nvrtc().ok().map(|nvrtc| Compiler::version(nvrtc).to_string());
    let cublas_lt = gpu.libraries.cublas_lt().ok().map(|opened| opened.version.to_string());
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let command = format!("cargo bench -p dist-kernels --bench cuda_kernels -- {}", words.join(" "));
    Ok(json!({
        "schema_version": 1,
        "command": command.trim_end_matches(" -- "),
        "commit": commit(),
        "date": said("date", &["-u", "+%FT%TZ"]),
        "device": {
            "kind": "cuda",
            "name": info.name,
            "capability": format!("{}.{}", info.capability.0, info.capability.1),
            "n_sms": info.n_sms,
            "memory_bytes": info.total_bytes,
            "l2_bytes": info.l2_bytes,
            "driver": driver,
            "driver_cuda": cuda,
            "nvrtc": nvrtc,
            "cublas_lt": cublas_lt,
            "sm_clock_mhz": number(1),
            "memory_clock_mhz": number(2),
            "sm_clock_max_mhz": number(3),
            "power_limit_w": number(4),
        },
    }))
}
