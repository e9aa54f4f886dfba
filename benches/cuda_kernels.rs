//! Every kernel of a GPU at the shapes of GPT-3 1.3B, 6.7B and 13B, beside what the GPU can do at best: graphs of many
//! launches over buffers that rotate beyond the L2 cache, medians of several replays.
//!
//! `cargo bench -p dist-kernels --bench cuda_kernels [-- [--json FILE] FILTER…]`, for instance `-- linear/few` or
//! `-- attention/decode`; a case runs if its name contains one of the filters. Without a GPU it says so and ends.
//!
//! The section `load` reads weights from a file of 4 GiB (`--load-gib N`) that it makes in `DIST_BENCH_DIR`, else in the
//! system's folder for such; `--sweep` adds what other buffers and readers reach, and the parts alone.

use std::process::ExitCode;

use dist_kernels::KernelError;
use dist_kernels::cuda::driver::CudaError;

#[path = "cuda_kernels/attention.rs"]
mod attention;
#[path = "cuda_kernels/gpu.rs"]
mod gpu;
#[path = "cuda_kernels/linear.rs"]
mod linear;
#[path = "cuda_kernels/load.rs"]
mod load;
#[path = "cuda_kernels/load_parts.rs"]
mod load_parts;
#[path = "cuda_kernels/origin.rs"]
mod origin;
#[path = "cuda_kernels/report.rs"]
mod report;
#[path = "cuda_kernels/rows.rs"]
mod rows;

use gpu::Gpu;
use report::Report;

/// What was asked for.
#[derive(Default)]
struct Request {
    json: Option<String>,
    load_gib: Option<usize>,
    sweeps: bool,
    filters: Vec<String>,
}

impl Request {
    fn read(mut words: impl Iterator<Item = String>) -> Self {
        let mut request = Self::default();
        while let Some(word) = words.next() {
            match word.as_str() {
                // Cargo's own.
                "--bench" | "--test" => {}
                "--json" => request.json = Some(words.next().expect("--json takes a file")),
                "--load-gib" => {
                    let size = words.next().and_then(|size| size.parse().ok());
                    request.load_gib = Some(size.expect("--load-gib takes a whole number"));
                }
                "--sweep" => request.sweeps = true,
                _ if word.starts_with("--") => {
                    panic!("no flag is called {word}: --json FILE, --load-gib N, --sweep, or filters")
                }
                _ => request.filters.push(word),
            }
        }
        request
    }

    fn takes(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()))
    }
}

/// What of a run went wrong.
pub(crate) type Failure = Box<dyn std::error::Error>;

fn run(request: &Request, gpu: &mut Gpu) -> Result<(), Failure> {
    let mut report = Report::new(gpu);
    let takes = |name: &str| request.takes(name);
    linear::run(gpu, &takes, &mut report)?;
    attention::run(gpu, &takes, &mut report)?;
    rows::run(gpu, &takes, &mut report)?;
    let asked = load::Asked { gib: request.load_gib, sweeps: request.sweeps };
    load::run(gpu, &takes, &asked, &mut report)?;
    report.end(gpu)?;
    if let Some(file) = &request.json {
        std::fs::write(file, report.json()? + "\n")?;
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a skip must be loud, and a failure says why")]
fn main() -> ExitCode {
    let request = Request::read(std::env::args().skip(1));
    let ran = match Gpu::open() {
        Ok(mut gpu) => run(&request, &mut gpu),
        Err(KernelError::Cuda(error @ (CudaError::Library(_) | CudaError::NoGpu))) => {
            eprintln!("SKIPPED: cuda_kernels: {error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => Err(error.into()),
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
