//! `dist-cli infer --prompts`: a JSON object a line in, one out, in order.

#[path = "support/cli.rs"]
mod cli;

use cli::{Ran, ids, infer_json, program_in, run_with_input};
use serde_json::Value;

fn batch(lines: &str, more: &[&str]) -> Ran {
    run_with_input(&[&["infer", "--prompts", "-"], more].concat(), lines.as_bytes())
}

fn objects(ran: Ran) -> Vec<Value> {
    ran.well().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn answers_keep_the_order_of_the_prompts() {
    // The first ones take longest, so that later ones end before them.
    let line =
        |i: usize| format!("{{\"prompt_ids\":[{}],\"max_new_tokens\":{},\"id\":{i}}}\n", i + 10, 24 - i);
    let lines = (0..24).map(line).collect::<Vec<_>>().concat();
    let answers = objects(batch(&lines, &["--ignore-eos", "--max-seqs", "5"]));
    assert_eq!(answers.len(), 24);
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!((answer["id"].as_u64(), ids(answer, "ids").len()), (Some(i as u64), 24 - i));
    }
}

#[test]
fn a_line_overrides_flags_and_gives_what_a_run_alone_gives() {
    let lines = "\
        {\"prompt\":\"ROMEO.\",\"temperature\":0,\"max_tokens\":9}\n\
        \n\
        {\"prompt\":\"O, \",\"seed\":5,\"top_k\":3,\"stop\":\"zzz\",\"echo\":true}\n\
        {\"prompt\":\"KING HENRY.\",\"n\":2,\"logprobs\":2,\"logit_bias\":{\"7\":1000},\"repetition_penalty\":1.5}\n";
    let answers = objects(batch(lines, &["--max-new-tokens", "6"]));
    let alone = [
        infer_json(&["--prompt", "ROMEO.", "--temperature", "0", "--max-new-tokens", "9"]),
        infer_json(&["--prompt", "O, ", "--seed", "5", "--top-k", "3", "--echo", "--max-new-tokens", "6"]),
        infer_json(
            &"--prompt=KING_HENRY. -n 2 --logprobs 2 --logit-bias 7=1000 --repetition-penalty 1.5 --max-new-tokens 6"
                .split(' ')
                .map(|word| if word.contains('_') { "--prompt=KING HENRY." } else { word })
                .collect::<Vec<_>>(),
        ),
    ];
    assert_eq!(answers.len(), alone.len());
    for (mut answer, mut alone) in answers.into_iter().zip(alone) {
        for object in [&mut answer, &mut alone] {
            object.as_object_mut().unwrap().remove("timings");
        }
        assert_eq!(answer, alone);
    }
}

#[test]
fn a_bad_line_is_refused_by_number_before_anything_runs() {
    let good = "{\"prompt\":\"a\"}\n";
    for (bad, told, help) in [
        ("{\"prompt\":\"a\",\"temprature\":1}", "unknown field \"temprature\"", "did you mean temperature"),
        ("{\"prompt\":\"a\",\"temperature\":-1}", "temperature must be", "help:"),
        ("{\"prompt\":\"\"}", "the prompt is empty", "help:"),
        ("{\"prompt_ids\":[99999]}", "outside the vocabulary", "help:"),
        ("{\"prompt\":\"a\",\"n\":\"2\"}", "invalid type", "help:"),
        ("prompt", "column 1", "help:"),
        ("{\"temperature\":1}", "needs either prompt or prompt_ids", "help:"),
    ] {
        let ran = batch(&format!("{good}{bad}\n{good}"), &[]);
        assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""), "{bad}: {}", ran.err);
        assert!(ran.err.starts_with("error: standard input:2: "), "{}", ran.err);
        assert!(ran.err.contains(told) && ran.err.contains(help), "{bad}: {}", ran.err);
    }
}

#[test]
fn a_file_is_named_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("p.jsonl"), "{\"prompt\":\"a\"}\n{\"prompt\":1}\n").unwrap();
    let ran = Ran::from(program_in(dir.path(), &["infer", "--prompts", "p.jsonl"]).output().unwrap());
    assert!(ran.err.starts_with("error: p.jsonl:2: "), "{}", ran.err);
    let long = format!("{{\"prompt\":\"{}\"}}\n", "a".repeat(4000));
    std::fs::write(dir.path().join("p.jsonl"), long).unwrap();
    let ran = Ran::from(program_in(dir.path(), &["infer", "--prompts", "p.jsonl"]).output().unwrap());
    assert!(ran.err.starts_with("error: p.jsonl:1: the prompt has "), "{}", ran.err);
}
