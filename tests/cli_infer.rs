//! `dist-cli infer` on the demo model: what it writes, from which inputs, under which flags.

#[path = "support/cli.rs"]
mod cli;

use cli::{ids, infer_json, program_in, run, run_with_input};
use serde_json::Value;

/// Hugging Face's results for the demo model.
const GOLDEN: &str = include_str!("../crates/dist-cli/assets/demo-model/golden.json");
const GREEDY: [&str; 2] = ["--temperature", "0"];

fn golden() -> Vec<Value> {
    serde_json::from_str(GOLDEN).expect("golden cases")
}

#[test]
fn without_flags_it_writes_text_and_one_line_beside() {
    let ran = run(&["infer"]);
    assert!(ran.out.chars().filter(|c| c.is_alphabetic()).count() > 50, "{}", ran.out);
    assert!(ran.out.ends_with('\n'));
    let err = ran.err.lines().collect::<Vec<_>>();
    assert_eq!(err.len(), 1, "{err:?}");
    for part in ["demo | ", "threads, ", "12 prompt + 128 new tokens", "seed 0", "TTFT ", "TPOT ", " tok/s"] {
        assert!(
            err[0].contains(part) || part == "threads, " && err[0].contains("1 thread,"),
            "{part}: {}",
            err[0]
        );
    }
    assert_eq!(run(&["infer"]).out, ran.out, "the same text each time");
    assert_ne!(run(&["infer", "--seed", "1"]).out, ran.out, "another seed, another text");
    assert_eq!(run(&["infer", "--quiet"]).err, "");
}

#[test]
fn greedy_tokens_and_log_probabilities_are_hugging_faces() {
    for case in golden() {
        let prompt = case["prompt"].as_str().unwrap();
        let new = ["--max-new-tokens", "48", "--echo", "--ignore-eos", "--prompt", prompt];
        let answer = infer_json(&[&GREEDY[..], &new].concat());
        assert_eq!(ids(&answer, "prompt_ids"), ids(&case, "ids"));
        let all = [ids(&answer, "prompt_ids"), ids(&answer, "ids")].concat();
        assert_eq!(all, ids(&case, "greedy_ids"), "{prompt}");
        let scores = |object: &Value, field| object[field].as_array().cloned().unwrap();
        let (ours, theirs) = (scores(&answer, "prompt_logprobs"), scores(&case, "logprobs"));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            let off = (ours.as_f64().unwrap() - theirs.as_f64().unwrap()).abs();
            assert!(off < 2e-3, "{prompt}: {ours} against {theirs}");
        }
    }
}

#[test]
fn every_way_in_gives_the_same_answer() {
    fn with<'a>(first: &[&'a str]) -> Vec<&'a str> {
        [&["infer"], first, &["--temperature", "0", "--max-new-tokens", "16", "--quiet"]].concat()
    }
    let text = "HAMLET.\nTo be, or not to be";
    let expected = run(&with(&["--prompt", text])).well();
    for way in [&["-"][..], &["--prompt", "-"], &["--prompt-file", "-"]] {
        assert_eq!(run_with_input(&with(way), text.as_bytes()).well(), expected, "{way:?}");
        assert_eq!(run_with_input(&with(way), format!("{text}\n").as_bytes()).well(), expected, "{way:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("prompt.txt"), format!("{text}\r\n")).unwrap();
    let ran = program_in(dir.path(), &with(&["--prompt-file", "prompt.txt"])).output().unwrap();
    assert_eq!(cli::Ran::from(ran).well(), expected);
    let prompt_ids = ids(&golden()[0], "ids").iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    assert_eq!(run(&with(&["--prompt-ids", &prompt_ids])).well(), expected);
}

#[test]
fn threads_paths_chunks_and_mapping_do_not_change_a_bit() {
    let base = ["--prompt", "ROMEO.", "--max-new-tokens", "24", "--echo"];
    let answer = |more: &[&str]| {
        let mut answer = infer_json(&[&base, more].concat());
        answer.as_object_mut().unwrap().remove("timings");
        answer
    };
    let expected = answer(&[]);
    for more in [
        &["--threads", "1"][..],
        &["--threads", "3"],
        &["--cpu-path", "portable"],
        &["--max-batch-tokens", "2"],
        &["--max-seq-len", "64"],
        &["--device", "cpu", "--no-mmap"],
    ] {
        assert_eq!(answer(more), expected, "{more:?}");
    }
}

#[test]
fn the_object_has_its_fields() {
    let answer = infer_json(&["--max-new-tokens", "4", "--logprobs", "3", "--echo", "--prompt", "O, "]);
    assert_eq!(answer["schema_version"], 1);
    assert_eq!(answer["model"], "demo");
    assert_eq!(answer["prompt"], "O, ");
    assert_eq!(answer["finish_reason"], "length");
    assert!(answer["text"].as_str().is_some_and(|text| !text.is_empty()));
    let len = |field: &str| answer[field].as_array().map_or(0, Vec::len);
    let lens = ["prompt_ids", "prompt_logprobs", "ids", "logprobs", "top_logprobs"].map(len);
    assert_eq!(lens, [3, 2, 4, 4, 4]);
    assert_eq!(answer["top_logprobs"][0].as_array().map(Vec::len), Some(3));
    for field in ["load_ms", "ttft_ms", "tpot_ms", "total_ms", "tokens_per_s"] {
        assert!(answer["timings"][field].as_f64().is_some_and(|number| number >= 0.0), "{field}");
    }
    assert!(answer.get("samples").is_none());
    let plain = infer_json(&["--max-new-tokens", "4"]);
    assert!(plain.get("prompt_logprobs").is_none() && plain.get("top_logprobs").is_none());
    assert_eq!(plain["logprobs"].as_array().map(Vec::len), Some(4));
}

#[test]
fn the_likeliest_token_is_the_greedy_one() {
    let answer = infer_json(&[&GREEDY[..], &["--max-new-tokens", "8", "--logprobs", "1"]].concat());
    for (idx, id) in ids(&answer, "ids").into_iter().enumerate() {
        assert_eq!(answer["top_logprobs"][idx][0]["id"], id);
        assert_eq!(answer["top_logprobs"][idx][0]["logprob"], answer["logprobs"][idx]);
    }
}

#[test]
fn a_prompt_alone_can_be_scored() {
    let answer = infer_json(&["--max-new-tokens", "0", "--echo", "--prompt", "O, "]);
    assert_eq!((ids(&answer, "ids").len(), answer["prompt_logprobs"].as_array().unwrap().len()), (0, 2));
}

#[test]
fn samples_differ_and_the_first_is_that_of_one() {
    let base = ["--max-new-tokens", "12", "--prompt", "ROMEO."];
    let answer = infer_json(&[&base[..], &["-n", "3"]].concat());
    let samples = answer["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 3);
    assert_eq!(samples[0]["ids"], answer["ids"]);
    assert_ne!(samples[0]["ids"], samples[1]["ids"]);
    assert_eq!(infer_json(&base)["ids"], answer["ids"]);
    let text = run(&[&["infer", "-n", "3", "--quiet"], &base[..]].concat()).well();
    let ended = samples.iter().map(|sample| {
        let text = sample["text"].as_str().unwrap();
        if text.ends_with('\n') { text.to_owned() } else { format!("{text}\n") }
    });
    assert_eq!(text, ended.collect::<Vec<_>>().join("\n"));
}

#[test]
fn stops_end_the_text() {
    let base = ["--temperature", "0", "--prompt", "O, ", "--max-new-tokens", "48"];
    let whole = infer_json(&base);
    let text = whole["text"].as_str().unwrap();
    let before = text.split_once("Castle").expect("the greedy text goes to a castle").0;
    let stopped = infer_json(&[&base[..], &["--stop", "nowhere", "--stop", "Castle"]].concat());
    assert_eq!((stopped["text"].as_str(), &stopped["finish_reason"]), (Some(before), &Value::from("stop")));
    let third = ids(&whole, "ids")[2].to_string();
    let by_id = infer_json(&[&base[..], &["--stop-ids", &third]].concat());
    assert_eq!((ids(&by_id, "ids").len(), &by_id["finish_reason"]), (3, &Value::from("stop")));
    let later = infer_json(&[&base[..], &["--stop-ids", &third, "--min-new-tokens", "5"]].concat());
    assert!(ids(&later, "ids").len() > 5);
}

#[test]
fn a_bias_bans_and_forces_tokens() {
    let base = ["--temperature", "0", "--prompt", "O, ", "--max-new-tokens", "3"];
    let first = ids(&infer_json(&base), "ids")[0];
    let banned = infer_json(&[&base[..], &["--logit-bias", &format!("{first}=-inf")]].concat());
    assert_ne!(ids(&banned, "ids")[0], first);
    let forced = infer_json(&[&base[..], &["--logit-bias", "7=1000"]].concat());
    assert_eq!(ids(&forced, "ids"), [7, 7, 7]);
}

#[test]
fn echo_writes_the_prompt_first() {
    let base = ["infer", "--quiet", "--max-new-tokens", "6", "--prompt", "ROMEO."];
    let plain = run(&base).well();
    assert_eq!(run(&[&base[..], &["--echo"]].concat()).well(), format!("ROMEO.{plain}"));
}

#[test]
fn presets_run_on_tokens_alone() {
    let args =
        ["--model", "gpt3-125m", "--max-seq-len", "32", "--max-new-tokens", "2", "--prompt-ids", "5,17,42"];
    let answer = infer_json(&args);
    assert_eq!((ids(&answer, "prompt_ids"), ids(&answer, "ids").len()), (vec![5, 17, 42], 2));
    assert_eq!(answer["text"], "");
    let other = infer_json(&[&args[..], &["--weights-seed", "1"]].concat());
    assert_ne!(answer["logprobs"], other["logprobs"]);
}
