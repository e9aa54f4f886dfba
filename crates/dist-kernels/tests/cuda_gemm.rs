//! Products of many rows by the own kernels and by cuBLASLt against the CPU, and the plans that choose between them.
//! Without a GPU the tests say so and pass.
#![allow(clippy::unwrap_used)] // A test stops at what should not happen.

mod cuda_case;

use std::fs;
use std::sync::Arc;

use cuda_case::{
    Random, assert_near, assert_untouched, bound, cpu, get, gpu, gpu_with, has_library, ints, options,
    own_folder, poisoned, put, weight, without_cublas_lt,
};
use dist_core::{DType, KvLayout};
use dist_kernels::Backend;
use dist_kernels::args::{
    Activation, AppendKv, Epilogue, K_SEGMENTS, KvLayer, LinearArgs, LogitsArgs, Prologue, Then,
};
use dist_kernels::cuda::plans::{Winner, bucket, first_of_bucket};
use dist_kernels::cuda::{CudaBackend, CudaOptions, EpilogueKind, GemmChoice, ProductShape};
use dist_kernels::weight::Layout;
use sha2::{Digest, Sha256};

const TYPES: [DType; 2] = [DType::BF16, DType::F16];

/// A product and its numbers.
struct Product {
    n: usize,
    k: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    dtype: DType,
}

/// What a product ends with.
#[derive(Clone, Copy, Debug)]
enum End {
    Linear { has_bias: bool, function: Option<Activation> },
    Logits,
}

const ENDS: [End; 8] = [
    End::Linear { has_bias: false, function: None },
    End::Linear { has_bias: true, function: None },
    End::Linear { has_bias: true, function: Some(Activation::GeluTanh) },
    End::Linear { has_bias: false, function: Some(Activation::GeluTanh) },
    End::Linear { has_bias: true, function: Some(Activation::Relu) },
    End::Linear { has_bias: false, function: Some(Activation::Relu) },
    End::Linear { has_bias: true, function: Some(Activation::GeluErf) },
    End::Logits,
];

impl End {
    /// Whether the library has it.
    fn is_for_library(self) -> bool {
        !matches!(self, Self::Linear { function: Some(Activation::GeluErf), .. })
    }

    fn shape(self, product: &Product) -> ProductShape {
        let (n, k, dtype) = (product.n, product.k, product.dtype);
        let (out_f32, epilogue) = match self {
            Self::Linear { has_bias, function } => (false, EpilogueKind::of(has_bias, function).unwrap()),
            Self::Logits => (true, EpilogueKind::None),
        };
        ProductShape { n, k, ld: k.next_multiple_of(8), dtype, out_f32, epilogue }
    }
}

impl Product {
    fn new(random: &mut Random, (rows, n, k): (usize, usize, usize), dtype: DType) -> Self {
        let x = random.normal(rows * k, 1.0, dtype);
        let w = random.normal(n * k, 0.05, dtype);
        Self { n, k, x, w, bias: random.normal(n, 1.0, dtype), dtype }
    }

    /// Of `rows` rows from `first` on, with activations of type `act`.
    fn run<B: Backend>(
        &self,
        backend: &mut B,
        act: DType,
        end: End,
        (first, rows): (usize, usize),
    ) -> Vec<f32> {
        let weight = weight(backend, (&self.w, self.n, self.k), self.dtype, Layout::Nk, 1);
        let x = put(backend, act, &self.x[first * self.k..(first + rows) * self.k]);
        let bias = put(backend, act, &self.bias);
        let out_type = if matches!(end, End::Logits) { DType::F32 } else { act };
        let mut out = poisoned(backend, out_type, (rows + 1) * self.n);
        match end {
            End::Logits => {
                backend.logits(LogitsArgs { out: &mut out, x: &x, head: &weight, rows }).unwrap();
            }
            End::Linear { has_bias, function } => backend
                .linear(LinearArgs {
                    out: &mut out,
                    x: &x,
                    weight: &weight,
                    rows,
                    k_segments: K_SEGMENTS,
                    prologue: Prologue::None,
                    epilogue: Epilogue {
                        bias: has_bias.then_some(&bias),
                        then: function.map_or(Then::Store, Then::Activate),
                    },
                })
                .unwrap(),
        }
        let mut out = get(backend, &out);
        assert_untouched("a product", &out, rows * self.n);
        out.truncate(rows * self.n);
        out
    }
}

#[test]
fn own_kernels_and_the_library_give_what_the_cpu_gives() {
    const TEST: &str = "own_kernels_and_the_library_give_what_the_cpu_gives";
    let (mut cpu, mut random) = (cpu(), Random::new());
    let shapes = [(104, 64), (777, 1032), (2304, 768), (96, 3072), (77, 33)];
    for gemm in [GemmChoice::Own, GemmChoice::Library] {
        if gemm == GemmChoice::Library && !has_library(TEST) {
            return;
        }
        let Some((_one, mut gpu)) = gpu_with(TEST, CudaOptions { gemm, ..options(None) }) else { return };
        for (i, rows) in [5, 64, 65, 77, 128, 129, 257, 300, 385, 1025].into_iter().enumerate() {
            for (j, (n, k)) in shapes.into_iter().enumerate() {
                let product = Product::new(&mut random, (rows, n, k), TYPES[(i + j) % 2]);
                for end in [ENDS[(i + j) % 8], ENDS[(i + j + 3) % 8]] {
                    let what = format!("{gemm:?}, {} {rows} rows, {n} x {k}, {end:?}", product.dtype);
                    let before = gpu.n_products_of_library();
                    let found = product.run(&mut gpu, product.dtype, end, (0, rows));
                    let by_library = gpu.n_products_of_library() - before;
                    let expected = product.run(&mut cpu, DType::F32, end, (0, rows));
                    // The library adds in an order of its own: random errors of k sums in f32.
                    let of_sums =
                        if by_library > 0 { 4.0 * (k as f64).sqrt() * 2.0_f64.powi(-24) } else { 2e-6 };
                    let most = if matches!(end, End::Logits) { of_sums } else { bound(product.dtype) };
                    assert_near(&what, &found, &expected, most);
                    let may = gemm == GemmChoice::Library && end.is_for_library();
                    // What is not aligned the library may refuse.
                    let must = may && rows > 64 && n % 8 == 0 && k % 8 == 0;
                    assert!(by_library <= u64::from(may) && by_library >= u64::from(must), "{what}");
                }
            }
        }
    }
}

#[test]
fn products_that_append_to_the_cache_are_never_the_librarys() {
    let choice = CudaOptions { gemm: GemmChoice::Library, ..options(None) };
    let test = "products_that_append_to_the_cache_are_never_the_librarys";
    let Some((_one, mut gpu)) = gpu_with(test, choice) else { return };
    let (rows, d, dtype) = (90, 256, DType::BF16);
    let product = Product::new(&mut Random::new(), (rows, 3 * d, d), dtype);
    let layout = KvLayout { n_layers_local: 1, n_kv_heads_local: 4, d_head: 64, dtype, block_size: 16 };
    let weight = weight(&mut gpu, (&product.w, 3 * d, d), dtype, Layout::Nk, 3);
    let (x, bias) = (put(&mut gpu, dtype, &product.x), put(&mut gpu, dtype, &product.bias));
    let slots = ints(&mut gpu, &(0..rows as i32).collect::<Vec<_>>());
    let cache = vec![7.0; 6 * layout.block_len()];
    let mut kv = KvLayer { k: put(&mut gpu, dtype, &cache), v: put(&mut gpu, dtype, &cache) };
    let mut out = poisoned(&mut gpu, dtype, rows * 3 * d);
    gpu.linear(LinearArgs {
        out: &mut out,
        x: &x,
        weight: &weight,
        rows,
        k_segments: K_SEGMENTS,
        prologue: Prologue::None,
        epilogue: Epilogue {
            bias: Some(&bias),
            then: Then::AppendKv(AppendKv { kv: &mut kv, layout, slots: &slots }),
        },
    })
    .unwrap();
    assert_eq!(gpu.n_products_of_library(), 0);
    let (out, keys) = (get(&mut gpu, &out), get(&mut gpu, &kv.k));
    // Row 17, head 2: page 1, slot 1.
    let (page, key) = (layout.block_len(), &out[17 * 3 * d + d + 2 * 64..][..64]);
    assert_eq!(&keys[page + (2 * 16 + 1) * 64..][..64], key);
}

#[test]
fn what_was_tuned_once_is_not_measured_again() {
    const TEST: &str = "what_was_tuned_once_is_not_measured_again";
    let Some((one, warm)) = gpu(TEST) else { return };
    drop((warm, one));
    if !has_library(TEST) {
        return;
    }
    let (mut cpu, mut random, dir) = (cpu(), Random::new(), tempfile::tempdir().unwrap());
    let products = [
        (Product::new(&mut random, (512, 2304, 768), DType::BF16), ENDS[2]),
        (Product::new(&mut random, (512, 1000, 520), DType::F16), ENDS[0]),
        (Product::new(&mut random, (512, 1009, 256), DType::BF16), ENDS[7]),
    ];
    let shapes: Vec<_> = products.iter().map(|(product, end)| end.shape(product)).collect();
    let tuned = || own_folder(dir.path(), GemmChoice::Measured);
    let (hash, path) = {
        let Some((_one, mut gpu)) = gpu_with(TEST, tuned()) else { return };
        let report = gpu.tune_shapes(&shapes, 300).unwrap();
        assert_eq!((report.n_measured, report.n_kept, report.n_without_memory), (9, 0, 0));
        assert_eq!(report.plans.len(), 9);
        for (key, plan) in &report.plans {
            assert!(plan.own_us > 0.5 && plan.own_us < 1e6, "{key:?}: {plan:?}");
            // Products as these the library has an algorithm for.
            assert!(key.shape.n % 8 != 0 || plan.library.is_some(), "{key:?}: {plan:?}");
        }
        let again = gpu.tune_shapes(&shapes, 300).unwrap();
        assert_eq!((again.n_measured, again.n_kept), (0, 9));
        (report.hash.unwrap(), report.path.unwrap())
    };
    let written = fs::read(&path).unwrap();
    let digest = format!("{:x}", Sha256::digest(&written));
    assert_eq!(hash, digest);
    let Some((_one, mut gpu)) = gpu_with(TEST, tuned()) else { return };
    let report = gpu.tune_shapes(&shapes, 300).unwrap();
    assert_eq!((report.n_measured, report.n_kept), (0, 9));
    assert_eq!((report.hash.as_ref(), fs::read(&path).unwrap()), (Some(&hash), written));
    // The plans are followed: between their rows too, and not beyond them.
    for ((product, end), shape) in products.iter().zip(&shapes) {
        for rows in [65, 128, 201, 257, 300, 385, 512] {
            let before = gpu.n_products_of_library();
            let found = product.run(&mut gpu, product.dtype, *end, (0, rows));
            let by_library = gpu.n_products_of_library() > before;
            let last = bucket(rows).unwrap();
            let plan = report.plans.iter().find(|(key, _)| key.shape == *shape && key.rows == last).unwrap();
            assert_eq!(by_library, plan.1.winner() != Winner::Own, "{rows} rows: {plan:?}");
            let expected = product.run(&mut cpu, DType::F32, *end, (0, rows));
            let most = if matches!(end, End::Logits) { 2e-6 } else { bound(product.dtype) };
            assert_near(&format!("{rows} rows of {shape:?}"), &found, &expected, most);
        }
        let before = gpu.n_products_of_library();
        let x = product.x.repeat(2);
        let more = Product { x, w: product.w.clone(), bias: product.bias.clone(), ..*product };
        more.run(&mut gpu, more.dtype, *end, (0, 513));
        assert_eq!(gpu.n_products_of_library(), before, "513 rows have no plan");
    }
}

#[test]
fn a_damaged_file_of_plans_is_measured_anew() {
    const TEST: &str = "a_damaged_file_of_plans_is_measured_anew";
    let Some((one, warm)) = gpu(TEST) else { return };
    drop((warm, one));
    if !has_library(TEST) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let product = Product::new(&mut Random::new(), (128, 1024, 512), DType::BF16);
    let shapes = [ENDS[1].shape(&product)];
    let tune = || {
        let options = own_folder(dir.path(), GemmChoice::Measured);
        let (_one, mut gpu) = gpu_with(TEST, options).unwrap();
        gpu.tune_shapes(&shapes, 128).unwrap()
    };
    let report = tune();
    assert_eq!(report.n_measured, 1);
    let path = report.path.unwrap();
    let sound = fs::read_to_string(&path).unwrap();
    let algo = sound.split('"').find(|word| word.len() == 128).expect("an algorithm of the library's");
    let damaged = [
        sound[..sound.len() - 20].to_owned(),
        "\0".repeat(1000),
        sound.replace(algo, &algo[1..]),
        // Digits as they should be, of an algorithm that there is not.
        sound.replace(algo, &"f".repeat(128)),
    ];
    for text in damaged {
        fs::write(&path, &text).unwrap();
        let report = tune();
        assert_eq!((report.n_measured, report.n_kept), (1, 0), "{text:.200}");
        assert_eq!((tune().n_measured, tune().n_kept), (0, 1));
    }
}

#[test]
fn a_row_has_the_same_bits_whoever_shares_its_bucket() {
    const TEST: &str = "a_row_has_the_same_bits_whoever_shares_its_bucket";
    let Some((one, warm)) = gpu(TEST) else { return };
    drop((warm, one));
    if !has_library(TEST) {
        return;
    }
    let (mut random, dir) = (Random::new(), tempfile::tempdir().unwrap());
    let Some((_one, mut gpu)) = gpu_with(TEST, own_folder(dir.path(), GemmChoice::Library)) else { return };
    for (i, (n, k)) in [(2304, 768), (4096, 1024), (520, 4096)].into_iter().enumerate() {
        let (dtype, end) = (TYPES[i % 2], ENDS[i]);
        let product = Product::new(&mut random, (1024, n, k), dtype);
        gpu.tune_shapes(&[end.shape(&product)], 1024).unwrap();
        for last in [128, 256, 512, 1024] {
            let before = gpu.n_products_of_library();
            let all = product.run(&mut gpu, dtype, end, (0, last));
            assert_eq!(gpu.n_products_of_library(), before + 1, "{last} rows of {n} x {k}");
            let fewest = first_of_bucket(last);
            for rows in [fewest, fewest + 1, fewest + random.below(last - fewest), last - 1] {
                // In another place as well.
                let first = random.below(last - rows + 1);
                let found = product.run(&mut gpu, dtype, end, (first, rows));
                assert!(found == all[first * n..(first + rows) * n], "{rows} of {last} rows, {n} x {k}");
            }
        }
    }
}

#[test]
fn a_graph_of_the_librarys_products_gives_their_bits() {
    const TEST: &str = "a_graph_of_the_librarys_products_gives_their_bits";
    if !has_library(TEST) {
        return;
    }
    let choice = CudaOptions { gemm: GemmChoice::Library, ..options(None) };
    let Some((_one, mut gpu)) = gpu_with(TEST, choice) else { return };
    let (rows, n, k, dtype) = (100, 3072, 768, DType::BF16);
    let product = Product::new(&mut Random::new(), (rows, n, k), dtype);
    let first = weight(&mut gpu, (&product.w, n, k), dtype, Layout::Nk, 1);
    let turned: Vec<f32> = product.w.iter().rev().copied().collect();
    let second = weight(&mut gpu, (&turned, k, n), dtype, Layout::Nk, 1);
    let (x, bias) = (put(&mut gpu, dtype, &product.x), put(&mut gpu, dtype, &product.bias));
    let (mut wide, mut out) = (poisoned(&mut gpu, dtype, rows * n), poisoned(&mut gpu, dtype, rows * k));
    let mut steps = |gpu: &mut CudaBackend| {
        gpu.linear(LinearArgs {
            out: &mut wide,
            x: &x,
            weight: &first,
            rows,
            k_segments: K_SEGMENTS,
            prologue: Prologue::None,
            epilogue: Epilogue { bias: Some(&bias), then: Then::Activate(Activation::GeluTanh) },
        })?;
        gpu.linear(LinearArgs {
            out: &mut out,
            x: &wide,
            weight: &second,
            rows,
            k_segments: K_SEGMENTS,
            prologue: Prologue::None,
            epilogue: Epilogue { bias: None, then: Then::Store },
        })
    };
    steps(&mut gpu).unwrap();
    assert_eq!(gpu.n_products_of_library(), 2);
    let graph = gpu.capture(&mut steps).unwrap().unwrap();
    let eager = get(&mut gpu, &out);
    assert!(eager.iter().all(|x| x.is_finite()));
    gpu.upload(&mut out, 0, &vec![0xff; rows * k * 2]).unwrap();
    gpu.replay(&graph, &[]).unwrap();
    assert!(eager == get(&mut gpu, &out), "the graph's bits are others");
}

#[test]
fn own_kernels_compute_where_the_library_is_not_there_or_not_wanted() {
    const TEST: &str = "own_kernels_compute_where_the_library_is_not_there_or_not_wanted";
    let Some((one, warm)) = gpu(TEST) else { return };
    drop((warm, one));
    let dir = tempfile::tempdir().unwrap();
    let libraries = without_cublas_lt(dir.path()).unwrap();
    assert!(libraries.cublas_lt().is_err(), "cuBLASLt was to be hidden");
    let (mut cpu, mut random) = (cpu(), Random::new());
    let product = Product::new(&mut random, (130, 1024, 512), DType::BF16);
    let expected = product.run(&mut cpu, DType::F32, ENDS[2], (0, 130));
    for (gemm, is_hidden) in
        [(GemmChoice::Library, true), (GemmChoice::Measured, true), (GemmChoice::Own, false)]
    {
        let shared = options(None);
        let libraries = if is_hidden { Arc::clone(&libraries) } else { Arc::clone(&shared.libraries) };
        let Some((_one, mut gpu)) = gpu_with(TEST, CudaOptions { libraries, gemm, ..shared }) else { return };
        let report = gpu.tune_shapes(&[ENDS[2].shape(&product)], 512).unwrap();
        assert_eq!((report.n_measured, report.library, report.hash), (0, None, None), "{gemm:?}");
        let found = product.run(&mut gpu, product.dtype, ENDS[2], (0, 130));
        assert_near(&format!("{gemm:?}"), &found, &expected, bound(product.dtype));
        assert_eq!(gpu.n_products_of_library(), 0);
    }
}
