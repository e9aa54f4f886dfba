//! What `kernels` built or found, for people and for machines.

use std::fmt::Write as _;

use dist_kernels::cuda::cache::{Kept, KernelCache, Origin};
use dist_kernels::cuda::compile::{Arch, Usage};
use dist_kernels::cuda::libraries::Version;
use serde::Serialize;

use super::milliseconds;
use crate::commands::kernels::{Built, Listed};

const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct BuiltObject<'a> {
    schema_version: u32,
    dir: String,
    nvrtc: String,
    units: Vec<UnitObject<'a>>,
}

#[derive(Serialize)]
struct UnitObject<'a> {
    unit: &'a str,
    arch: Arch,
    ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(flatten)]
    code: Option<CodeObject<'a>>,
}

#[derive(Serialize)]
struct CodeObject<'a> {
    origin: &'static str,
    bytes: usize,
    kernels: &'a [Usage],
    warnings: &'a [String],
}

#[derive(Serialize)]
struct ListedObject<'a> {
    schema_version: u32,
    dir: String,
    units: Vec<ListedUnit<'a>>,
}

#[derive(Serialize)]
struct ListedUnit<'a> {
    unit: &'a str,
    files: Vec<&'a str>,
    archs: Vec<ListedArch<'a>>,
}

#[derive(Serialize)]
struct ListedArch<'a> {
    arch: Arch,
    is_stored: bool,
    /// Why what is stored cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<&'a str>,
}

impl<'a> ListedArch<'a> {
    fn new(arch: Arch, kept: &'a Kept) -> Self {
        let damage = if let Kept::Damaged(why) = kept { Some(why.as_str()) } else { None };
        Self { arch, is_stored: *kept == Kept::Sound, damage }
    }
}

/// What was built, as one object.
pub fn built_json(built: &[Built], cache: &KernelCache, nvrtc: Version) -> serde_json::Result<String> {
    let object = BuiltObject {
        schema_version: SCHEMA_VERSION,
        dir: cache.dir().display().to_string(),
        nvrtc: nvrtc.to_string(),
        units: built.iter().map(built_unit).collect(),
    };
    Ok(serde_json::to_string(&object)? + "\n")
}

fn built_unit(built: &Built) -> UnitObject<'_> {
    let Built { program, outcome, took } = built;
    UnitObject {
        unit: program.unit,
        arch: program.arch,
        ms: milliseconds(*took),
        error: outcome.as_ref().err().map(String::as_str),
        code: outcome.as_ref().ok().map(|cubin| CodeObject {
            origin: origin(&cubin.origin),
            bytes: cubin.bytes.len(),
            kernels: &cubin.usages,
            warnings: &cubin.warnings,
        }),
    }
}

/// What was built: a line a unit, and a line a kernel that spills.
pub fn built_text(built: &[Built], cache: &KernelCache, nvrtc: Version) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<24} {:<8} {:>7}  {:>13} {:>9} {:>8}",
        "unit", "for", "kernels", "max registers", "kB", "s"
    );
    for Built { program, outcome, took } in built {
        let _ = write!(out, "{:<24} {:<8} ", program.unit, program.arch.to_string());
        let Ok(cubin) = outcome else {
            out.push_str("does not compile\n");
            continue;
        };
        let registers = cubin.usages.iter().map(|usage| usage.registers).max().unwrap_or(0);
        let (kilobytes, seconds) = (cubin.bytes.len() as f64 / 1e3, took.as_secs_f64());
        let from = origin(&cubin.origin);
        let n = cubin.usages.len();
        let _ = writeln!(out, "{n:>7}  {registers:>13} {kilobytes:>9.1} {seconds:>8.2}  {from}");
        for usage in cubin.usages.iter().filter(|usage| usage.spills()) {
            let Usage { kernel, stack_bytes, spill_store_bytes, spill_load_bytes, .. } = usage;
            let _ = writeln!(
                out,
                "  {kernel} spills: stack {stack_bytes}, stores {spill_store_bytes}, loads {spill_load_bytes} bytes"
            );
        }
    }
    let _ = writeln!(out, "NVRTC {nvrtc}, kept in {}", cache.dir().display());
    out
}

fn origin(origin: &Origin) -> &'static str {
    match origin {
        Origin::Cache(_) => "from the cache",
        Origin::Compiled(_) => "compiled",
        Origin::NotStored(_) => "compiled, not stored",
    }
}

/// What there is, as one object.
pub fn listed_json(listed: &[Listed], cache: &KernelCache) -> serde_json::Result<String> {
    let object = ListedObject {
        schema_version: SCHEMA_VERSION,
        dir: cache.dir().display().to_string(),
        units: listed.iter().map(listed_unit).collect(),
    };
    Ok(serde_json::to_string(&object)? + "\n")
}

fn listed_unit(listed: &Listed) -> ListedUnit<'_> {
    ListedUnit {
        unit: listed.unit.name,
        files: listed.unit.files.iter().map(|file| file.name).collect(),
        archs: listed.stored.iter().map(|(arch, kept)| ListedArch::new(*arch, kept)).collect(),
    }
}

/// What there is: a line a unit and architecture.
pub fn listed_text(listed: &[Listed], cache: &KernelCache) -> String {
    let mut out = format!("{:<24} {:<8} {:<10} files\n", "unit", "for", "kept");
    for Listed { unit, stored } in listed {
        let files: Vec<_> = unit.files.iter().map(|file| file.name).collect();
        for (arch, kept) in stored {
            let kept = match kept {
                Kept::Sound => "yes",
                Kept::Damaged(_) => "damaged",
                Kept::Nothing => "no",
            };
            let _ = writeln!(out, "{:<24} {:<8} {kept:<10} {}", unit.name, arch.to_string(), files.join(" "));
        }
    }
    let _ = writeln!(out, "kept in {}", cache.dir().display());
    out
}
