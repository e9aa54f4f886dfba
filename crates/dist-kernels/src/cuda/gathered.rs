//! The kernels of a model that are not in the cache: whoever asks for the first has all of them compiled, at the same time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::cache::{Cubin, KernelCache};
use super::compile::{CompileError, Compiler, Program};

/// What was compiled for somebody else and nobody has asked for yet. It is kept here, for a cache may be a folder that
/// cannot be written.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    made: HashMap<&'static str, Result<Cubin, CompileError>>,
    /// Whether that was done.
    is_done: bool,
}

impl Gathered {
    /// The kernels of `wanted`. Where they are nowhere, those of `usual` are not either, most likely: all are compiled that
    /// are missing. What of them does not compile is told to who asks for it.
    pub(super) fn take(
        &mut self,
        wanted: &Program,
        usual: impl FnOnce() -> Vec<Program>,
        (cache, compiler): (&KernelCache, &dyn Compiler),
    ) -> Result<Cubin, CompileError> {
        // Threads that begin together would all compile everything.
        static GATHERING: Mutex<()> = Mutex::new(());
        let version = compiler.version();
        if let Some(made) = self.made.remove(wanted.unit) {
            return made;
        }
        if let Some(kept) = cache.kept_by(wanted, version) {
            return Ok(kept);
        }
        let _gathering = GATHERING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = cache.kept_by(wanted, version) {
            return Ok(kept);
        }
        let others = if self.is_done { Vec::new() } else { usual() };
        let others = others.into_iter().filter(|program| program.unit != wanted.unit);
        let missing: Vec<_> = std::iter::once(wanted.clone())
            .chain(others.filter(|program| !cache.holds_of(program, version)))
            .collect();
        self.is_done = true;
        let start = Instant::now();
        let outcomes = cache.get_all(&missing, compiler, &|_| {});
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!("kernels of {} units compiled in {seconds:.1} s", missing.len());
        self.made.extend(missing.iter().zip(outcomes).map(|(program, (outcome, _))| (program.unit, outcome)));
        self.made.remove(wanted.unit).expect("it was among the missing")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::compile::{Arch, Compiled};
    use super::super::libraries::Version;
    use super::*;

    #[derive(Default)]
    struct Counting(AtomicUsize);

    impl Compiler for Counting {
        fn version(&self) -> Version {
            Version { major: 13, minor: 0 }
        }

        fn compile(&self, program: &Program) -> Result<Compiled, CompileError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            if program.unit == "wrong" {
                return Err(CompileError::Refused {
                    unit: program.unit.to_owned(),
                    arch: program.arch.to_string(),
                    meaning: "an error".to_owned(),
                    log: String::new(),
                });
            }
            Ok(Compiled { cubin: program.unit.into(), log: String::new() })
        }
    }

    fn program(unit: &'static str) -> Program {
        Program { unit, source: unit.to_owned(), arch: Arch::SM_80 }
    }

    fn all() -> Vec<Program> {
        ["a", "b", "wrong"].map(program).into()
    }

    /// What is got, and how often the compiler has run by then.
    fn run(cache: &KernelCache, units: &[&'static str]) -> Vec<(bool, usize)> {
        let (mut gathered, compiler) = (Gathered::default(), Counting::default());
        let mut take = |unit: &&'static str| {
            let taken = gathered.take(&program(unit), all, (cache, &compiler));
            let is_right = taken.is_ok_and(|cubin| cubin.bytes == unit.as_bytes());
            (is_right, compiler.0.load(Ordering::Relaxed))
        };
        units.iter().map(&mut take).collect()
    }

    #[test]
    fn the_first_has_all_compiled_once_also_where_nothing_can_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let asked = ["b", "a", "wrong", "rare"];
        let expected = [(true, 3), (true, 3), (false, 3), (true, 4)];
        // A file stands where the folder should be.
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(run(&KernelCache::new(dir.path().join("file")), &asked), expected);
        let kept = KernelCache::new(dir.path().join("kept"));
        assert_eq!(run(&kept, &asked), expected);
        // The next one finds all but what does not compile.
        assert_eq!(run(&kept, &["a", "b", "rare", "wrong"]), [(true, 0), (true, 0), (true, 0), (false, 1)]);
    }
}
