//! Finds fixtures at run time and builds one-rank engines over them. A test binary may run far from where it was built.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use dist_comm::{Comm, Solo};
use dist_core::plan::{KvPlan, Limits, Plan, Predictions, SCHEMA_VERSION};
use dist_core::{DType, Mesh, ModelConfig, Rank};
use dist_kernels::args::SampleRow;
use dist_kernels::cpu::{CpuBackend, CpuOptions, CpuPath};
use dist_models::checkpoint::{Checkpoint, OpenOptions};
use dist_models::engine::start_rank;
use dist_models::request::Sampling;
use dist_models::runner::{Comms, Runner};
use serde::Deserialize;

/// The models of `tests/fixtures`.
pub(crate) const NAMES: [&str; 6] =
    ["gpt2", "gpt2-erf-inner", "gpt2-scaled-attn", "opt", "opt-post-norm-proj", "gpt-neo-banded"];

/// One case of a `golden.json`, made by Hugging Face transformers in float32.
#[derive(Deserialize)]
pub(crate) struct Case {
    /// The prompt.
    pub(crate) ids: Vec<u32>,
    /// Logits after the last token.
    pub(crate) logits: Vec<f32>,
    /// Log-probabilities of `ids[1..]`.
    pub(crate) logprobs: Vec<f32>,
    /// Twelve greedy tokens.
    pub(crate) greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

/// The repository: `DIST_REPO`, or the first folder upwards that holds `tests/fixtures`.
pub(crate) fn repo() -> PathBuf {
    if let Some(root) = std::env::var_os("DIST_REPO") {
        return root.into();
    }
    let here = std::env::current_dir().expect("a working directory");
    let root = here.ancestors().find(|dir| dir.join("tests/fixtures").is_dir());
    root.expect("run inside the repository, or set DIST_REPO to it").to_owned()
}

/// A fixture and its golden cases.
pub(crate) fn fixture(name: &str) -> (Checkpoint, Vec<Case>) {
    let dir = repo().join("tests/fixtures").join(name);
    let golden = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
    let golden: Golden = serde_json::from_str(&golden).expect("golden cases");
    let checkpoint = Checkpoint::open(&dir, &OpenOptions { mmap: true }).expect("a fixture opens");
    (checkpoint, golden.cases)
}

/// A plan of `mesh` for small models: everything fits unless `limits` says otherwise.
pub(crate) fn plan(config: &ModelConfig, mesh: Mesh, limits: Limits, n_blocks: usize) -> Plan {
    let stages =
        (0..mesh.pp).map(|stage| dist_core::shape::split_even(config.n_layers, mesh.pp, stage).1).collect();
    Plan {
        schema_version: SCHEMA_VERSION,
        model: config.clone(),
        mesh,
        stages,
        act_dtype: DType::F32,
        wire_dtype: DType::F32,
        kv: KvPlan { dtype: DType::F32, block_size: 16, n_blocks },
        limits,
        predictions: Predictions { ttft_s: 1.0, tpot_s: 1.0, total_s: 1.0, tokens_per_s: 1.0 },
    }
}

/// Limits under which a whole fixture prompt runs in one chunk.
pub(crate) fn wide(config: &ModelConfig) -> Limits {
    Limits { max_seq_len: config.n_ctx, max_seqs: 64, max_batch_tokens: 512, max_sample_rows: 512 }
}

/// A CPU backend whose idle threads sleep soon: tests run side by side.
pub(crate) fn backend(threads: usize, path: CpuPath) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, path, spin: Duration::from_micros(20) }).expect("a CPU backend")
}

/// A one-rank runner.
pub(crate) fn runner(
    checkpoint: &Checkpoint,
    plan: &Plan,
    threads: usize,
    path: CpuPath,
) -> Runner<CpuBackend> {
    let backend = backend(threads, path);
    let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
    start_rank(backend, comms, checkpoint, plan, Rank(0), &mut |_| ControlFlow::Continue(()))
        .expect("a fixture loads")
}

/// Greedy, with every log-probability reported.
pub(crate) fn greedy(max_new_tokens: usize) -> Sampling {
    Sampling {
        ignore_eos: true,
        logprobs: Some(0),
        prompt_logprobs: true,
        ..Sampling::greedy(max_new_tokens)
    }
}

/// A row that is not drawn from.
pub(crate) fn greedy_row() -> SampleRow {
    SampleRow {
        target: None,
        counts: Vec::new(),
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: Vec::new(),
        banned: Vec::new(),
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 0,
        sample_idx: 0,
        position: 0,
    }
}
