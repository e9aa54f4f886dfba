//! A GPT-3-class decoder, written once, and the engine that runs it: checkpoints, tokenizer, KV blocks, scheduler,
//! runner. Nothing here prints, reads the environment or knows a flag, a driver or a socket.
//!
//! A [`checkpoint::Checkpoint`] gives each rank views of its own bytes; [`engine::start_rank`] takes them into a
//! [`Backend`](dist_kernels::Backend) together with all memory that steps will need; an [`engine::Engine`] takes
//! [`request::Request`]s and tells what happens as [`request::Event`]s, four lines a step.
//!
//! ```
//! use std::ops::ControlFlow;
//!
//! use dist_comm::{Comm, Solo};
//! use dist_core::plan::{KvPlan, Limits, Plan, Predictions, SCHEMA_VERSION};
//! use dist_core::{DType, Mesh, Rank, presets};
//! use dist_kernels::cpu::{CpuBackend, CpuOptions, CpuPath};
//! use dist_models::checkpoint::Checkpoint;
//! use dist_models::engine::{Engine, Followers, start_rank};
//! use dist_models::request::{Event, Request, RequestId, Sampling};
//! use dist_models::runner::Comms;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A GPT-3 shape made small, with seeded random weights.
//! let mut model = presets::preset("gpt3-125m", None).ok_or("listed")?;
//! (model.n_layers, model.d_model, model.d_embed, model.d_ff) = (2, 64, 64, 256);
//! (model.n_heads, model.n_kv_heads, model.d_head, model.n_vocab) = (4, 4, 16, 500);
//! model.windows.truncate(2);
//! let plan = Plan {
//!     schema_version: SCHEMA_VERSION,
//!     model: model.clone(),
//!     mesh: Mesh::SOLO,
//!     stages: vec![2],
//!     act_dtype: DType::F32,
//!     wire_dtype: DType::F32,
//!     kv: KvPlan { dtype: DType::F32, block_size: 16, n_blocks: 8 },
//!     limits: Limits { max_seq_len: 64, max_seqs: 2, max_batch_tokens: 32, max_sample_rows: 2 },
//!     predictions: Predictions { ttft_s: 0.0, tpot_s: 0.0, total_s: 0.0, tokens_per_s: 0.0 },
//! };
//! let spin = std::time::Duration::from_micros(50);
//! let cpu = CpuBackend::new(CpuOptions { threads: 1, path: CpuPath::Auto, spin })?;
//! let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
//! let checkpoint = Checkpoint::random(model, 7);
//! let runner = start_rank(cpu, comms, &checkpoint, &plan, Rank(0), &mut |_| ControlFlow::Continue(()))?;
//! let mut engine = Engine::new(runner, Followers::None, &plan, None);
//! let sampling = Sampling::greedy(5);
//! engine.add(Request { id: RequestId(0), prompt: vec![1, 2, 3], sampling })?;
//! let mut n_tokens = 0;
//! while !engine.is_idle() {
//!     let events = engine.step()?;
//!     n_tokens += events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
//! }
//! assert_eq!(n_tokens, 5);
//! # Ok(())
//! # }
//! ```

pub mod checkpoint;
pub mod decoder;
pub mod engine;
pub mod export;
pub mod kv_blocks;
pub mod manifest;
pub mod rank;
pub mod request;
pub mod runner;
pub mod scheduler;
pub mod shard;
mod spare_threads;
pub mod step;
pub mod stop;
pub mod tokenizer;
mod workspace;
