//! The golden log-probabilities of a fixed prompt: computed at export a layer at a time, and asked again of an engine.

use std::borrow::Borrow;
use std::ops::ControlFlow;
use std::time::Duration;

use dist_comm::{Comm, Local, Solo};
use dist_core::plan::{KvPlan, Limits, Plan, Predictions, SCHEMA_VERSION};
use dist_core::{DType, Mesh, ModelConfig, Rank};
use dist_kernels::Backend;
use dist_kernels::args::SampleRow;
use dist_kernels::cpu::{CpuBackend, CpuOptions, CpuPath};

use crate::checkpoint::Checkpoint;
use crate::engine::{Engine, EngineError, start_rank};
use crate::manifest::Golden;
use crate::request::{Event, Request, RequestId, Sampling};
use crate::runner::{Comms, Runner};
use crate::scheduler::RequestError;
use crate::step::{InputToken, SampleAt, StepBatch};

/// How far a log-probability may be from the golden one, with activations in f32.
///
/// Measured floor: over all fixtures and meshes up to 4 × 3, each with files of its own, the largest difference is
/// 5e-7 (`tests/probe.rs` prints it and holds it below a tenth of this). Deeper and wider models, and other devices in
/// f32, have the room that is left.
pub const TOLERANCE: f32 = 1e-3;

const BLOCK_SIZE: usize = 16;
/// Nobody waits: a stage has sent before the next one begins.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why an engine does not say what it must.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It says something else.
    #[error(
        "log-probability {position} of the probe prompt is {found:.6}, it was {expected:.6} at export \
         (tolerance {TOLERANCE})"
    )]
    Differs {
        /// Which of the prompt's tokens.
        position: usize,
        /// What it was.
        expected: f32,
        /// What it is.
        found: f32,
    },
    /// It says too little.
    #[error("the engine gave {found} log-probabilities of the probe prompt, expected {expected}")]
    Missing {
        /// As many as there are.
        expected: usize,
        /// As many as there must be.
        found: usize,
    },
    /// The prompt was refused.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A step failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Asks an engine that serves nothing else; the largest difference. Of a prompt that is longer than `max_seq_len`, the
/// beginning counts, which is the same whatever follows.
pub fn verify<B: Backend>(
    engine: &mut Engine<B>,
    golden: &Golden,
    max_seq_len: usize,
) -> Result<f32, ProbeError> {
    let n = golden.prompt_ids.len().min(max_seq_len);
    let expected = &golden.logprobs[..n - 1];
    if expected.is_empty() {
        return Ok(0.0);
    }
    let sampling = Sampling { prompt_logprobs: true, ..Sampling::greedy(0) };
    engine.add(Request { id: RequestId(u64::MAX), prompt: golden.prompt_ids[..n].to_vec(), sampling })?;
    let mut found = Vec::new();
    while !engine.is_idle() {
        for event in engine.step()? {
            if let Event::Prompt { logprobs, .. } = event {
                found.extend(logprobs.iter().map(|token| token.logprob));
            }
        }
    }
    compare(expected, &found)
}

fn compare(expected: &[f32], found: &[f32]) -> Result<f32, ProbeError> {
    if expected.len() != found.len() {
        return Err(ProbeError::Missing { expected: expected.len(), found: found.len() });
    }
    let mut worst = 0.0_f32;
    for (i, (&expected, &found)) in expected.iter().zip(found).enumerate() {
        let difference = (expected - found).abs();
        if difference.is_nan() || difference > TOLERANCE {
            return Err(ProbeError::Differs { position: i + 1, expected, found });
        }
        worst = worst.max(difference);
    }
    Ok(worst)
}

/// Log-probabilities of `prompt_ids[1..]` on the CPU in f32, one layer's weights in memory at a time: each layer is a
/// pipeline stage that is loaded, run once and let go. The first one stays, since what is drawn comes back to it.
pub fn logprobs(
    checkpoint: &Checkpoint,
    prompt_ids: &[u32],
    threads: usize,
) -> Result<Vec<f32>, EngineError> {
    logprobs_of(checkpoint.config(), &|| checkpoint, prompt_ids, threads)
}

/// The same for a checkpoint that is opened for each layer anew, so that a layer's pages are let go with it.
pub(super) fn logprobs_of<C: Borrow<Checkpoint>>(
    model: &ModelConfig,
    open: &dyn Fn() -> C,
    prompt_ids: &[u32],
    threads: usize,
) -> Result<Vec<f32>, EngineError> {
    let plan = plan(model, prompt_ids.len());
    let batch = batch(prompt_ids);
    let mut first: Option<Runner<CpuBackend>> = None;
    for (stage, end) in Local::world(plan.mesh.pp, DEADLINE).into_iter().enumerate() {
        let options = CpuOptions { threads, path: CpuPath::Auto, spin: Duration::from_micros(50) };
        let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Local(end) };
        let backend = CpuBackend::new(options)?;
        let mut runner = start_rank(backend, comms, open().borrow(), &plan, Rank(stage), &mut |_| {
            ControlFlow::Continue(())
        })?;
        runner.submit(&batch)?;
        first.get_or_insert(runner);
    }
    let mut first = first.expect("a model has a layer");
    let output = first.collect()?.expect("a step was submitted");
    Ok(output.sampled.iter().map(|sampled| sampled.logprob).collect())
}

/// A stage a layer.
fn plan(model: &ModelConfig, len: usize) -> Plan {
    let model = model.clone();
    Plan {
        schema_version: SCHEMA_VERSION,
        mesh: Mesh { tp: 1, pp: model.n_layers, dp: 1 },
        stages: vec![1; model.n_layers],
        act_dtype: DType::F32,
        wire_dtype: DType::F32,
        kv: KvPlan { dtype: DType::F32, block_size: BLOCK_SIZE, n_blocks: len.div_ceil(BLOCK_SIZE) },
        limits: Limits { max_seq_len: len, max_seqs: 1, max_batch_tokens: len, max_sample_rows: len },
        predictions: Predictions { ttft_s: 0.0, tpot_s: 0.0, total_s: 0.0, tokens_per_s: 0.0 },
        model,
    }
}

/// The whole prompt in one step, each token but the first one scored where it would be drawn.
fn batch(prompt_ids: &[u32]) -> StepBatch {
    let n = prompt_ids.len() as u32;
    let n_blocks = n.div_ceil(BLOCK_SIZE as u32);
    let samples = prompt_ids[1..].iter().zip(0..).map(|(&target, row)| SampleAt {
        row,
        seq_slot: None,
        how: score(target),
        n_top: 0,
    });
    StepBatch {
        generation: 0,
        step: 0,
        tokens: prompt_ids.iter().map(|&id| InputToken::Known(id)).collect(),
        positions: (0..n).collect(),
        slots: (0..n as i32).collect(),
        q_offsets: vec![0, n],
        context_lens: vec![n],
        seq_slots: vec![0],
        block_tables: (0..n_blocks).collect(),
        max_blocks: n_blocks,
        samples: samples.collect(),
    }
}

fn score(target: u32) -> SampleRow {
    SampleRow {
        target: Some(target),
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
