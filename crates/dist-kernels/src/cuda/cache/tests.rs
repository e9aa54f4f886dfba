//! The cache with a compiler that counts, in folders of its own.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::compile::{Arch, Compiled};
use super::*;

struct Counting {
    version: Version,
    n_calls: AtomicUsize,
}

impl Counting {
    fn new(minor: u32) -> Self {
        Self { version: Version { major: 13, minor }, n_calls: AtomicUsize::new(0) }
    }
}

impl Compiler for Counting {
    fn version(&self) -> Version {
        self.version
    }

    fn compile(&self, program: &Program) -> Result<Compiled, CompileError> {
        self.n_calls.fetch_add(1, Ordering::Relaxed);
        let refused = program.source.contains("error").then(|| CompileError::Refused {
            unit: program.unit.to_owned(),
            arch: program.arch.to_string(),
            meaning: "an error".to_owned(),
            log: "line 1".to_owned(),
        });
        let log = "Compiling entry function 'k' for 'sm_80'\n 8 bytes stack frame\n Used 7 registers\n";
        let cubin = format!("code of {} by {}", program.source, self.version).into_bytes();
        refused.map_or(Ok(Compiled { cubin, log: log.to_owned() }), Err)
    }
}

fn program(source: &str) -> Program {
    Program { unit: "unit", source: source.to_owned(), arch: Arch::SM_80 }
}

fn cache() -> (tempfile::TempDir, KernelCache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::new(dir.path().join("not/yet/there"));
    (dir, cache)
}

fn entries(cache: &KernelCache) -> Vec<PathBuf> {
    fs::read_dir(cache.dir()).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn what_was_compiled_once_is_read_again() {
    let (_dir, cache) = cache();
    let compiler = Counting::new(0);
    let first = cache.get(&program("a"), Ok(&compiler)).unwrap();
    let again = cache.get(&program("a"), Ok(&compiler)).unwrap();
    assert_eq!(compiler.n_calls.load(Ordering::Relaxed), 1);
    let (Origin::Compiled(stored), Origin::Cache(read)) = (&first.origin, &again.origin) else {
        panic!("{:?}, {:?}", first.origin, again.origin)
    };
    assert_eq!(stored, read);
    assert_eq!((&first.bytes, &first.usages), (&again.bytes, &again.usages));
    assert_eq!((again.usages[0].registers, again.usages[0].spills()), (7, true));
    // Nothing but the entry is left in the folder.
    assert_eq!(&entries(&cache), std::slice::from_ref(stored));
}

#[test]
fn other_sources_architectures_and_versions_are_other_entries() {
    let (_dir, cache) = cache();
    let (old, new) = (Counting::new(0), Counting::new(1));
    let other_arch = Program { arch: Arch::SM_90, ..program("a") };
    for program in [program("a"), program("b"), other_arch] {
        for compiler in [&old, &new] {
            assert!(matches!(cache.get(&program, Ok(compiler)).unwrap().origin, Origin::Compiled(_)));
        }
    }
    assert_eq!(entries(&cache).len(), 6);
}

#[test]
fn a_damaged_entry_is_made_anew() {
    let (_dir, cache) = cache();
    let compiler = Counting::new(0);
    let sound = cache.get(&program("a"), Ok(&compiler)).unwrap();
    let path = entries(&cache).pop().unwrap();
    let bytes = fs::read(&path).unwrap();
    // Every byte counts, and so does every length.
    let flipped = (0..bytes.len()).map(|at| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        bytes
    });
    let cut = (0..bytes.len()).map(|len| bytes[..len].to_vec());
    let longer = [bytes.clone(), vec![0]].concat();
    let mut n_damages = 0;
    for damaged in flipped.chain(cut).chain([longer]) {
        fs::write(&path, &damaged).unwrap();
        assert!(!cache.holds(&program("a")));
        let again = cache.get(&program("a"), Ok(&compiler)).unwrap();
        assert!(matches!(again.origin, Origin::Compiled(_)));
        assert_eq!((again.bytes, fs::read(&path).unwrap()), (sound.bytes.clone(), bytes.clone()));
        n_damages += 1;
    }
    assert_eq!(compiler.n_calls.load(Ordering::Relaxed), 1 + n_damages);
}

#[test]
fn what_is_no_file_of_ours_is_damaged_and_made_anew() {
    let (_dir, cache) = cache();
    let compiler = Counting::new(0);
    assert_eq!(cache.look(&program("a")), Kept::Nothing);
    cache.get(&program("a"), Ok(&compiler)).unwrap();
    assert_eq!(cache.look(&program("a")), Kept::Sound);
    let path = entries(&cache).pop().unwrap();
    fs::remove_file(&path).unwrap();
    regular_file::tests::with_each_fault(&path, |what| {
        assert!(matches!(cache.look(&program("a")), Kept::Damaged(_)), "{what}");
        assert!(cache.get(&program("a"), Err(&"no NVRTC")).is_err(), "{what}");
        let made = cache.get(&program("a"), Ok(&compiler)).unwrap();
        assert_eq!(made.bytes, b"code of a by 13.0", "{what}");
        // Only a folder cannot be replaced.
        assert_eq!(matches!(made.origin, Origin::NotStored(_)), what == "a folder", "{what}");
    });
}

#[test]
fn without_a_compiler_the_newest_entry_will_do() {
    let (_dir, cache) = cache();
    let none = || Err(&"no NVRTC" as &dyn std::fmt::Display);
    let error = cache.get(&program("a"), none()).unwrap_err();
    assert!(
        error.to_string().contains("unit for sm_80") && error.to_string().contains("no NVRTC"),
        "{error}"
    );
    for minor in [2, 10, 9] {
        cache.get(&program("a"), Ok(&Counting::new(minor))).unwrap();
    }
    let found = cache.get(&program("a"), none()).unwrap();
    assert_eq!(found.compiler, Version { major: 13, minor: 10 });
    assert!(cache.holds(&program("a")) && !cache.holds(&program("b")));
    assert!(cache.get(&program("b"), none()).is_err());
}

#[test]
fn a_source_that_does_not_compile_leaves_nothing() {
    let (_dir, cache) = cache();
    let error = cache.get(&program("error"), Ok(&Counting::new(0))).unwrap_err();
    assert!(error.to_string().contains("line 1"), "{error}");
    assert!(!cache.dir().exists());
}

#[test]
fn kernels_that_cannot_be_stored_are_used_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    // A file stands where the folder should be.
    let cache = KernelCache::new(dir.path().join("file"));
    fs::write(cache.dir(), "").unwrap();
    assert!(cache.try_to_write().is_err());
    let cubin = cache.get(&program("a"), Ok(&Counting::new(0))).unwrap();
    assert!(matches!(&cubin.origin, Origin::NotStored(why) if why.contains("file")), "{:?}", cubin.origin);
    assert_eq!(cubin.bytes, b"code of a by 13.0");
}

#[test]
fn a_folder_is_tried_before_anything_is_compiled_and_nothing_is_left_in_it() {
    let (_dir, cache) = cache();
    cache.try_to_write().unwrap();
    assert_eq!(entries(&cache), [""; 0].map(PathBuf::from));
    let (old, new) = (Version { major: 13, minor: 0 }, Version { major: 13, minor: 1 });
    assert!(!cache.holds_of(&program("a"), old));
    cache.get(&program("a"), Ok(&Counting::new(0))).unwrap();
    assert!(cache.holds_of(&program("a"), old) && !cache.holds_of(&program("a"), new));
}

#[test]
fn writers_of_one_entry_do_not_disturb_each_other() {
    let (_dir, cache) = cache();
    let cache = &cache;
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(move || {
                let cubin = cache.get(&program("a"), Ok(&Counting::new(0))).unwrap();
                assert_eq!(cubin.bytes, b"code of a by 13.0");
                assert!(!matches!(cubin.origin, Origin::NotStored(_)));
            });
        }
    });
    assert_eq!(entries(cache).len(), 1);
}

#[test]
fn many_programs_come_in_their_order_each_compiled_once() {
    let (_dir, cache) = cache();
    let compiler = Counting::new(0);
    let sources = ["a", "b", "an error", "c", "d", "e", "f"];
    let programs: Vec<_> = sources.iter().map(|source| program(source)).collect();
    cache.get(&programs[3], Ok(&compiler)).unwrap();
    let begun = AtomicUsize::new(0);
    let outcomes = cache.get_all(&programs, &compiler, &|_| {
        begun.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!((begun.into_inner(), compiler.n_calls.load(Ordering::Relaxed)), (7, 7));
    assert_eq!(outcomes.len(), sources.len());
    for (source, (outcome, _)) in sources.iter().zip(&outcomes) {
        match outcome {
            Ok(cubin) => assert!(cubin.bytes.starts_with(format!("code of {source} ").as_bytes())),
            Err(error) => assert!(*source == "an error" && matches!(error, CompileError::Refused { .. })),
        }
    }
    assert!(outcomes[2].0.is_err());
    assert!(matches!(outcomes[3].0.as_ref().unwrap().origin, Origin::Cache(_)));
    assert!(cache.get_all(&[], &compiler, &|_| {}).is_empty());
}
