//! What tests of this module share: the GPU if there is one, kernels that are compiled on the spot, and skips that
//! nobody overlooks.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::compile::{Compiler, Program};
use super::driver::{Context, CudaError, Driver, Module};
use super::libraries::{Libraries, LibraryDirs};

/// One test at a time: who gives a module or a backend back may wait for the whole GPU, which ends what another thread
/// records.
static ONE: Mutex<()> = Mutex::new(());

/// A GPU and what is needed to make kernels for it. It must outlive what is made with it: other tests wait for that.
pub(crate) struct Gpu {
    pub(crate) context: Context,
    pub(crate) libraries: Libraries,
    _one: MutexGuard<'static, ()>,
}

impl Gpu {
    /// The first GPU; without one, says that `test` is skipped.
    pub(crate) fn find(test: &str) -> Option<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let libraries = libraries();
        let context = Driver::open(&libraries).and_then(|driver| Context::new(&driver, 0));
        match (context, libraries.nvrtc().map(drop)) {
            (Ok(context), Ok(())) => return Some(Self { context, libraries, _one: one }),
            (Err(error @ (CudaError::Library(_) | CudaError::NoGpu)), _) => skip(test, &error.to_string()),
            (Ok(_), Err(error)) => skip(test, &error.to_string()),
            (Err(error), _) => panic!("the GPU cannot be used: {error}"),
        }
        None
    }

    /// A module of `source`.
    pub(crate) fn module(&self, source: &str) -> Module {
        let (major, minor) = self.context.info().capability;
        let arch = format!("sm_{major}{minor}").parse().expect("the driver's capability");
        let program = Program { unit: "test", source: source.to_owned(), arch };
        let compiled = self.libraries.nvrtc().expect("found before").compile(&program).expect("it compiles");
        self.context.module("test", &compiled.cubin).expect("it loads")
    }
}

/// The libraries of this machine, where the command line would look.
pub(crate) fn libraries() -> Libraries {
    let dirs = std::env::var_os("DIST_CUDA_LIB");
    let first = dirs.map_or_else(Vec::new, |dirs| std::env::split_paths(&dirs).collect());
    let last: Vec<PathBuf> = vec![Path::new("/usr/local/cuda/lib64").to_owned()];
    Libraries::new(LibraryDirs { first, asks_loader: true, last })
}

/// Says that a test was skipped where nobody overlooks it.
#[allow(clippy::print_stderr, reason = "a skip must be loud")]
pub(crate) fn skip(test: &str, why: &str) {
    use std::io::Write;
    eprintln!("SKIPPED: {test}: {why}");
    let Some(log) = std::env::var_os("DIST_SKIP_LOG") else { return };
    let log = std::fs::OpenOptions::new().append(true).create(true).open(log);
    writeln!(log.expect("the log of skipped tests"), "{test} {why}").expect("the log of skipped tests");
}
