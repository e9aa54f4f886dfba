//! Libraries that stand in for NVIDIA's, compiled on the spot, so that their answers can be chosen.

use std::path::{Path, PathBuf};
use std::process::Command;

use dist_kernels::cuda::libraries::symbols;

/// NVRTC: its machine code is the program's own text's length, and its log names one kernel, `UNIT_kernel`. The kernel
/// of the unit that `STUB_SPILLS` names spills; the unit that `STUB_ERROR` names does not compile.
const NVRTC: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct program { char unit[64], log[256], cubin[64]; };
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
const char *nvrtcGetErrorString(int status) { return status == 6 ? "NVRTC_ERROR_COMPILATION" : "another"; }
int nvrtcCreateProgram(struct program **p, const char *source, const char *name, int n, const char **h, const char **i) {
    *p = calloc(1, sizeof **p);
    strncpy((*p)->unit, name, strcspn(name, "."));
    sprintf((*p)->cubin, "code of %zu bytes", strlen(source));
    return 0;
}
int nvrtcDestroyProgram(struct program **p) { free(*p); *p = 0; return 0; }
static int is(const char *variable, const char *unit) {
    const char *value = getenv(variable);
    return value && !strcmp(value, unit);
}
int nvrtcCompileProgram(struct program *p, int n, const char **options) {
    if (is("STUB_ERROR", p->unit)) { sprintf(p->log, "%s.cu(7): error: no such thing", p->unit); return 6; }
    sprintf(p->log, "ptxas info : Compiling entry function '%s_kernel' for '%s'\n"
        "    %d bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info : Used 40 registers, 256 bytes smem\n", p->unit, options[0], is("STUB_SPILLS", p->unit) ? 8 : 0);
    return 0;
}
int nvrtcGetProgramLogSize(struct program *p, size_t *n) { *n = strlen(p->log) + 1; return 0; }
int nvrtcGetProgramLog(struct program *p, char *log) { strcpy(log, p->log); return 0; }
int nvrtcGetCUBINSize(struct program *p, size_t *n) { *n = strlen(p->cubin); return 0; }
int nvrtcGetNumSupportedArchs(int *n) { *n = 4; return 0; }
int nvrtcGetSupportedArchs(int *archs) { memcpy(archs, (int[]){75, 80, 90, 120}, 4 * sizeof *archs); return 0; }
int nvrtcGetCUBIN(struct program *p, char *cubin) { memcpy(cubin, p->cubin, strlen(p->cubin)); return 0; }
"#;

/// The driver, as far as it is called before it has said that it is of no use; what else it has does nothing.
const DRIVER: &str = r#"
#include <stdlib.h>
static int number(const char *name) { const char *value = getenv(name); return value ? atoi(value) : 0; }
int cuDriverGetVersion(int *version) { *version = number("STUB_VERSION"); return 0; }
int cuInit(unsigned flags) { return number("STUB_STATUS"); }
int cuDeviceGetCount(int *n) { *n = number("STUB_GPUS"); return 0; }
int cuGetErrorName(int status, const char **name) { *name = "CUDA_ERROR_OF_THE_STUB"; return 0; }
int cuGetErrorString(int status, const char **text) { *text = "the stub says so"; return 0; }
"#;

/// A stub of NVRTC in `dir`.
pub(crate) fn nvrtc(dir: &Path) -> PathBuf {
    build(dir, "libnvrtc.so.13", NVRTC)
}

/// cuBLASLt, which is opened and not called here.
const CUBLAS_LT: &str = "#include <stddef.h>\nsize_t cublasLtGetVersion(void) { return 130100; }\n";

/// A stub of the driver in `dir`, with every function that is looked up but `lacking`.
pub(crate) fn driver(dir: &Path, lacking: &[&str]) -> PathBuf {
    build(dir, "libcuda.so.1", &with_all(DRIVER, symbols::of_driver(), lacking))
}

/// A stub of cuBLASLt in `dir`, in the same way.
pub(crate) fn cublas_lt(dir: &Path, lacking: &[&str]) -> PathBuf {
    build(dir, "libcublasLt.so.13", &with_all(CUBLAS_LT, symbols::of_cublas_lt(), lacking))
}

/// `source` without the lines of functions that are `lacking`, and with one for each other symbol that it has not.
fn with_all(source: &str, all: impl Iterator<Item = &'static str>, lacking: &[&str]) -> String {
    let names = |line: &str, symbol: &str| line.contains(&format!(" {symbol}("));
    let kept = source.lines().filter(|line| !lacking.iter().any(|symbol| names(line, symbol)));
    let mut whole: Vec<String> = kept.map(str::to_owned).collect();
    for symbol in all.filter(|symbol| !lacking.contains(symbol)) {
        if !whole.iter().any(|line| names(line, symbol)) {
            whole.push(format!("int {symbol}(void) {{ return 0; }}"));
        }
    }
    whole.join("\n") + "\n"
}

fn build(dir: &Path, file: &str, source: &str) -> PathBuf {
    let (path, text) = (dir.join(file), dir.join("stub.c"));
    std::fs::write(&text, source).expect("a writable folder");
    let soname = format!("-Wl,-soname,{file}");
    let mut cc = Command::new("cc");
    let built = cc.args(["-shared", "-fPIC", &soname, "-o"]).arg(&path).arg(&text).status();
    assert!(built.expect("the C compiler that links Rust programs").success(), "{file}");
    path
}
