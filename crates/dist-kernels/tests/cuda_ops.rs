//! Steps by rows on the GPU against the CPU: embed, norms, biases, gathers; and what the backend refuses. Poisoned
//! outputs, numbers that nobody has seen before. Without a GPU the tests say so and pass.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

mod cuda_case;

use cuda_case::{Random, assert_near, bound, cpu, get, gpu, options, poisoned, put, weight, words};
use dist_core::DType;
use dist_kernels::args::{AddBiasArgs, AddBiasNormArgs, EmbedArgs, GatherRowsArgs, Lookup, Norm, Residual};
use dist_kernels::cuda::CudaBackend;
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};
use dist_kernels::{Backend, KernelError};

const TYPES: [DType; 2] = [DType::BF16, DType::F16];

#[derive(Clone, Copy, Debug, PartialEq)]
enum NormKind {
    None,
    Layer,
    Rms,
}

struct Rows<'a> {
    x: &'a [f32],
    delta: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    weight: &'a [f32],
    norm_bias: &'a [f32],
    kind: NormKind,
    keep: Residual,
    d: usize,
}

impl Rows<'_> {
    fn run<B: Backend>(&self, backend: &mut B, act: DType) -> [Vec<f32>; 2] {
        let rows = self.x.len() / self.d;
        let (weight, norm_bias) = (put(backend, act, self.weight), put(backend, act, self.norm_bias));
        let mut residual = put(backend, act, self.x);
        let mut normed = poisoned(backend, act, self.x.len());
        let delta = self.delta.map(|x| put(backend, act, x));
        let bias = self.bias.map(|x| put(backend, act, x));
        let norm = match self.kind {
            NormKind::None => Norm::None,
            NormKind::Layer => Norm::Layer { weight: &weight, bias: &norm_bias, eps: 1e-5 },
            NormKind::Rms => Norm::Rms { weight: &weight, eps: 1e-5 },
        };
        backend
            .add_bias_norm(AddBiasNormArgs {
                normed: &mut normed,
                residual: &mut residual,
                delta: delta.as_ref(),
                bias: bias.as_ref(),
                norm,
                keep: self.keep,
                rows,
                d: self.d,
            })
            .unwrap();
        [get(backend, &normed), get(backend, &residual)]
    }
}

#[test]
fn add_bias_norm() {
    let Some((_one, mut gpu)) = gpu("add_bias_norm") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    let mut i = 0;
    for d in [7, 48, 64, 65, 768, 1001, 4096, 8192, 8200, 12288] {
        // More than are on all multiprocessors at once.
        let many = if matches!(d, 4096 | 8192) { 700 } else { 40 };
        for rows in [1, 3, 33, many] {
            for (kind, keep) in [
                (NormKind::Layer, Residual::Sum),
                (NormKind::Layer, Residual::Normed),
                (NormKind::Rms, Residual::Sum),
                (NormKind::None, Residual::Sum),
            ] {
                let dtype = TYPES[i % 2];
                let mut normal = |n| random.normal(n, 1.0, dtype);
                let (x, delta, bias) = (normal(rows * d), normal(rows * d), normal(d));
                let (weight, norm_bias) = (normal(d), normal(d));
                let case = Rows {
                    x: &x,
                    delta: (i % 3 != 0).then_some(&delta),
                    bias: (i % 5 > 1).then_some(&bias),
                    weight: &weight,
                    norm_bias: &norm_bias,
                    kind,
                    keep,
                    d,
                };
                let (found, expected) = (case.run(&mut gpu, dtype), case.run(&mut cpu, DType::F32));
                // A row alone has the bits that it has among others.
                let last = (rows - 1) * d..rows * d;
                let alone =
                    Rows { x: &x[last.clone()], delta: case.delta.map(|delta| &delta[last.clone()]), ..case };
                for (all, one) in found.iter().zip(alone.run(&mut gpu, dtype)) {
                    assert_eq!(all[last.clone()], one, "{rows} x {d}, case {i}");
                }
                for ((found, expected), part) in found.iter().zip(&expected).zip(["normed", "residual"]) {
                    let what = format!("{part} {dtype}, {rows} x {d}, {kind:?}, {keep:?}, case {i}");
                    assert_near(&what, found, expected, bound(dtype));
                }
                i += 1;
            }
        }
    }
}

struct Tables {
    d: usize,
    n_tokens: usize,
    tokens: Vec<f32>,
    positions: Vec<f32>,
    ids: Vec<u32>,
    at: Vec<u32>,
    before: Vec<f32>,
    dtype: DType,
}

impl Tables {
    /// Tokens from `first` on, positions from 2 on; either may be left out.
    fn run<B: Backend>(&self, backend: &mut B, act: DType, first: u32, parts: (bool, bool)) -> Vec<f32> {
        let (rows, d) = (self.ids.len(), self.d);
        let tokens = weight(backend, (&self.tokens, self.n_tokens, d), self.dtype, Layout::Nk, 2);
        let positions = weight(backend, (&self.positions, 50, d), self.dtype, Layout::Nk, 1);
        let (ids, at) = (words(backend, &self.ids), words(backend, &self.at));
        let mut out = put(backend, act, &self.before);
        backend
            .embed(EmbedArgs {
                out: &mut out,
                rows,
                d,
                tokens: parts.0.then_some(Lookup { ids: &ids, table: &tokens, offset: 0, first }),
                positions: parts.1.then_some(Lookup { ids: &at, table: &positions, offset: 2, first: 0 }),
                drawn: None,
            })
            .unwrap();
        get(backend, &out)
    }
}

#[test]
fn embed_gather_and_add_bias() {
    let Some((_one, mut gpu)) = gpu("embed_gather_and_add_bias") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    for (i, d) in [48, 30, 77, 64, 4096].into_iter().enumerate() {
        let dtype = TYPES[i % 2];
        let rows = 9;
        let tables = Tables {
            d,
            n_tokens: 100,
            tokens: random.normal(100 * d, 1.0, dtype),
            positions: random.normal(50 * d, 1.0, dtype),
            ids: (0..rows).map(|_| random.below(150) as u32).collect(),
            at: (0..rows).map(|_| random.below(48) as u32).collect(),
            before: random.normal(rows * d, 1.0, dtype),
            dtype,
        };
        for (first, parts) in [(0, (true, true)), (50, (true, false)), (0, (false, true)), (50, (true, true))]
        {
            let expected = tables.run(&mut cpu, DType::F32, first, parts);
            let found = tables.run(&mut gpu, dtype, first, parts);
            assert_near(
                &format!("embed {dtype} {d}, from {first}, {parts:?}"),
                &found,
                &expected,
                bound(dtype),
            );
        }
        let order: Vec<u32> = (0..5).map(|_| random.below(rows) as u32).collect();
        for dtype in [dtype, DType::F32] {
            let x = random.normal(rows * d, 1.0, dtype);
            let found = gather(&mut gpu, dtype, (&x, d), &order);
            let expected: Vec<f32> = order.iter().flat_map(|&r| &x[r as usize * d..][..d]).copied().collect();
            assert_eq!(found, expected, "gather_rows {dtype} {d}");
        }
        let (x, bias) = (random.normal(rows * d, 1.0, dtype), random.normal(d, 1.0, dtype));
        let (found, expected) =
            (add_bias(&mut gpu, dtype, &x, &bias), add_bias(&mut cpu, DType::F32, &x, &bias));
        assert_near(&format!("add_bias {dtype} {d}"), &found, &expected, bound(dtype));
    }
}

fn gather<B: Backend>(backend: &mut B, dtype: DType, (x, d): (&[f32], usize), order: &[u32]) -> Vec<f32> {
    let (x, indices) = (put(backend, dtype, x), words(backend, order));
    let mut out = poisoned(backend, dtype, order.len() * d);
    let rows = 9;
    let n_out = order.len();
    backend.gather_rows(GatherRowsArgs { out: &mut out, x: &x, indices: &indices, n_out, rows, d }).unwrap();
    get(backend, &out)
}

fn add_bias<B: Backend>(backend: &mut B, act: DType, x: &[f32], bias: &[f32]) -> Vec<f32> {
    let (rows, n) = (x.len() / bias.len(), bias.len());
    let (mut x, bias) = (put(backend, act, x), put(backend, act, bias));
    backend.add_bias(AddBiasArgs { x: &mut x, bias: &bias, rows, n }).unwrap();
    get(backend, &x)
}

#[test]
fn what_does_not_fit_is_named() {
    let Some((_one, mut gpu)) = gpu("what_does_not_fit_is_named") else { return };
    let (free, all) = gpu.memory().unwrap();
    assert!(free > 0 && free <= all);
    let error = gpu.alloc("the key cache", DType::U8, all + 1).unwrap_err();
    match &error {
        KernelError::OutOfMemory { what, needed, available } => {
            assert_eq!((what.as_str(), *needed), ("the key cache", all + 1));
            assert!(*available > 0 && *available < all);
        }
        other => panic!("{other}"),
    }
    // The GPU works on.
    assert_eq!(add_bias(&mut gpu, DType::BF16, &[1.0; 8], &[2.0; 8]), [3.0; 8]);
}

#[test]
fn weights_in_f32_are_refused_or_cast() {
    let Some((_one, mut plain)) = gpu("weights_in_f32_are_refused_or_cast") else { return };
    let bytes =
        HostBytes::new([1.0_f32, -2.5, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
    let host = || HostWeight {
        parts: vec![HostPart { bytes: bytes.clone(), offset: 0, n: 2, ld: 2 }],
        dtype: DType::F32,
        layout: Layout::Nk,
        k: 2,
    };
    let error = plain.prepare(host()).unwrap_err();
    assert_eq!(error.to_string(), "no kernel of the cuda backend takes f32 weights");
    drop(plain);
    let mut casting = CudaBackend::new(options(Some(DType::F16))).unwrap();
    let weight = casting.prepare(host()).unwrap();
    assert_eq!((weight.dtype, weight.n, weight.k), (DType::F16, 2, 2));
    assert_eq!(get(&mut casting, &weight.parts[0].data)[..2], [1.0, -2.5]);
}
