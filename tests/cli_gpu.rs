//! GPUs where there is none: kernels are compiled, kept and judged, and doctor says what a driver lacks. NVIDIA's
//! libraries are stubs here, whose answers are chosen.

#[path = "support/cli.rs"]
mod cli;
#[path = "support/stubs.rs"]
mod stubs;

use std::fs;
use std::path::{Path, PathBuf};

use cli::{Ran, program_in};
use serde_json::Value;

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a folder") }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Runs with the stubs of this folder, and its cache.
    fn run(&self, args: &[&str], set: &[(&str, &str)]) -> Ran {
        let mut command = program_in(self.path(), args);
        command.env("DIST_CUDA_LIB", self.path()).env("DIST_KERNEL_CACHE", self.path().join("cache"));
        command.envs(set.iter().copied()).output().expect("dist-cli runs").into()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.run(args, &[]).well()).expect("one JSON object")
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> =
        fs::read_dir(dir).expect("a folder").filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.sort();
    found
}

fn strings<'a>(units: &'a Value, field: &str) -> Vec<&'a str> {
    units.as_array().into_iter().flatten().filter_map(|unit| unit[field].as_str()).collect()
}

#[test]
fn kernels_are_built_once_and_listed() {
    let home = Home::new();
    stubs::nvrtc(home.path());
    let first = home.json(&["kernels", "build", "--json"]);
    assert_eq!(first["nvrtc"], "13.0");
    let units = &first["units"];
    let n = units.as_array().unwrap().len();
    assert!(strings(units, "origin").iter().all(|origin| *origin == "compiled"), "{units}");
    assert_eq!(
        (units[0]["kernels"][0]["registers"].as_u64(), units[0]["kernels"][0]["shared_bytes"].as_u64()),
        (Some(40), Some(256))
    );
    assert_eq!(entries(&home.path().join("cache")).len(), n);
    let again = home.json(&["kernels", "build", "--json"]);
    assert!(strings(&again["units"], "origin").iter().all(|origin| *origin == "from the cache"));
    let listed = home.json(&["kernels", "list", "--json"]);
    let stored =
        listed["units"].as_array().unwrap().iter().flat_map(|unit| unit["archs"].as_array().unwrap());
    let stored: Vec<_> = stored.map(|arch| arch["is_stored"] == true).collect();
    assert_eq!(stored, vec![true; n]);
    let told = home.run(&["kernels", "list"], &[("DIST_KERNEL_CACHE", "elsewhere")]).well();
    assert!(told.contains("norm.cu") && told.contains("sm_90a") && !told.contains(" yes "), "{told}");
}

#[test]
fn a_damaged_kernel_is_built_anew() {
    let home = Home::new();
    stubs::nvrtc(home.path());
    home.run(&["kernels", "build", "--arch", "sm_80", "-q"], &[]).well();
    let all = entries(&home.path().join("cache"));
    let sound = fs::read(&all[0]).unwrap();
    fs::write(&all[0], &sound[..sound.len() - 1]).unwrap();
    let ran = home.run(&["kernels", "build", "--arch", "sm_80", "--json"], &[]);
    assert!(ran.err.contains("is damaged"), "{}", ran.err);
    let report: Value = serde_json::from_str(&ran.well()).unwrap();
    let compiled = strings(&report["units"], "origin").iter().filter(|origin| **origin == "compiled").count();
    assert_eq!((compiled, fs::read(&all[0]).unwrap()), (1, sound));
}

#[test]
fn a_pipe_among_the_kernels_is_listed_as_damaged_and_replaced() {
    let home = Home::new();
    stubs::nvrtc(home.path());
    home.run(&["kernels", "build", "--arch", "sm_80", "-q"], &[]).well();
    let all = entries(&home.path().join("cache"));
    fs::remove_file(&all[0]).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&all[0]).status().unwrap().success());
    let told = home.run(&["kernels", "list"], &[]).well();
    assert_eq!(told.matches(" damaged ").count(), 1, "{told}");
    let listed = home.json(&["kernels", "list", "--json"]).to_string();
    assert_eq!(listed.matches(r#""damage":"it is no regular file""#).count(), 1, "{listed}");
    home.run(&["kernels", "build", "--arch", "sm_80", "-q"], &[]).well();
    assert!(fs::metadata(&all[0]).unwrap().is_file());
}

#[test]
fn what_spills_or_does_not_compile_fails_by_name() {
    let home = Home::new();
    stubs::nvrtc(home.path());
    for (variable, told) in [
        ("STUB_SPILLS", "norm for sm_80: norm_kernel spills: 8 bytes"),
        ("STUB_ERROR", "norm.cu(7): error: no such thing"),
    ] {
        let ran =
            home.run(&["kernels", "build", "--arch", "sm_80", "--out", variable], &[(variable, "norm")]);
        assert_eq!(ran.code, Some(1), "{}", ran.err);
        assert!(ran.err.contains(told), "{}", ran.err);
        assert!(ran.out.contains("rows"), "the others are built: {}", ran.out);
    }
    // What spills was kept, and fails again.
    let again = home.run(&["kernels", "build", "--arch", "sm_80", "--out", "STUB_SPILLS", "--json"], &[]);
    assert!(again.code == Some(1) && again.err.contains("norm_kernel spills"), "{}", again.err);
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_anything_is_compiled() {
    let home = Home::new();
    stubs::nvrtc(home.path());
    fs::write(home.path().join("file"), "").unwrap();
    for dir in ["file", "file/below", "/proc/nowhere"] {
        for (args, set) in [
            (&["kernels", "build", "--out", dir][..], [("STUB_ERROR", "norm")]),
            (&["kernels", "build"], [("DIST_KERNEL_CACHE", dir)]),
        ] {
            let ran = home.run(args, &set);
            assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{}", ran.err);
            assert!(ran.err.contains(&format!("cannot be stored in {dir}")), "{}", ran.err);
            assert!(
                ran.err.contains("help: name a folder") && !ran.err.contains("no such thing"),
                "{}",
                ran.err
            );
        }
    }
}

#[test]
fn an_architecture_that_is_none_is_refused() {
    for arch in ["sm_75", "90", "sm_80,,sm_90"] {
        let ran = Home::new().run(&["kernels", "build", "--arch", arch], &[]);
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{arch}: {}", ran.err);
        assert!(ran.err.contains("sm_80, sm_90 or sm_90a"), "{}", ran.err);
    }
}

#[test]
fn an_architecture_that_the_compiler_does_not_know_is_refused_with_those_that_it_does() {
    let home = Home::new();
    stubs::nvrtc(home.path());
    for arch in ["sm_99", "sm_86", "sm_80,sm_91a"] {
        let ran = home.run(&["kernels", "build", "--arch", arch], &[]);
        assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{arch}: {}", ran.err);
        let wrong = arch.rsplit(',').next().unwrap();
        assert!(ran.err.contains(&format!("--arch {wrong}: ")), "{}", ran.err);
        assert!(
            ran.err.contains("did you mean sm_") && ran.err.contains("sm_80, sm_90, sm_120"),
            "{}",
            ran.err
        );
    }
    assert!(!home.path().join("cache").exists());
    let report = home.json(&["kernels", "build", "--arch", "sm_120", "--json"]);
    let archs = strings(&report["units"], "arch");
    assert!(!archs.is_empty() && archs.iter().all(|arch| *arch == "sm_120"), "{archs:?}");
}

#[test]
fn a_compiler_that_is_none_is_named() {
    let home = Home::new();
    fs::write(home.path().join("libnvrtc.so.13"), "no library").unwrap();
    let report = home.json(&["doctor", "--json"]);
    let nvrtc = &report["ranks"][0]["machine"]["gpu"]["libraries"][1];
    assert_eq!(nvrtc["name"], "NVRTC");
    if nvrtc["version"].is_string() {
        // The loader of this machine knows a real one, which is taken then.
        return;
    }
    assert!(nvrtc["problem"]["what"].as_str().unwrap().contains("libnvrtc.so.13 cannot be used"), "{nvrtc}");
    let ran = home.run(&["kernels", "build"], &[]);
    assert!(
        ran.code == Some(1) && ran.err.contains("no compiler") && ran.err.contains("libnvrtc.so.13"),
        "{}",
        ran.err
    );
}

/// Whether the loader of this machine knows a real library, which is taken then: that of this place in doctor's list.
fn loader_knows(library: usize) -> bool {
    let without = Home::new().json(&["doctor", "--json"]);
    without["ranks"][0]["machine"]["gpu"]["libraries"][library]["version"].is_string()
}

/// What doctor says of the driver whose answers these are; `None` where the loader knows a real one.
fn driver_told(version: &str, status: &str) -> Option<(String, Vec<String>)> {
    let home = Home::new();
    stubs::driver(home.path(), &[]);
    if loader_knows(0) {
        return None;
    }
    let ran = home.run(&["doctor", "--json"], &[("STUB_VERSION", version), ("STUB_STATUS", status)]);
    let report: Value = serde_json::from_str(&ran.well()).expect("one JSON object");
    let problem = &report["ranks"][0]["machine"]["gpu"]["problem"];
    let told = format!("{} / {}", problem["what"], problem["help"]);
    let findings = report["findings"].as_array().into_iter().flatten();
    Some((told, findings.map(|finding| finding["what"].to_string()).collect()))
}

#[test]
fn a_driver_that_cannot_be_used_is_told_and_nothing_panics() {
    for (version, status, expected) in [
        ("11040", "0", ["knows CUDA 11.4", "driver 580"]),
        ("13000", "100", ["it sees no GPU", "nvidia-smi"]),
        (
            "13000",
            "803",
            ["cuInit failed for this machine: CUDA_ERROR_OF_THE_STUB (the stub says so)", "restart"],
        ),
    ] {
        let Some((told, findings)) = driver_told(version, status) else { return };
        assert!(expected.iter().all(|part| told.contains(part)), "{told}");
        assert!(findings.iter().any(|finding| finding.contains(expected[0])), "{findings:?}");
    }
}

#[test]
fn a_driver_that_sees_less_than_no_gpus_is_told() {
    let home = Home::new();
    stubs::driver(home.path(), &[]);
    if loader_knows(0) {
        return;
    }
    let set = [("STUB_VERSION", "13000"), ("STUB_GPUS", "-1")];
    let ran = home.run(&["infer", "--device", "cuda", "--max-new-tokens", "1"], &set);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{}", ran.err);
    assert!(ran.err.contains("-1 GPUs") && ran.err.contains("help: "), "{}", ran.err);
}

#[test]
fn a_driver_that_lacks_a_function_is_told_and_nothing_panics() {
    if loader_knows(0) {
        return;
    }
    // The first that is called, one that only an error calls, and one that is called long after the start.
    for lacking in ["cuInit", "cuGetErrorName", "cuLaunchKernelEx"] {
        let home = Home::new();
        stubs::driver(home.path(), &[lacking]);
        let set = [("STUB_VERSION", "13000"), ("STUB_STATUS", "803")];
        let told = format!("cannot be used: it lacks {lacking}");
        let check = |args: &[&str], code: i32| {
            let ran = home.run(args, &set);
            assert_eq!(ran.code, Some(code), "{args:?}: {}", ran.err);
            assert!(!ran.err.contains("panicked"), "{args:?}: {}", ran.err);
            ran
        };
        let report: Value =
            serde_json::from_str(&check(&["doctor", "--json"], 0).out).expect("one JSON object");
        let problem = &report["ranks"][0]["machine"]["gpu"]["problem"];
        assert!(problem["what"].as_str().unwrap().contains(&told), "{problem}");
        assert!(problem["help"].as_str().unwrap().contains("driver 580"), "{problem}");
        assert!(strings(&report["findings"], "what").iter().any(|what| what.contains(&told)), "{report}");
        let infer = ["infer", "--max-new-tokens", "2", "--prompt", "To be", "--device"];
        let ran = check(&[&infer[..], &["auto"]].concat(), 0);
        let lines: Vec<_> = ran.err.lines().filter(|line| line.contains(&told)).collect();
        assert!(lines.len() == 1 && lines[0].contains("on the CPU"), "{}", ran.err);
        let ran = check(&[&infer[..], &["cuda"]].concat(), 1);
        assert!(ran.err.contains(&told) && ran.err.contains("help: ") && ran.out.is_empty(), "{}", ran.err);
    }
    // One that lacks nothing is used, and says that there is no GPU.
    let home = Home::new();
    stubs::driver(home.path(), &[]);
    let ran = home.run(&["infer", "--prompt", "a", "--device", "cuda"], &[("STUB_VERSION", "13000")]);
    assert!(ran.err.contains("it sees no GPU"), "{}", ran.err);
}

#[test]
fn a_cublas_lt_that_lacks_functions_is_told() {
    if loader_knows(2) {
        return;
    }
    let told = |lacking: &[&str]| {
        let home = Home::new();
        stubs::cublas_lt(home.path(), lacking);
        home.json(&["doctor", "--json"])["ranks"][0]["machine"]["gpu"]["libraries"][2].clone()
    };
    let whole = told(&[]);
    assert!(whole["name"] == "cuBLASLt" && whole["version"] == "13.1", "{whole}");
    let problem = told(&["cublasLtMatmul", "cublasLtMatmulAlgoCheck"])["problem"].clone();
    let what = problem["what"].as_str().unwrap();
    assert!(what.ends_with("it lacks cublasLtMatmul, cublasLtMatmulAlgoCheck"), "{problem}");
    assert!(problem["help"].as_str().unwrap().contains("pip install nvidia-cublas"), "{problem}");
}

/// What `benches/record_gpu.sh` writes of the libraries, by its own line; it is run where results are recorded only.
#[test]
fn a_record_names_the_versions_of_the_libraries() {
    if loader_knows(2) {
        return;
    }
    let from = std::env::var_os("DIST_REPO").map_or_else(|| std::env::current_dir().unwrap(), PathBuf::from);
    let script = from.ancestors().find_map(|dir| fs::read_to_string(dir.join("benches/record_gpu.sh")).ok());
    let script = script.expect("benches/record_gpu.sh");
    let line = script.lines().find(|line| line.contains("bin/dist-cli doctor")).expect("what names them");
    let home = Home::new();
    stubs::cublas_lt(home.path(), &[]);
    let line = line.replace("bin/dist-cli", env!("CARGO_BIN_EXE_dist-cli"));
    let mut bash = std::process::Command::new("bash");
    let output = bash.args(["-c", &line]).env("DIST_CUDA_LIB", home.path()).output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.lines().any(|line| line == "cuBLASLt 13.1"), "{told}");
    assert!(told.contains("CUDA driver") && told.contains("NVRTC") && !told.contains(" at "), "{told}");
}
