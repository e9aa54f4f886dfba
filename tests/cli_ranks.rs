//! `dist-cli` over several ranks as real processes: the same answers on every split, however the ranks were started.
#![cfg(target_os = "linux")]

#[path = "support/cli.rs"]
mod cli;

use std::net::TcpListener;
use std::process::{Child, Stdio};

use cli::{Ran, ids, infer_json, program_in, run};
use serde_json::Value;

/// Largest difference of a log-probability that another order of the same f32 sums may make: four times the largest
/// floor of `benches/results/noise-floor.json`.
const NOISE: f64 = 4e-6;

const MESHES: [(&str, &str); 9] = [
    ("1", "1"),
    ("2", "1"),
    ("4", "1"),
    ("3", "1"),
    ("1", "2"),
    ("1", "3"),
    ("2", "2"),
    ("2", "3"),
    ("4", "2"),
];

fn fixture(name: &str) -> String {
    let here = std::env::current_dir().expect("a working directory");
    let root = std::env::var_os("DIST_REPO").map_or(here, Into::into);
    let root = root.ancestors().find(|dir| dir.join("tests/fixtures").is_dir()).expect("the repository");
    root.join("tests/fixtures").join(name).to_str().expect("UTF-8").to_owned()
}

fn scores(answer: &Value) -> Vec<f64> {
    let of = |field: &str| answer[field].as_array().cloned().unwrap_or_default();
    let all = [of("prompt_logprobs"), of("logprobs")].concat();
    all.iter().map(|score| score.as_f64().expect("a number")).collect()
}

/// Runs `args` on every mesh and holds each answer against that of one rank.
#[track_caller]
fn same_on_every_mesh(args: &[&str], n_layers: usize, divides: impl Fn(usize) -> bool) {
    let expected = infer_json(args);
    for (tp, pp) in MESHES {
        if pp.parse::<usize>().expect("it goes well") > n_layers {
            continue;
        }
        let answer = infer_json(&[args, &["--tp", tp, "--pp", pp]].concat());
        assert_eq!(ids(&answer, "ids"), ids(&expected, "ids"), "tp {tp} pp {pp}");
        let (ours, theirs) = (scores(&answer), scores(&expected));
        assert_eq!(ours.len(), theirs.len());
        if divides(tp.parse().expect("it goes well")) {
            assert_eq!(ours, theirs, "tp {tp} pp {pp}: the same bits");
        } else {
            let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < NOISE, "tp {tp} pp {pp}: {off}");
        }
    }
}

fn fixture_is_the_same(name: &str, n_layers: usize, divides: impl Fn(usize) -> bool) {
    let dir = fixture(name);
    let prompt = "3,5,9,11,260,7,8,120,44,45,46,47,48,49,50,51,52,53,54";
    let args =
        ["--model", &dir, "--prompt-ids", prompt, "--echo", "--temperature", "0", "--max-new-tokens", "6"];
    same_on_every_mesh(&args, n_layers, divides);
}

fn by_2_and_4(tp: usize) -> bool {
    tp != 3
}

#[test]
fn every_fixture_answers_alike_on_every_mesh() {
    fixture_is_the_same("gpt2", 3, by_2_and_4);
    fixture_is_the_same("gpt2-scaled-attn", 3, by_2_and_4);
    fixture_is_the_same("gpt-neo-banded", 4, by_2_and_4);
}

#[test]
fn every_other_fixture_answers_alike_on_every_mesh() {
    fixture_is_the_same("opt", 3, by_2_and_4);
    fixture_is_the_same("opt-post-norm-proj", 2, by_2_and_4);
    // Six heads on four ranks: one rank has one more than another.
    fixture_is_the_same("gpt2-erf-inner", 2, |tp| tp <= 2);
}

#[test]
fn the_demo_draws_alike_on_every_mesh() {
    let args =
        ["--prompt", "ROMEO.", "--max-new-tokens", "10", "--seed", "7", "-n", "3", "--max-batch-tokens", "4"];
    same_on_every_mesh(&args, 6, by_2_and_4);
}

#[test]
fn neither_tcp_nor_uneven_stages_change_a_bit() {
    let base = ["--prompt", "O, ", "--max-new-tokens", "8", "--temperature", "0", "--echo"];
    let expected = scores(&infer_json(&base));
    for more in [
        &["--tp", "2", "--no-shared-memory"][..],
        &["--tp", "2", "--stages", "1,5", "--no-shared-memory"],
        &["--stages", "4,1,1"],
        &["--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--threads", "3"],
    ] {
        assert_eq!(scores(&infer_json(&[&base[..], more].concat())), expected, "{more:?}");
    }
}

#[test]
fn many_prompts_keep_their_order_over_stages() {
    let line =
        |i: usize| format!("{{\"prompt_ids\":[{}],\"id\":{i},\"max_new_tokens\":{}}}\n", 5 + i, 3 + i % 5);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("p.jsonl"), (0..20).map(line).collect::<String>()).unwrap();
    let answers = |more: &[&str]| {
        let args = [&["infer", "--prompts", "p.jsonl", "--max-seqs", "6"], more].concat();
        let out = Ran::from(program_in(dir.path(), &args).output().unwrap()).well();
        let answers = out.lines().map(|line| {
            let mut answer: Value = serde_json::from_str(line).unwrap();
            answer.as_object_mut().unwrap().remove("timings");
            answer
        });
        answers.collect::<Vec<_>>()
    };
    let expected = answers(&[]);
    assert_eq!(expected.len(), 20);
    assert_eq!(answers(&["--tp", "2", "--pp", "2"]), expected);
    assert_eq!(answers(&["--pp", "3"]), expected);
}

#[test]
fn a_plan_from_a_file_is_the_split() {
    let dir = tempfile::tempdir().unwrap();
    let plan = run(&["plan", "--tp", "2", "--stages", "2,4", "--json"]).well();
    std::fs::write(dir.path().join("plan.json"), &plan).unwrap();
    let run = |args: &[&str]| Ran::from(program_in(dir.path(), args).output().unwrap());
    let ran = run(&["infer", "--plan", "plan.json", "--max-new-tokens", "2", "-v"]);
    assert!(ran.err.contains("rank 3: weights in"), "{}", ran.err);
    ran.well();
    let other = run(&["infer", "--plan", "plan.json", "--model", "gpt3-125m", "--prompt-ids", "5"]);
    assert_eq!(other.code, Some(2), "{}", other.err);
    assert!(other.err.contains("error: the plan is for demo, the model is gpt3-125m"), "{}", other.err);
    assert_eq!(run(&["infer", "--plan", "plan.json", "--tp", "2"]).code, Some(2));
    std::fs::write(dir.path().join("plan.json"), plan.replace("\"tp\":2", "\"tp\":9")).unwrap();
    let wrong = run(&["infer", "--plan", "plan.json"]);
    assert!(wrong.code == Some(2) && wrong.err.contains("cannot be cut for tp 9"), "{}", wrong.err);
}

#[test]
fn what_cannot_be_split_is_refused_before_anybody_starts() {
    for (args, told) in [
        (&["--tp", "9"][..], "the nearest legal degree is 4"),
        (&["--pp", "7"], "7 stages of 6 layers"),
        (&["--stages", "2,3"], "stages [2, 3] hold 5 layers"),
        (&["--pp", "3", "--stages", "3,3"], "--pp 3 and --stages with 2 stages contradict each other"),
        (&["--nnodes", "2"], "--nnodes 2 needs to know which machine this is"),
        (&["--node-rank", "1"], "add --nnodes N"),
        (&["--nnodes", "2", "--node-rank", "2"], "2 machines are 0 to 1"),
        (&["--nnodes", "2", "--node-rank", "0"], "needs to know where rank 0 listens"),
    ] {
        let ran = run(&[&["infer", "-v"], args].concat());
        assert!(ran.code.is_some_and(|code| code > 0) && ran.err.contains(told), "{args:?}: {}", ran.err);
        assert!(!ran.err.contains("pid"), "{}", ran.err);
    }
}

/// A rank that something else than dist-cli starts, under the variables of torchrun.
fn torchrun_rank(rank: usize, port: u16, args: &[&str]) -> Child {
    let dir = std::env::temp_dir();
    let mut command = program_in(&dir, args);
    for (name, value) in
        [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("MASTER_PORT", port.into())]
    {
        command.env(name, value.to_string());
    }
    let command = command.env("MASTER_ADDR", "127.0.0.1").stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("started")
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").expect("it goes well").local_addr().expect("it goes well").port()
}

fn end(child: Child) -> Ran {
    child.wait_with_output().expect("it ends").into()
}

const SHORT: [&str; 5] = ["infer", "--temperature", "0", "--max-new-tokens", "8"];

#[test]
fn ranks_that_torchrun_starts_find_each_other() {
    let (port, expected) = (free_port(), run(&SHORT).well());
    let follower = torchrun_rank(1, port, &SHORT);
    let leader = end(torchrun_rank(0, port, &SHORT));
    assert!(leader.err.contains("ranks started by torchrun (RANK=0, WORLD_SIZE=2)"), "{}", leader.err);
    assert_eq!(leader.well(), expected);
    let follower = end(follower);
    assert_eq!((follower.code, follower.out.as_str(), follower.err.as_str()), (Some(0), "", ""));
}

#[test]
fn ranks_that_do_not_come_or_do_not_fit_are_listed() {
    let port = free_port();
    let limit = ["--rendezvous-timeout", "0.5"];
    let alone = end(torchrun_rank(0, port, &[&SHORT[..], &limit].concat()));
    assert_eq!(alone.code, Some(1));
    assert!(alone.err.contains("error: rendezvous failed after 0.5 s: missing ranks: 1\n"), "{}", alone.err);
    let alone = end(torchrun_rank(1, port, &[&SHORT[..], &limit].concat()));
    assert_eq!(alone.code, Some(1));
    assert!(alone.err.contains("error: no rendezvous with rank 0 at 127.0.0.1:"), "{}", alone.err);

    let (port, gpt2) = (free_port(), fixture("gpt2"));
    let other = ["infer", "--model", &gpt2, "--prompt-ids", "5"];
    let follower = torchrun_rank(1, port, &other);
    let leader = end(torchrun_rank(0, port, &SHORT));
    assert_eq!(leader.code, Some(1));
    assert!(leader.err.contains("rank 1 was refused: it holds another plan"), "{}", leader.err);
    let follower = end(follower);
    assert_eq!(follower.code, Some(1));
    assert!(follower.err.contains("error: rank 0 refused rank 1: it holds another plan"), "{}", follower.err);
}

#[test]
fn flags_that_contradict_the_launcher_are_refused_by_both_names() {
    for (more, told) in [
        (&["--tp", "4"][..], "--tp 4 and WORLD_SIZE=2 (torchrun) contradict each other"),
        (&["--tp", "1", "--pp", "1"], "--tp 1 --pp 1 and WORLD_SIZE=2 (torchrun) contradict each other"),
        (
            &["--nnodes", "2", "--node-rank", "1", "--master", "127.0.0.1:5"],
            "--nnodes 2 --node-rank 1 and RANK=1 (torchrun) contradict each other",
        ),
        (
            &["--master", "127.0.0.1:5"],
            "--master 127.0.0.1:5 and MASTER_ADDR:MASTER_PORT=127.0.0.1:9 contradict",
        ),
    ] {
        let ran = end(torchrun_rank(1, 9, &[&SHORT[..], more].concat()));
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        assert!(ran.err.contains(told), "{more:?}: {}", ran.err);
    }
}

#[test]
fn two_machines_meet_by_the_command_that_the_first_prints() {
    use std::io::{BufRead, BufReader};
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("secret file"), "correct horse battery staple\n").unwrap();
    let prompt = "It's \"$HOME\"";
    let split = ["--tp", "2", "--pp", "2", "--prompt", prompt, "--secret-file", "secret file", "-v"];
    let nodes = ["--nnodes=2", "--node-rank", "0", "--master", "127.0.0.1:0"];
    let args = [&SHORT[..], &nodes, &split].concat();
    let mut first =
        program_in(dir.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut err = BufReader::new(first.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("--node-rank 1") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "rank 0 says how to start the others");
    }
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", line.trim()]).current_dir(dir.path()).stdin(Stdio::null());
    for (name, _) in program_in(dir.path(), &[]).get_envs() {
        shell.env_remove(name);
    }
    let second = Ran::from(shell.output().unwrap());
    assert_eq!((second.code, second.out.as_str()), (Some(0), ""), "{}", second.err);
    assert!(
        second.err.contains("rank 2: weights in") && second.err.contains("rank 3: weights in"),
        "{}",
        second.err
    );
    std::io::copy(&mut err, &mut std::io::sink()).unwrap();
    let expected = run(&[&SHORT[..], &["--prompt", prompt]].concat()).well();
    assert_eq!(end(first).well(), expected);

    let without = [&SHORT[..], &nodes, &["--tp", "2"]].concat();
    let without = run(&without);
    assert_eq!(without.code, Some(2));
    assert!(without.err.contains("need a secret that they share\nhelp: make one with"), "{}", without.err);
}

#[test]
fn a_benchmark_says_how_busy_each_stage_was() {
    let args =
        ["benchmark", "--batch", "4", "--prompt-len", "8", "--new-tokens", "24", "--pp", "2", "--json"];
    let report: Value = serde_json::from_str(&run(&args).well()).unwrap();
    assert_eq!(report["plan"]["mesh"]["pp"], 2);
    let busy = report["results"][0]["stage_busy"].as_array().unwrap();
    assert_eq!(busy.len(), 2);
    for share in busy {
        assert!(share.as_f64().is_some_and(|share| share > 0.0 && share <= 1.0), "{busy:?}");
    }
}
