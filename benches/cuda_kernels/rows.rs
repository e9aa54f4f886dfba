//! The small steps: `add_bias_norm` on rows that the step before has just written, `embed` and `sample` on memory that
//! nobody has read for long.

use dist_core::DType;
use dist_core::philox::{NormalTable, philox4x32, stream_key};
use dist_kernels::Backend;
use dist_kernels::Result;
use dist_kernels::args::{AddBiasNormArgs, EmbedArgs, Lookup, Norm, Residual, SampleArgs, SampleRow};
use dist_kernels::cuda::CudaBuf;
use serde_json::{Value, json};

use crate::gpu::{Gpu, median, median_of_draws, n_rotating};
use crate::linear::{MODELS, N_VOCAB};
use crate::report::{Line, Report, Work};

const ROWS: [usize; 3] = [1, 64, 1024];
const N_CTX: usize = 2048;
const N_LAUNCHES: usize = 128;
const SAMPLED_ROWS: usize = 64;

fn line(name: String, shape: Value, seconds: f64) -> Line {
    Line { name, shape, seconds, work: Work::Latency, beside: vec![], runs: None, bars: vec![] }
}

fn norm(gpu: &mut Gpu, rows: usize, d: usize) -> Result<f64> {
    let (weight, bias, delta) = (gpu.activations(d)?, gpu.activations(d)?, gpu.activations(rows * d)?);
    let (mut residual, mut normed) = (gpu.activations(rows * d)?, gpu.activations(rows * d)?);
    median(&mut gpu.backend, N_LAUNCHES, |backend, _| {
        backend.add_bias_norm(AddBiasNormArgs {
            normed: &mut normed,
            residual: &mut residual,
            delta: Some(&delta),
            bias: Some(&bias),
            norm: Norm::Layer { weight: &weight, bias: &weight, eps: 1e-5 },
            keep: Residual::Sum,
            rows,
            d,
        })
    })
}

fn embed(gpu: &mut Gpu, rows: usize, d: usize) -> Result<f64> {
    let (tokens, positions) = (gpu.weight(N_VOCAB, d)?, gpu.weight(N_CTX, d)?);
    let mut out = gpu.activations(rows * d)?;
    // Other tokens for each launch.
    let mut ids = |n: usize, launch: usize| {
        let draw = |row: usize| philox4x32([row as u32, launch as u32, 0, 0], [1, n as u32])[0] % n as u32;
        gpu.words(&(0..rows).map(draw).collect::<Vec<u32>>())
    };
    let ids = (0..N_LAUNCHES).map(|launch| Ok((ids(N_VOCAB, launch)?, ids(N_CTX, launch)?)));
    let ids = ids.collect::<Result<Vec<(CudaBuf, CudaBuf)>>>()?;
    median(&mut gpu.backend, N_LAUNCHES, |backend, idx| {
        let (token_ids, position_ids) = &ids[idx];
        backend.embed(EmbedArgs {
            out: &mut out,
            rows,
            d,
            tokens: Some(Lookup { ids: token_ids, table: &tokens, offset: 0, first: 0 }),
            positions: Some(Lookup { ids: position_ids, table: &positions, offset: 0, first: 0 }),
            drawn: None,
        })
    })
}

fn sample(gpu: &mut Gpu, row: &SampleRow) -> Result<f64> {
    let rows = vec![row.clone(); SAMPLED_ROWS];
    let len = SAMPLED_ROWS * N_VOCAB;
    let (table, key) = (NormalTable::new(3.0), stream_key(1, "logits"));
    let values: Vec<f32> = (0..len.div_ceil(8) as u64).flat_map(|group| table.eight(key, group)).collect();
    let mut first = gpu.output(DType::F32, len)?;
    gpu.backend.upload(&mut first, 0, bytemuck::cast_slice(&values[..len]))?;
    let mut logits = vec![first];
    for idx in 1..n_rotating(len * DType::F32.bytes()) {
        let mut next = gpu.output(DType::F32, len)?;
        gpu.backend.fill_from(&mut next, &logits[0], idx * N_VOCAB)?;
        logits.push(next);
    }
    let (mut ids, mut logprobs) = (gpu.words(&[0; SAMPLED_ROWS])?, gpu.output(DType::F32, SAMPLED_ROWS)?);
    let (mut top_ids, mut top_logprobs) = (gpu.output(DType::U32, 0)?, gpu.output(DType::F32, 0)?);
    let n_logits = logits.len();
    median_of_draws(&mut gpu.backend, n_logits, &rows, |backend, idx| {
        backend.sample(SampleArgs {
            logits: &mut logits[idx],
            n_vocab: N_VOCAB,
            ld: N_VOCAB,
            rows: &rows,
            ids: &mut ids,
            logprobs: &mut logprobs,
            n_top: 0,
            top_ids: &mut top_ids,
            top_logprobs: &mut top_logprobs,
        })
    })
}

fn samplings() -> [(&'static str, SampleRow); 5] {
    let greedy = SampleRow {
        target: None,
        counts: vec![],
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: vec![],
        banned: vec![],
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        sample_idx: 0,
        position: 1,
    };
    let drawn = SampleRow { temperature: 0.8, ..greedy.clone() };
    [
        ("greedy", greedy),
        ("top_k=40", SampleRow { top_k: 40, ..drawn.clone() }),
        ("top_p=0.95", SampleRow { top_p: 0.95, ..drawn.clone() }),
        ("top_k=40,top_p=0.95", SampleRow { top_k: 40, top_p: 0.95, ..drawn.clone() }),
        ("temperature", drawn),
    ]
}

pub(crate) fn run(gpu: &mut Gpu, takes: &dyn Fn(&str) -> bool, report: &mut Report) -> Result<()> {
    for (model, d) in MODELS {
        for rows in ROWS {
            let name = format!("rows/add_bias_norm/{model}/{rows}x{d}/");
            if takes(&name) {
                let shape = json!({ "op": "add_bias_norm", "rows": rows, "d": d });
                report.push(line(name, shape, norm(gpu, rows, d)?));
            }
            let name = format!("rows/embed/{model}/{rows}x{d}/");
            if takes(&name) {
                let shape = json!({ "op": "embed", "rows": rows, "d": d });
                report.push(line(name, shape, embed(gpu, rows, d)?));
            }
        }
    }
    for (what, row) in samplings() {
        let name = format!("rows/sample/{what}/{SAMPLED_ROWS}x{N_VOCAB}/");
        if takes(&name) {
            let shape = json!({ "op": "sample", "how": what, "rows": SAMPLED_ROWS, "n_vocab": N_VOCAB });
            report.push(line(name, shape, sample(gpu, &row)?));
        }
    }
    Ok(())
}
