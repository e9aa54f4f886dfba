//! `doctor` on the real binary: alone and across ranks, for people and for machines.

use std::process::{Command, Output};

use serde_json::Value;

fn doctor(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dist-cli")).arg("doctor").args(args).output().expect("the program runs")
}

fn json(args: &[&str]) -> Value {
    let output = doctor(&[args, &["--json"]].concat());
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn it_tells_what_this_machine_has() {
    let report = json(&[]);
    assert_eq!((&report["schema_version"], &report["is_fit"]), (&1.into(), &true.into()));
    let machine = &report["ranks"][0]["machine"];
    assert!(machine["cpu"]["cores_allowed"].as_u64().unwrap() >= 1);
    assert!(machine["memory"]["total"].as_u64() >= machine["memory"]["available"].as_u64());
    assert!(machine["rates"]["read_bytes_per_s"].as_f64().unwrap() > 1e8);
    let libraries = machine["gpu"]["libraries"].as_array().unwrap();
    assert!(libraries.iter().any(|library| library["name"] == "NCCL"));
    for library in libraries {
        // Each is found, or it is said where it was looked for.
        let (version, why) = (&library["version"], &library["problem"]["what"]);
        assert!(version.is_string() != why.is_string(), "{library}");
    }
    assert!(report["pairs"].as_array().unwrap().is_empty());
}

#[test]
fn ranks_measure_what_lies_between_them() {
    for (way, shares_memory) in
        [(&["--tp", "3"][..], true), (&["--tp", "3", "--no-shared-memory"][..], false)]
    {
        let report = json(way);
        let ranks: Vec<_> =
            report["ranks"].as_array().unwrap().iter().map(|rank| rank["rank"].as_u64()).collect();
        assert_eq!(ranks, [Some(0), Some(1), Some(2)]);
        let pairs = report["pairs"].as_array().unwrap();
        let between: Vec<_> = pairs.iter().map(|pair| (pair["from"].as_u64(), pair["to"].as_u64())).collect();
        assert_eq!(between, [(Some(0), Some(1)), (Some(0), Some(2)), (Some(1), Some(2))]);
        for pair in pairs {
            assert_eq!(pair["shares_memory"], shares_memory);
            assert!(pair["round_trip_us"].as_f64().unwrap() > 0.0);
            assert!(pair["bytes_per_s_there"].as_f64().unwrap() > 1e6, "{pair}");
            // Ranks of one machine have one clock.
            let (offset, error) =
                (pair["clock_offset_us"].as_f64().unwrap(), pair["clock_error_us"].as_f64());
            assert!(offset.abs() <= error.unwrap() + 1.0, "{pair}");
        }
    }
}

#[test]
fn an_address_that_nobody_knows_is_an_error_with_advice() {
    let output = doctor(&["--master", "nobody.invalid:29500"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let (told, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(told.contains("error: nobody.invalid:29500") && told.contains("help: give an address"), "{told}");
    assert!(error.contains("error: "), "{error}");
}

#[test]
fn people_read_one_block_a_machine() {
    let output = doctor(&["--tp", "2"]);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(told.matches("  processor ").count(), 1, "{told}");
    assert!(told.contains(": ranks 0, 1") && told.contains("shared memory"), "{told}");
}
