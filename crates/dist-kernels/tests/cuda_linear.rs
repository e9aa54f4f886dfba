//! `linear` and `logits` on the GPU against the CPU: odd rows, padding rows, weights in parts and the other way round,
//! poisoned outputs, numbers that nobody has seen before. Without a GPU the tests say so and pass.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

mod cuda_case;

use cuda_case::{Random, assert_near, assert_untouched, bound, cpu, get, gpu, ints, poisoned, put, weight};
use dist_core::{DType, KvLayout};
use dist_kernels::Backend;
use dist_kernels::args::{
    Activation, AddBiasNormArgs, AppendKv, Epilogue, K_SEGMENTS, KvLayer, LinearArgs, LogitsArgs, Norm,
    Prologue, Residual, Then,
};
use dist_kernels::cuda::CudaBackend;
use dist_kernels::weight::Layout;

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

/// What takes a block one wide pass, several passes, or the half of a long k, on a GPU of any size that there is: 160 and
/// 381 outputs a multiprocessor of an H100, and 40 with more than twice as many inputs as outputs.
#[test]
fn wide_and_long_weights() {
    let Some((_one, mut gpu)) = gpu("wide_and_long_weights") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    for (i, rows) in [1, 9, 16, 31, 33, 64].into_iter().enumerate() {
        for (j, (n, k)) in [(20_488, 72), (50_257, 72), (4_232, 8_472)].into_iter().enumerate() {
            let dtype = TYPES[(i + j) % 2];
            let product = Product::new(&mut random, (rows, n, k), dtype);
            let what = format!("linear {dtype} {rows} rows, {n} x {k}");
            if j == 1 {
                let expected = product.logits(&mut cpu, DType::F32);
                assert_near(&what, &product.logits(&mut gpu, dtype), &expected, 2e-6);
            }
            let form = (Layout::Nk, 1);
            let expected = product.run(&mut cpu, DType::F32, form, Some(Activation::GeluTanh));
            let found = product.run(&mut gpu, dtype, form, Some(Activation::GeluTanh));
            assert_near(&what, &found, &expected, bound(dtype));
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_alone_and_among_others() {
    let Some((_one, mut gpu)) = gpu("a_row_gives_the_same_bits_alone_and_among_others") else { return };
    let mut random = Random::new();
    for rows in [8, 16, 32, 64, 200] {
        for (n, k) in [(777, 1032), (3072, 768), (20_488, 72), (26_000, 72)] {
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
) -> dist_kernels::Result<[Vec<f32>; 3]> {
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
        .map(|()| [get(backend, &out), get(backend, &kv.k), get(backend, &kv.v)])
}

#[test]
fn linear_appends_keys_and_values() {
    let Some((_one, mut gpu)) = gpu("linear_appends_keys_and_values") else { return };
    let (mut cpu, mut random) = (cpu(), Random::new());
    for (i, rows) in [1, 5, 16, 29, 33, 64, 90].into_iter().enumerate() {
        // The last has 56 outputs a multiprocessor of an H100.
        for (n_heads, n_kv_heads, d_head) in [(6, 2, 64), (4, 4, 16), (6, 6, 8), (60, 28, 64)] {
            let dtype = TYPES[i % 2];
            let n = (n_heads + 2 * n_kv_heads) * d_head;
            let product = Product::new(&mut random, (rows, n, 512), dtype);
            let layout =
                KvLayout { n_layers_local: 1, n_kv_heads_local: n_kv_heads, d_head, dtype, block_size: 16 };
            // Each row its own slot, far from its neighbours'; some rows are padding.
            let slots: Vec<i32> =
                (0..rows as i32).map(|r| if r % 7 == 3 { -1 } else { r * 77 % 192 }).collect();
            let expected = append(&mut cpu, DType::F32, &product, layout, &slots).unwrap();
            let found = append(&mut gpu, dtype, &product, layout, &slots).unwrap();
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
    // Heads that four elements straddle.
    let dtype = DType::BF16;
    let product = Product::new(&mut random, (5, 72, 24), dtype);
    let layout = KvLayout { n_layers_local: 1, n_kv_heads_local: 4, d_head: 6, dtype, block_size: 16 };
    let refused = append(&mut gpu, dtype, &product, layout, &[0, 1, 2, 3, 4]).unwrap_err();
    assert!(refused.to_string().contains("no multiple of 4"), "{refused}");
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
    gpu.replay(&graph, &[]).unwrap();
    assert!(eager == get(&mut gpu, &out), "the graph's bits are others");
}
