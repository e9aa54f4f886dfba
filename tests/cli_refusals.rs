//! Bad input: what is wrong, what to do, and the exit code, all before anything is written to standard output.

#[path = "support/cli.rs"]
mod cli;

use cli::{Ran, program_in, run, run_with_input};

#[track_caller]
fn check(ran: &Ran, code: i32, error: &str, help: &str) {
    assert_eq!((ran.code, ran.out.as_str()), (Some(code), ""), "{}", ran.err);
    let mut lines = ran.err.lines();
    let first = lines.next().unwrap_or_default();
    assert!(first.starts_with("error: ") && first.contains(error), "{}", ran.err);
    let helps = lines.find(|line| line.starts_with("help: "));
    assert!(helps.is_some_and(|line| line.contains(help)), "{}", ran.err);
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
}

#[test]
fn flags_without_meaning_are_usage_errors() {
    for (flags, error, help) in [
        (&["--prompt", ""][..], "the prompt is empty", "--prompt"),
        (&["--max-new-tokens", "0"], "--max-new-tokens 0 leaves nothing to do", "at least 1"),
        (&["--temperature", "-1"], "a finite number of at least 0", "dist-cli infer --help"),
        (&["--temperature=NaN"], "a finite number of at least 0", "dist-cli infer --help"),
        (&["--top-p", "0"], "above 0 and at most 1", "--help"),
        (&["--threads", "0"], "from 1 to 1024", "--help"),
        (&["--stop", ""], "must not be empty", "--help"),
        (&["--logit-bias", "7"], "ID=VALUE", "--help"),
        (&["--tempature", "1"], "'--tempature'", "'--temperature'"),
        (&["--device", "cuda"], "the CUDA driver", "driver"),
        (&["--device", "gpu"], "cuda:N", "--help"),
        (&["--prompt", "a", "--prompt-ids", "1"], "cannot be used together", "--prompts"),
        (&["--min-new-tokens", "200"], "more than --max-new-tokens 128", "--max-new-tokens"),
        (&["--model", "gpt3-1.4b"], "no model is called \"gpt3-1.4b\"", "gpt3-1.3b"),
        (&["--window", "64"], "--window is for presets", "--window"),
        (&["words"], "'words'", "--help"),
        (&["--config", "none.toml"], "cannot read none.toml", ""),
    ] {
        if help.is_empty() {
            assert_eq!(run(&[&["infer"], flags].concat()).code, Some(2));
        } else {
            check(&run(&[&["infer"], flags].concat()), 2, error, help);
        }
    }
    check(&run(&["benchmark", "--batch", "0"]), 2, "from 1 to 16777216", "dist-cli benchmark --help");
    check(&run(&["infr"]), 2, "'infr'", "'infer'");
    let narrow = ["--model", "gpt3-1.3b", "--max-batch-tokens", "1", "--batch", "64"];
    for command in ["benchmark", "plan"] {
        check(&run(&[&[command], &narrow[..]].concat()), 2, "less than the 64 sequences", "--max-seqs 1");
    }
}

#[test]
fn a_plan_is_a_file_that_ends() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [std::path::Path::new("/dev/zero"), &pipe, dir.path()] {
        let path = path.to_str().unwrap();
        check(&run(&["infer", "--plan", path]), 2, "cannot be used", "dist-cli plan --model");
    }
}

#[test]
fn what_the_model_or_the_machine_cannot_do_fails() {
    let long = "To be, or not to be. ".repeat(200);
    for (flags, error, help) in [
        (&["--prompt", long.as_str()][..], "too many for a context of 512", "never cut"),
        (&["--prompt", "To be, or not to be", "--max-seq-len", "4"], "context of 4", "--max-seq-len"),
        (&["--max-seq-len", "4096"], "demo knows 512 positions", "--max-seq-len 512"),
        (&["--prompt-ids", "1,99999"], "outside the vocabulary of 2048: 99999", "token ids"),
        (&["--model", "./nowhere"], "nowhere", "directory"),
        (&["--model", "."], "has no config.json", "config.json"),
        (&["--model", "nobody/nothing"], "not in the local Hugging Face cache", "hf download nobody/nothing"),
        (&["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt", "exists"),
        (&["--prompt-file", "."], "is a directory", "file"),
        (&["--model", "gpt3-125m", "--prompt", "a"], "no tokenizer", "--prompt-ids"),
        (&["-n", "4", "--max-seqs", "2"], "n must be from 1 to 2", "--max-seqs"),
    ] {
        check(&run(&[&["infer"], flags].concat()), 1, error, help);
    }
}

#[test]
fn a_model_larger_than_memory_is_refused_before_it_is_made() {
    let ran = run(&["infer", "--model", "gpt3-175b", "--prompt-ids", "1"]);
    check(&ran, 1, "gpt3-175b needs 3", "smaller model");
    assert!(ran.err.contains(" are available\ncause: weights 349.24 GB"), "{}", ran.err);
}

#[test]
fn the_numbers_of_a_long_prompt_are_told() {
    let prompt_ids = vec!["1"; 512].join(",");
    let ran = run(&["infer", "--prompt-ids", &prompt_ids]);
    check(&ran, 1, "the prompt has 512 tokens, too many for a context of 512", "never cut");
    let longest = vec!["1"; 511].join(",");
    assert_eq!(run(&["infer", "--prompt-ids", &longest]).code, Some(0));
}

#[test]
fn standard_input_may_be_broken_or_empty() {
    check(&run_with_input(&["infer", "-"], b"ab\xffcd"), 1, "standard input is not UTF-8: byte 2", "iconv");
    check(&run_with_input(&["infer", "-"], b""), 1, "the prompt is empty", "character");
    check(&run_with_input(&["infer", "-"], b"\n"), 1, "the prompt is empty", "character");
}

#[test]
fn settings_and_variables_yield_to_flags() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dist.toml");
    let tokens = |variable: Option<&str>, args: &[&str]| {
        let args = [&["infer", "--json"], args].concat();
        let mut command = program_in(dir.path(), &args);
        let ran: Ran = command.envs(variable.map(|n| ("DIST_MAX_NEW_TOKENS", n))).output().unwrap().into();
        let answer: serde_json::Value = serde_json::from_str(&ran.well()).unwrap();
        answer["ids"].as_array().unwrap().len()
    };
    std::fs::write(&file, "[infer]\nmax-new-tokens = 3\nignore-eos = true\n").unwrap();
    assert_eq!(tokens(None, &[]), 3);
    assert_eq!(tokens(Some("2"), &[]), 2);
    assert_eq!(tokens(Some("2"), &["--max-tokens", "1"]), 1);

    std::fs::write(&file, "max-new-token = 3\n").unwrap();
    let ran = Ran::from(program_in(dir.path(), &["infer"]).output().unwrap());
    check(&ran, 2, "dist.toml: unknown setting max-new-token", "max-new-tokens");
    std::fs::write(&file, "threads = 0\n").unwrap();
    let ran = Ran::from(program_in(dir.path(), &["infer"]).output().unwrap());
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("dist.toml has a value that does not fit\ncause: "), "{}", ran.err);
}
