//! Files disturbed at random: refused or read, never a panic, never memory out of proportion.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod checkpoint_case;

use checkpoint_case::{Case, elements, header_end, write};
use dist_core::decoder_specs;
use dist_kernels::weight::HostBytes;
use dist_models::checkpoint::Checkpoint;
use proptest::prelude::*;

/// Address space that the process has ever had, in bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Reads all of a checkpoint, which must not reach outside its bytes.
fn use_all(checkpoint: &Checkpoint) {
    for spec in decoder_specs(checkpoint.config()) {
        if spec.shape.len() == 2 {
            elements(&checkpoint.weight(&spec, 2, 1).unwrap());
        } else {
            checkpoint.vector(&spec, 2, 1).unwrap();
        }
    }
}

/// One disturbance: a place, as a share of the range, and the bytes put there.
#[derive(Clone, Debug)]
enum Change {
    Put(f64, Vec<u8>),
    Remove(f64, usize),
    Truncate(f64),
}

fn change() -> impl Strategy<Value = Change> {
    let pieces = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..4),
        proptest::sample::select(vec![
            "0",
            "9",
            "99999999999999999999",
            "-1",
            "[",
            "]",
            "{",
            "}",
            ",",
            "\"",
            "null",
            "\"F16\"",
            "1e9",
            "[0,0]",
            "\"dtype\"",
            "\\ud800",
            "18446744073709551615",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
    ];
    prop_oneof![
        4 => (0.0..1.0, pieces).prop_map(|(at, bytes)| Change::Put(at, bytes)),
        2 => (0.0..1.0, 1_usize..30).prop_map(|(at, n)| Change::Remove(at, n)),
        1 => (0.0..1.0).prop_map(Change::Truncate),
    ]
}

/// Disturbs `bytes` in the range; `insert`: moves what follows instead of overwriting it.
fn disturb(bytes: &mut Vec<u8>, len: usize, change: &Change, insert: bool) {
    let len = len.min(bytes.len());
    let place = |at: &f64| (at * len as f64) as usize;
    match change {
        Change::Put(at, new) => {
            let n_old = if insert { 0 } else { new.len() };
            let (start, end) = (place(at), (place(at) + n_old).min(bytes.len()));
            bytes.splice(start..end, new.iter().copied());
        }
        Change::Remove(at, n) => {
            let start = place(at);
            bytes.drain(start..(start + n).min(bytes.len()));
        }
        Change::Truncate(at) => bytes.truncate(place(at)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn disturbed_files_are_refused_or_read(
        changes in proptest::collection::vec(change(), 1..4),
        target in 0..4,
        fixture in proptest::sample::select(vec!["gpt2-erf-inner", "opt-post-norm-proj", "gpt-neo-banded"]),
    ) {
        let case = Case::fixture(fixture);
        let (mut config, mut bytes) = (case.config_json(), write(&case.tensors));
        for change in &changes {
            let end = header_end(&write(&case.tensors));
            match target {
                // The configuration, the header as it lies, the header with its length kept true, the whole file.
                0 => { let len = config.len(); disturb(&mut config, len, change, true); }
                1 => disturb(&mut bytes, end, change, false),
                2 => {
                    let mut header = bytes[8.min(bytes.len())..end.min(bytes.len())].to_vec();
                    let len = header.len();
                    disturb(&mut header, len, change, true);
                    let data = bytes[end.min(bytes.len())..].to_vec();
                    bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
                }
                _ => { let len = bytes.len(); disturb(&mut bytes, len, change, false); }
            }
        }
        let before = peak_bytes();
        if let Ok(checkpoint) = Checkpoint::from_bytes("case", &config, HostBytes::new(bytes), None) {
            use_all(&checkpoint);
        }
        let grown = peak_bytes() - before;
        // The allocator reserves 64 MB at a time; the files have less than one.
        prop_assert!(grown <= 128 << 20, "{grown} bytes more");
    }
}
