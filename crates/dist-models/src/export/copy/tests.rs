//! The size of the pieces leaves no trace.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::*;
use crate::checkpoint::OpenOptions;
use crate::export::ExportRequest;

fn fixture(name: &str) -> PathBuf {
    if let Some(root) = std::env::var_os("DIST_REPO") {
        return PathBuf::from(root).join("tests/fixtures").join(name);
    }
    let here = std::env::current_dir().unwrap();
    let root = here.ancestors().find(|dir| dir.join("tests/fixtures").is_dir());
    root.expect("run inside the repository, or set DIST_REPO to it").join("tests/fixtures").join(name)
}

/// The files and the hashes of a copy.
type Files = (Vec<Vec<u8>>, Vec<Vec<Digest>>);

/// A copy in pieces of this size; `thread` begins the writer's.
fn try_copy(
    name: &str,
    dtype: Option<DType>,
    piece_bytes: PieceBytes,
    thread: fn() -> Builder,
) -> Result<Files, ExportError> {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture(name), &OpenOptions { mmap: false }).unwrap();
    let split = Split::even(source.config(), 3, 2);
    let (out, threads) = (Path::new("unused"), 1);
    let split = &split;
    let request =
        ExportRequest { source: &source, dtype, max_seq_len: None, split, out, overwrite: false, threads };
    let outline = request.outline().unwrap();
    let paths: Vec<PathBuf> = (0..6).map(|rank| dir.path().join(rank.to_string())).collect();
    let jobs = request.jobs(&outline).unwrap();
    let order =
        Order { source: &source, jobs: &jobs, split, files: &outline.files, paths: &paths, piece_bytes };
    let copied = run(&order, &mut |_| ControlFlow::Continue(()), thread)?;
    Ok((paths.iter().map(|path| std::fs::read(path).unwrap()).collect(), copied.parts))
}

fn copy(name: &str, dtype: Option<DType>, piece_bytes: PieceBytes) -> Files {
    try_copy(name, dtype, piece_bytes, Builder::new).unwrap()
}

#[test]
fn a_writer_that_cannot_be_started_is_told() {
    // No address space has room for such a stack.
    let thread = || Builder::new().stack_size(1 << 60);
    let error = try_copy("gpt2-erf-inner", None, PieceBytes::USUAL, thread).unwrap_err();
    assert!(matches!(error, ExportError::Thread(_)), "{error}");
    assert!(error.help().unwrap().contains("ulimit -u"));
}

#[test]
fn pieces_of_any_size_make_the_same_files() {
    for (name, dtype) in [("gpt2-erf-inner", None), ("opt-post-norm-proj", Some(DType::F16))] {
        let expected = copy(name, dtype, PieceBytes::USUAL);
        // One row at a time, and sizes that no row's divides.
        for bytes in [1, 1000, 10_007] {
            let found = copy(name, dtype, PieceBytes { along: bytes, across: bytes });
            assert!(found == expected, "{name} in pieces of {bytes} bytes");
        }
    }
}

#[test]
fn whoever_watches_may_say_no() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&fixture("gpt2"), &OpenOptions { mmap: false }).unwrap();
    let split = Split::solo(source.config());
    let out = dir.path().join("a/b");
    let request = ExportRequest {
        source: &source,
        dtype: None,
        max_seq_len: None,
        split: &split,
        out: &out,
        overwrite: false,
        threads: 1,
    };
    let mut n_told = 0;
    let stopped = request.write(&mut |progress| {
        n_told += 1;
        assert!(progress.done_bytes <= progress.total_bytes);
        if n_told == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(stopped, Err(ExportError::Interrupted)));
    assert_eq!((n_told, std::fs::read_dir(dir.path()).unwrap().count()), (3, 0));
}
