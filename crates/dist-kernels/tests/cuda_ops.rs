//! Every op on the GPU against the same op on the CPU: odd rows, padding rows, windows' edges, blocks that end mid-page,
//! poisoned outputs, numbers that nobody has seen before. Without a GPU the tests say so and pass.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

mod cuda_case;

use cuda_case::{
    Random, assert_near, assert_untouched, bound, cpu, get, gpu, ints, options, poisoned, put, weight, words,
};
use dist_core::{DType, KvLayout};
use dist_kernels::args::{
    Activation, AddBiasArgs, AddBiasNormArgs, AppendKv, EmbedArgs, Epilogue, GatherRowsArgs, K_SEGMENTS,
    KvLayer, LinearArgs, LogitsArgs, Lookup, Norm, Prologue, Residual, Then,
};
use dist_kernels::cuda::CudaBackend;
use dist_kernels::weight::{HostBytes, HostPart, HostWeight, Layout};
use dist_kernels::{Backend, KernelError};

const TYPES: [DType; 2] = [DType::BF16, DType::F16];

struct Product {
    rows: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    dtype: DType,
}

impl Product {
    fn new(random: &mut Random, (rows, n, k): (usize, usize, usize), dtype: DType) -> Self {
        let x = random.normal(rows * k, 1.0, dtype);
        let w = random.normal(n * k, 0.05, dtype);
        Self { rows, n, k, x, w, bias: random.normal(n, 1.0, dtype), dtype }
    }

    /// `activation` after the bias, if any; activations are `act`, f32 on the CPU.
    fn run<B: Backend>(
        &self,
        backend: &mut B,
        act: DType,
        (layout, n_parts): (Layout, usize),
        activation: Option<Activation>,
    ) -> Vec<f32> {
        let weight = weight(backend, (&self.w, self.n, self.k), self.dtype, layout, n_parts);
        let (x, bias) = (put(backend, act, &self.x), put(backend, act, &self.bias));
        let mut out = poisoned(backend, act, (self.rows + 1) * self.n);
        let then = activation.map_or(Then::Store, Then::Activate);
        backend
            .linear(LinearArgs {
                out: &mut out,
                x: &x,
                weight: &weight,
                rows: self.rows,
                k_segments: K_SEGMENTS,
                prologue: Prologue::None,
                epilogue: Epilogue { bias: Some(&bias), then },
            })
            .unwrap();
        let mut out = get(backend, &out);
        assert_untouched("linear", &out, self.rows * self.n);
        out.truncate(self.rows * self.n);
        out
    }

    fn logits<B: Backend>(&self, backend: &mut B, act: DType) -> Vec<f32> {
        let head = weight(backend, (&self.w, self.n, self.k), self.dtype, Layout::Nk, 1);
        let x = put(backend, act, &self.x);
        let mut out = poisoned(backend, DType::F32, (self.rows + 1) * self.n);
        backend.logits(LogitsArgs { out: &mut out, x: &x, head: &head, rows: self.rows }).unwrap();
        let mut out = get(backend, &out);
        assert_untouched("logits", &out, self.rows * self.n);
        out.truncate(self.rows * self.n);
        out
    }
}

#[test]
fn linear() {
    let Some((_one, mut gpu)) = gpu("linear") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    let shapes = [(40, 136), (104, 64), (777, 1032), (2304, 768), (96, 3072), (77, 33), (52, 6)];
    let functions = [None, Some(Activation::GeluTanh), Some(Activation::GeluErf), Some(Activation::Relu)];
    for (i, rows) in [1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 130, 300, 1025].into_iter().enumerate() {
        for (j, (n, k)) in shapes.into_iter().enumerate() {
            let dtype = TYPES[(i + j) % 2];
            let product = Product::new(&mut random, (rows, n, k), dtype);
            let function = functions[(i + j / 2) % functions.len()];
            let form = [(Layout::Nk, 1), (Layout::Nk, 3), (Layout::Kn, 1), (Layout::Kn, 2)][(i + j) % 4];
            let what = format!("linear {dtype} {rows} rows, {n} x {k}, {function:?}, {form:?}");
            let expected = product.run(&mut cpu, DType::F32, form, function);
            let found = product.run(&mut gpu, dtype, form, function);
            assert_near(&what, &found, &expected, bound(dtype));
            if j < 3 {
                let expected = product.logits(&mut cpu, DType::F32);
                assert_near(&what, &product.logits(&mut gpu, dtype), &expected, 2e-6);
            }
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_and_among_others() {
    let Some((_one, mut gpu)) = gpu("a_row_gives_the_same_bits_alone_and_among_others") else { return };
    let mut random = Random::new();
    for rows in [8, 16, 32, 64, 200] {
        for (n, k) in [(777, 1032), (3072, 768)] {
            let all = Product::new(&mut random, (rows, n, k), DType::BF16);
            let mut run = |product: &Product| product.run(&mut gpu, DType::BF16, (Layout::Nk, 1), None);
            let found = run(&all);
            let turned = Product {
                x: all.x.rchunks(k).flatten().copied().collect(),
                w: all.w.clone(),
                bias: all.bias.clone(),
                ..all
            };
            let back: Vec<f32> = run(&turned).rchunks(n).flatten().copied().collect();
            assert!(found == back, "{rows} rows in another order, {n} x {k}");
            // The fewest rows of the same bucket, from any place; many rows have none.
            if rows <= 64 {
                let fewer = rows / 2 + 1;
                let first = random.below(rows - fewer + 1);
                let x = all.x[first * k..(first + fewer) * k].to_vec();
                let alone = run(&Product { rows: fewer, x, w: all.w, bias: all.bias, ..turned });
                assert!(found[first * n..(first + fewer) * n] == alone, "{fewer} of {rows} rows, {n} x {k}");
            }
        }
    }
}

/// `q | k | v` and both caches.
fn append<B: Backend>(
    backend: &mut B,
    act: DType,
    product: &Product,
    layout: KvLayout,
    slots: &[i32],
) -> [Vec<f32>; 3] {
    let weight = weight(backend, (&product.w, product.n, product.k), product.dtype, Layout::Nk, 3);
    let (x, bias) = (put(backend, act, &product.x), put(backend, act, &product.bias));
    let slots = ints(backend, slots);
    let mut out = poisoned(backend, act, product.rows * product.n);
    let cache_len = 12 * layout.block_len();
    let mut kv = KvLayer {
        k: put(backend, layout.dtype, &vec![7.0; cache_len]),
        v: put(backend, layout.dtype, &vec![7.0; cache_len]),
    };
    backend
        .linear(LinearArgs {
            out: &mut out,
            x: &x,
            weight: &weight,
            rows: product.rows,
            k_segments: K_SEGMENTS,
            prologue: Prologue::None,
            epilogue: Epilogue {
                bias: Some(&bias),
                then: Then::AppendKv(AppendKv { kv: &mut kv, layout, slots: &slots }),
            },
        })
        .unwrap();
    [get(backend, &out), get(backend, &kv.k), get(backend, &kv.v)]
}

#[test]
fn linear_appends_keys_and_values() {
    let Some((_one, mut gpu)) = gpu("linear_appends_keys_and_values") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    for (i, rows) in [1, 5, 16, 33, 64, 90].into_iter().enumerate() {
        for (n_heads, n_kv_heads, d_head) in [(6, 2, 64), (4, 4, 16), (6, 6, 8)] {
            let dtype = TYPES[i % 2];
            let n = (n_heads + 2 * n_kv_heads) * d_head;
            let product = Product::new(&mut random, (rows, n, 512), dtype);
            let layout =
                KvLayout { n_layers_local: 1, n_kv_heads_local: n_kv_heads, d_head, dtype, block_size: 16 };
            // Each row its own slot, far from its neighbours'; some rows are padding.
            let slots: Vec<i32> =
                (0..rows as i32).map(|r| if r % 7 == 3 { -1 } else { r * 77 % 192 }).collect();
            let expected = append(&mut cpu, DType::F32, &product, layout, &slots);
            let found = append(&mut gpu, dtype, &product, layout, &slots);
            for ((found, expected), what) in found.iter().zip(&expected).zip(["q | k | v", "keys", "values"])
            {
                assert_near(
                    &format!("{what}, {rows} rows, {n_heads} heads of {d_head}"),
                    found,
                    expected,
                    bound(dtype),
                );
            }
        }
    }
}

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
        for rows in [1, 3, 33] {
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
fn a_graph_gives_the_bits_of_its_steps() {
    let Some((_one, mut gpu)) = gpu("a_graph_gives_the_bits_of_its_steps") else { return };
    let mut random = Random::new();
    let (rows, d, dtype) = (5, 768, DType::BF16);
    let product = Product::new(&mut random, (rows, 3 * d, d), dtype);
    let weight = weight(&mut gpu, (&product.w, product.n, d), dtype, Layout::Nk, 1);
    let bias = put(&mut gpu, dtype, &product.bias);
    let (gain, shift) = (random.normal(d, 1.0, dtype), random.normal(d, 1.0, dtype));
    let (gain, shift) = (put(&mut gpu, dtype, &gain), put(&mut gpu, dtype, &shift));
    let mut residual = put(&mut gpu, dtype, &product.x);
    let mut normed = poisoned(&mut gpu, dtype, rows * d);
    let mut out = poisoned(&mut gpu, dtype, rows * product.n);
    let mut steps = |gpu: &mut CudaBackend| {
        gpu.add_bias_norm(AddBiasNormArgs {
            normed: &mut normed,
            residual: &mut residual,
            delta: None,
            bias: None,
            norm: Norm::Layer { weight: &gain, bias: &shift, eps: 1e-5 },
            keep: Residual::Sum,
            rows,
            d,
        })?;
        gpu.linear(LinearArgs {
            out: &mut out,
            x: &normed,
            weight: &weight,
            rows,
            k_segments: K_SEGMENTS,
            prologue: Prologue::None,
            epilogue: Epilogue { bias: Some(&bias), then: Then::Activate(Activation::GeluTanh) },
        })
    };
    steps(&mut gpu).unwrap();
    let graph = gpu.capture(&mut steps).unwrap().unwrap();
    assert_eq!(graph.n_nodes(), 2);
    let eager = get(&mut gpu, &out);
    let poison = vec![0xff; rows * product.n * 2];
    gpu.upload(&mut out, 0, &poison).unwrap();
    gpu.replay(&graph).unwrap();
    assert!(eager == get(&mut gpu, &out), "the graph's bits are others");
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
