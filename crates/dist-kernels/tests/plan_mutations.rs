//! Files of GEMM plans that were changed: the seeds of the fuzz target `gemm_plans`, what becomes of them when bytes are
//! flipped, cut and put in, and how much memory the worst of them take.

// Clippy knows tests, but not the functions that they share.
#![allow(clippy::unwrap_used)]

mod plan_file;

use std::path::PathBuf;

use dist_kernels::cuda::plans::parse;
use plan_file::{check, of_the_seeds};
use proptest::prelude::*;

/// The seeds, in the folder that `DIST_REPO` names or in one upwards from the current one.
fn seeds() -> Vec<Vec<u8>> {
    let from = std::env::var_os("DIST_REPO").map_or_else(|| std::env::current_dir().unwrap(), PathBuf::from);
    let folders = from.ancestors().map(|folder| folder.join("fuzz/seeds/gemm_plans"));
    let folder = folders.into_iter().find(|folder| folder.is_dir()).expect("fuzz/seeds/gemm_plans");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn seeds_of_the_fuzz_target_hold() {
    let seeds = seeds();
    for seed in &seeds {
        check(seed);
    }
    let n_sound = seeds.iter().filter(|seed| parse(seed, &of_the_seeds()).is_ok()).count();
    assert!(n_sound >= 2 && seeds.len() > n_sound, "{n_sound} of {} seeds are plans", seeds.len());
}

proptest! {
    #[test]
    fn changed_bytes_are_refused_or_plans(
        seed in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..12),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let seeds = seeds();
        let mut bytes = seed.get(&seeds).clone();
        for (at, byte, kind) in changes {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                // A digit becomes another one, which leaves the file's form as it is.
                _ if bytes[at].is_ascii_digit() => bytes[at] = b'0' + byte % 10,
                _ => {}
            }
        }
        bytes.truncate(end.map_or(bytes.len(), |end| end.index(bytes.len())));
        check(&bytes);
    }
}

/// The most memory that this process has had.
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

/// Files as long as they may be, made of what takes most memory for its length.
#[test]
fn the_worst_files_take_a_bounded_amount_of_memory() {
    const FILE_BYTES: usize = 4 << 20;
    const MOST: usize = 32 << 20;
    let line =
        r#"{"rows":128,"n":1,"k":1,"ld":1,"dtype":"f16","out_f32":true,"epilogue":"none","own_us":1},"#;
    let start =
        r#"{"form":1,"of":{"gpu":"a GPU","driver":"13.0","library":130100,"source":"0123"},"plans":["#;
    let filled = |start: &str, with: &str, end: &str| {
        let n = (FILE_BYTES - start.len() - end.len()) / with.len();
        format!("{start}{}{end}", with.repeat(n))
    };
    let files = [
        filled(start, line, &format!("{}]}}", line.trim_end_matches(','))),
        filled(&format!("{start}{{\"more\":["), "0,", "0]}]}"),
        filled(&format!("{start}{{\"algo\":\""), "\\n", "\"}]}"),
        filled("{\"more\":[", "[],", "[]]}"),
        filled("", "[", ""),
        filled("", "{\"of\":", ""),
        filled("{\"", "x", "\":1}"),
    ];
    let before = peak_bytes();
    for file in files {
        let why = parse(file.as_bytes(), &of_the_seeds()).unwrap_err();
        assert!(why.len() < 1024, "{why:.300}");
        let taken = peak_bytes() - before;
        assert!(taken < MOST, "{taken} bytes for {file:.120}");
    }
}
