//! `dist-cli` over several ranks as real processes: the same answers, nobody left behind, clear ends.
#![cfg(target_os = "linux")]

#[path = "support/cli.rs"]
mod cli;

use cli::{ids, infer_json};

const BASE: [&str; 5] = ["--temperature", "0", "--max-new-tokens", "12", "--echo"];

#[test]
fn every_mesh_gives_the_answer_of_one_rank() {
    let expected = infer_json(&BASE);
    for mesh in [["--tp", "2"], ["--pp", "2"]] {
        let answer = infer_json(&[&BASE[..], &mesh].concat());
        assert_eq!(ids(&answer, "ids"), ids(&expected, "ids"), "{mesh:?}");
    }
}
