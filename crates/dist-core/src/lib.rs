//! Pure values of a distributed GPT: models, sharded tensor types, topologies, costs and plans.
//!
//! Nothing here reads a file, a clock or a device; the same inputs give the same values everywhere. A [`ModelConfig`]
//! has a table of [`TensorSpec`]s ([`decoder_specs`]), each of which knows what any rank of a [`Mesh`] holds of it; a
//! [`Topology`] says what there is to run on; [`planner::plan`] makes a [`Plan`] of the three, with a prediction of what
//! it costs and the reason why every other split lost.
//!
//! ```
//! use dist_core::plan::Limits;
//! use dist_core::planner::{PlanOptions, Workload, plan};
//! use dist_core::{DType, Device, DeviceKind, Link, Mesh, Rank, Topology, presets};
//!
//! let model = presets::preset("gpt3-13b", None).expect("a preset");
//! let gpu = Device {
//!     kind: DeviceKind::Cuda,
//!     name: "a GPU of 24 GB".into(),
//!     host: 0,
//!     memory_bytes: 24_000_000_000,
//!     read_bytes_per_s: 1.0e12,
//!     flops_per_s: 150e12,
//!     overhead: None,
//! };
//! let topology = Topology::uniform(&gpu, 2, Link { latency_s: 5e-6, bytes_per_s: 50e9 });
//! let workload = Workload { n_seqs: 1, prompt_len: 128, new_tokens: 128 };
//! let options = PlanOptions {
//!     act_dtype: DType::BF16,
//!     wire_dtype: DType::F32,
//!     kv_dtype: DType::BF16,
//!     block_size: 16,
//!     limits: Limits { max_seq_len: 2048, max_seqs: 1, max_batch_tokens: 512, max_sample_rows: 1 },
//!     memory_percent: 90,
//!     mesh: None,
//!     stages: None,
//!     copies: false,
//! };
//!
//! let report = plan(&model, &topology, workload, &options)?;
//! let best = report.best.expect("two of them hold it");
//! assert_eq!(best.mesh, Mesh { tp: 2, pp: 1, dp: 1 });
//! assert!(best.memory(Rank(0)).total() < 15_000_000_000);
//! let why_not_one = report.rejected[0].reason.to_string();
//! assert!(why_not_one.starts_with("rank 0 needs 27.4"), "{why_not_one}");
//! # Ok::<(), dist_core::planner::RequestError>(())
//! ```

#![forbid(unsafe_code)]

pub mod config;
pub mod cost;
mod decoder_specs;
pub mod dtype;
pub mod kv_layout;
pub mod mesh;
pub mod philox;
pub mod plan;
pub mod planner;
pub mod presets;
pub mod raw;
pub mod shape;
pub mod spec;
pub mod topology;

pub use config::{Activation, BlockSpec, ModelConfig, NormPosition};
pub use cost::CostModel;
pub use decoder_specs::decoder_specs;
pub use dtype::DType;
pub use kv_layout::KvLayout;
pub use mesh::{Coord, Mesh, Rank};
pub use plan::{Plan, PlanHash};
pub use spec::{Owner, Part, Placement, TensorSlice, TensorSpec};
pub use topology::{Device, DeviceKind, Link, Overhead, Topology};
