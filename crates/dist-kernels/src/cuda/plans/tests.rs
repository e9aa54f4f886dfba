//! Plans and their files, without a GPU.

use std::fs;

use super::*;
use crate::cuda::driver::EpilogueKind;

fn of() -> PlansOf {
    PlansOf {
        gpu: "a GPU".to_owned(),
        driver: "13.0".to_owned(),
        library: 130_100,
        source: "0123".to_owned(),
    }
}

fn key(rows: usize, n: usize, dtype: DType) -> PlanKey {
    let epilogue = EpilogueKind::BiasGelu;
    PlanKey { rows, shape: ProductShape { n, k: 768, ld: 776, dtype, out_f32: false, epilogue } }
}

/// One that the library wins, one that it loses, and one that it does not take part in.
fn plans(dir: &Path) -> PlanCache {
    let mut plans = PlanCache::open(dir, of());
    let algo = Algo(std::array::from_fn(|i| (i * 37) as u8));
    let library = |us| Some(LibraryPlan { us, algo });
    plans.insert(key(128, 3072, DType::BF16), Plan { own_us: 12.625, library: library(11.1) });
    plans.insert(key(16384, 3072, DType::F16), Plan { own_us: 0.1 + 0.2, library: library(0.5) });
    plans.insert(key(8192, 50257, DType::BF16), Plan { own_us: 900.0, library: None });
    plans
}

#[test]
fn buckets_end_where_they_are_said_to_and_leave_no_gap() {
    assert_eq!((bucket(0), bucket(1), bucket(64)), (None, None, None));
    let ends = [65, 128, 129, 256, 257, 1000, 1024, 4097, 8192, 8193, 16_384, 16_385, 24_577];
    let found = ends.map(|rows| bucket(rows).unwrap());
    let expected = [128, 128, 256, 256, 512, 1024, 1024, 8192, 8192, 16_384, 16_384, 24_576, 32_768];
    assert_eq!(found, expected);
    for rows in 65..40_000 {
        let last = bucket(rows).unwrap();
        assert!(first_of_bucket(last) <= rows && rows <= last, "{rows}: ..={last}");
        assert_eq!(bucket(last), Some(last));
        assert_eq!(bucket(first_of_bucket(last)), Some(last));
    }
}

#[test]
fn all_rows_up_to_the_most_have_their_bucket() {
    let all = |rows_max| buckets(rows_max).collect::<Vec<_>>();
    assert_eq!(all(64), [0; 0]);
    assert_eq!(all(65), [128]);
    assert_eq!(all(128), [128]);
    assert_eq!(all(129), [128, 256]);
    assert_eq!(all(8192), [128, 256, 512, 1024, 2048, 4096, 8192]);
    assert_eq!(all(20_000).last(), Some(&24_576));
}

#[test]
fn plans_are_read_as_they_were_written_and_their_hash_is_the_files() {
    let dir = tempfile::tempdir().unwrap();
    let written = plans(dir.path());
    written.save().unwrap();
    let read = PlanCache::open(dir.path(), of());
    assert_eq!(read.plans, written.plans);
    let file = fs::read(read.path()).unwrap();
    assert_eq!(read.hash(), hex(&Sha256::digest(&file)));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "what was written beside is left");
    // In whatever order they came.
    let mut again = PlanCache::open(&dir.path().join("elsewhere"), of());
    for rows in [8192, 128, 16384] {
        let (key, plan) = written.plans.iter().find(|(key, _)| key.rows == rows).unwrap();
        again.insert(*key, *plan);
    }
    assert_eq!(again.hash(), written.hash());
    again.insert(key(256, 1, DType::F16), Plan { own_us: 1.0, library: None });
    assert_ne!(again.hash(), written.hash());
}

#[test]
fn the_faster_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let plans = plans(dir.path());
    let winner = |rows, n, dtype| plans.get(&key(rows, n, dtype)).unwrap().winner();
    assert!(matches!(winner(128, 3072, DType::BF16), Winner::Library(algo) if algo.0[2] == 74));
    assert_eq!(winner(16384, 3072, DType::F16), Winner::Own);
    assert_eq!(winner(8192, 50257, DType::BF16), Winner::Own);
    assert_eq!(plans.get(&key(128, 3072, DType::F16)), None);
}

#[test]
fn another_gpu_driver_library_or_source_has_plans_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    plans(dir.path()).save().unwrap();
    let others = [
        PlansOf { gpu: "another GPU".to_owned(), ..of() },
        PlansOf { driver: "13.1".to_owned(), ..of() },
        PlansOf { library: 130_101, ..of() },
        PlansOf { source: "4567".to_owned(), ..of() },
    ];
    for other in others {
        let plans = PlanCache::open(dir.path(), other.clone());
        assert!(plans.is_empty(), "{other:?}");
    }
    assert_eq!(PlanCache::open(dir.path(), of()).len(), 3);
}

#[test]
fn a_file_that_is_not_sound_is_ignored_and_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let sound = plans(dir.path());
    sound.save().unwrap();
    let text = fs::read_to_string(sound.path()).unwrap();
    let algo = hex(&sound.plans.values().find_map(|plan| plan.library).unwrap().algo.0);
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    let damaged = [
        String::new(),
        "[]".to_owned(),
        text[..text.len() / 2].to_owned(),
        with("\"form\": 1", "\"form\": 2"),
        with("a GPU", "b GPU"),
        with("12.625", "-12.625"),
        with("12.625", "0.0"),
        with("12.625", "1e999"),
        with("12.625", "null"),
        with("\"rows\": 128", "\"rows\": 100"),
        with("\"rows\": 128", "\"rows\": 64"),
        with("\"n\": 50257", "\"n\": 0"),
        with("\"n\": 50257", "\"n\": 5025700000000"),
        with("\"ld\": 776", "\"ld\": 760"),
        with("\"bf16\"", "\"f32\""),
        with("bias_gelu", "bias_tanh"),
        with(&algo, &algo[2..]),
        with(&algo, &format!("zz{}", &algo[2..])),
        with(&format!("\"{algo}\""), "null"),
        format!("{text}{}", " ".repeat(FILE_BYTES_MAX as usize)),
    ];
    for text in damaged {
        fs::write(sound.path(), &text).unwrap();
        assert!(read(sound.path(), &of()).is_err(), "{text:.300}");
        let mut plans = PlanCache::open(dir.path(), of());
        assert!(plans.is_empty());
        plans.insert(key(128, 8, DType::BF16), Plan { own_us: 3.5, library: None });
        plans.save().unwrap();
        assert_eq!(PlanCache::open(dir.path(), of()).len(), 1);
    }
}

#[test]
fn what_is_no_file_of_plans_is_neither_waited_for_nor_taken_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = plans(dir.path()).path().to_owned();
    regular_file::tests::with_each_fault(&path, |what| {
        assert!(read(&path, &of()).is_err(), "{what}");
        let opened = plans(dir.path());
        assert_eq!(opened.save().is_err(), what == "a folder", "{what}");
        assert_eq!(PlanCache::open(dir.path(), of()).is_empty(), what == "a folder", "{what}");
    });
}

#[test]
fn the_number_of_plans_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut plans = PlanCache::open(dir.path(), of());
    let library = Some(LibraryPlan { us: 1_234.567_891, algo: Algo([0xff; 64]) });
    for n in 1..=PLANS_MAX {
        plans.insert(key(24_576, n, DType::BF16), Plan { own_us: 1_234.567_891, library });
    }
    assert_eq!(plans.len(), PLANS_MAX);
    // As many as there may be can be read.
    plans.save().unwrap();
    assert_eq!(PlanCache::open(dir.path(), of()).len(), PLANS_MAX);
    plans.insert(key(24_576, 1, DType::BF16), Plan { own_us: 1.0, library });
    assert_eq!(plans.len(), PLANS_MAX);
    plans.insert(key(24_576, PLANS_MAX + 1, DType::BF16), Plan { own_us: 1.0, library });
    assert_eq!(plans.len(), 1);
}
