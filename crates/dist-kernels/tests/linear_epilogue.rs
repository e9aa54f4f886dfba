//! What `linear` does on its way in and out: norm, bias, activation, keys and values into the cache.

use std::time::Duration;

use dist_core::{DType, KvLayout};
use dist_kernels::args::{
    Activation, AddBiasArgs, AddBiasNormArgs, AppendKv, Epilogue, KvLayer, LinearArgs, Norm, Prologue,
    Residual, Then,
};
use dist_kernels::backend::Backend as _;
use dist_kernels::cpu::{CpuBackend, CpuBuf, CpuOptions, CpuPath};
use dist_kernels::error::KernelError;
use dist_kernels::weight::{Buffer as _, HostBytes, HostPart, HostWeight, Layout, Weight};
use half::{bf16, f16};

const D_HEAD: usize = 4;
const N_KV_HEADS: usize = 3;
const N: usize = 3 * N_KV_HEADS * D_HEAD;
const K: usize = 20;

fn backend() -> CpuBackend {
    let spin = Duration::from_micros(20);
    CpuBackend::new(CpuOptions { threads: 3, path: CpuPath::Auto, spin }).expect("sound inputs")
}

fn floats(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 31 + seed * 7) % 53) as f32 / 16.0 - 1.5).collect()
}

fn buf(n: usize, seed: usize) -> CpuBuf {
    CpuBuf::from_slice("test", &floats(n, seed)).expect("sound inputs")
}

fn weight(backend: &mut CpuBackend) -> Weight<CpuBuf> {
    let bytes: Vec<u8> = floats(N * K, 1).into_iter().flat_map(f32::to_le_bytes).collect();
    let part = HostPart { bytes: HostBytes::new(bytes), offset: 0, n: N, ld: K };
    backend
        .prepare(HostWeight { parts: vec![part], dtype: DType::F32, layout: Layout::Nk, k: K })
        .expect("sound inputs")
}

fn run(
    backend: &mut CpuBackend,
    weight: &Weight<CpuBuf>,
    x: &CpuBuf,
    prologue: Prologue<'_, CpuBackend>,
    epilogue: Epilogue<'_, CpuBackend>,
) -> CpuBuf {
    let rows = x.slice::<f32>().len() / K;
    let mut out = CpuBuf::from_slice("out", &vec![f32::NAN; rows * N]).expect("sound inputs");
    let args = LinearArgs { out: &mut out, x, weight, rows, k_segments: 8, prologue, epilogue };
    backend.linear(args).expect("sound inputs");
    out
}

fn plain(backend: &mut CpuBackend, weight: &Weight<CpuBuf>, x: &CpuBuf) -> CpuBuf {
    run(backend, weight, x, Prologue::None, Epilogue { bias: None, then: Then::Store })
}

fn bits(buf: &CpuBuf) -> Vec<u32> {
    buf.slice::<f32>().iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_bias_in_the_epilogue_is_a_bias_afterwards() {
    let mut backend = backend();
    let weight = weight(&mut backend);
    let halves: Vec<bf16> = floats(N, 5).into_iter().map(bf16::from_f32).collect();
    for bias in [buf(N, 5), CpuBuf::from_slice("bias", &halves).expect("sound inputs")] {
        for rows in [1, 2, 7, 40] {
            let x = buf(rows * K, rows);
            let epilogue = Epilogue { bias: Some(&bias), then: Then::Store };
            let fused = run(&mut backend, &weight, &x, Prologue::None, epilogue);
            let mut apart = plain(&mut backend, &weight, &x);
            backend.add_bias(AddBiasArgs { x: &mut apart, bias: &bias, rows, n: N }).expect("sound inputs");
            assert_eq!(bits(&fused), bits(&apart), "{rows} rows");
        }
    }
}

#[test]
fn an_activation_follows_the_bias() {
    let mut backend = backend();
    let weight = weight(&mut backend);
    let bias = buf(N, 9);
    for rows in [1, 5] {
        let x = buf(rows * K, rows);
        let store = Epilogue { bias: Some(&bias), then: Then::Store };
        let sums = run(&mut backend, &weight, &x, Prologue::None, store);
        let relu = Epilogue { bias: Some(&bias), then: Then::Activate(Activation::Relu) };
        let relu = run(&mut backend, &weight, &x, Prologue::None, relu);
        let want: Vec<u32> = sums.slice::<f32>().iter().map(|x| x.max(0.0).to_bits()).collect();
        assert_eq!(bits(&relu), want);
        let gelu = Epilogue { bias: Some(&bias), then: Then::Activate(Activation::GeluErf) };
        let gelu = run(&mut backend, &weight, &x, Prologue::None, gelu);
        for (gelu, &x) in gelu.slice::<f32>().iter().zip(sums.slice::<f32>()) {
            // Between 0 and x, and x itself far from zero: what any GELU does, whatever its formula.
            assert!(gelu.abs() <= x.abs() && (x < 6.0 || gelu.to_bits() == x.to_bits()), "{gelu} of {x}");
        }
    }
}

#[test]
fn a_norm_in_the_prologue_is_a_norm_before() {
    let mut backend = backend();
    let weight = weight(&mut backend);
    let (gain, shift) = (buf(K, 2), buf(K, 3));
    for rows in [1, 3, 33] {
        let x = buf(rows * K, rows);
        let norm = || Norm::Layer { weight: &gain, bias: &shift, eps: 1e-5 };
        let epilogue = Epilogue { bias: None, then: Then::Store };
        let fused = run(&mut backend, &weight, &x, Prologue::Norm(norm()), epilogue);
        let (mut normed, mut residual) = (buf(rows * K, 0), buf(rows * K, rows));
        let args = AddBiasNormArgs {
            normed: &mut normed,
            residual: &mut residual,
            delta: None,
            bias: None,
            norm: norm(),
            keep: Residual::Sum,
            rows,
            d: K,
        };
        backend.add_bias_norm(args).expect("sound inputs");
        assert_eq!(bits(&fused), bits(&plain(&mut backend, &weight, &normed)), "{rows} rows");
    }
}

/// Slots in any order, in several blocks; padding rows and untouched slots keep what the cache held.
#[test]
fn keys_and_values_go_to_their_slots() {
    let mut backend = backend();
    let weight = weight(&mut backend);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for rows in [1, 4, 20] {
            let layout = KvLayout {
                n_layers_local: 1,
                n_kv_heads_local: N_KV_HEADS,
                d_head: D_HEAD,
                dtype,
                block_size: 4,
            };
            let slots: Vec<i32> =
                (0..rows).map(|row| if row % 3 == 1 { -1 } else { (row * 7 % 24) as i32 }).collect();
            let slot_buf = CpuBuf::from_slice("slots", &slots).expect("sound inputs");
            let mut empty = || backend.alloc("cache", dtype, 6 * layout.block_len()).expect("sound inputs");
            let mut kv = KvLayer { k: empty(), v: empty() };
            let x = buf(rows * K, rows);
            let then = Then::AppendKv(AppendKv { kv: &mut kv, layout, slots: &slot_buf });
            let out = run(&mut backend, &weight, &x, Prologue::None, Epilogue { bias: None, then });
            assert_eq!(bits(&out), bits(&plain(&mut backend, &weight, &x)), "q | k | v is written as well");
            for (cache, first) in [(&kv.k, N / 3), (&kv.v, 2 * N / 3)] {
                for slot in 0..24 {
                    let row = slots.iter().position(|&at| at == slot as i32);
                    for column in 0..N_KV_HEADS * D_HEAD {
                        let want = row.map_or(0.0, |row| out.slice::<f32>()[row * N + first + column]);
                        let at = layout.at(slot, column / D_HEAD) + column % D_HEAD;
                        assert_eq!(
                            stored(cache, at),
                            rounded(want, dtype),
                            "{dtype} slot {slot} column {column}"
                        );
                    }
                }
            }
        }
    }
}

fn stored(cache: &CpuBuf, at: usize) -> u32 {
    match cache.dtype() {
        DType::F16 => cache.slice::<f16>()[at].to_f32().to_bits(),
        DType::BF16 => cache.slice::<bf16>()[at].to_f32().to_bits(),
        _ => cache.slice::<f32>()[at].to_bits(),
    }
}

fn rounded(x: f32, dtype: DType) -> u32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32().to_bits(),
        DType::BF16 => bf16::from_f32(x).to_f32().to_bits(),
        _ => x.to_bits(),
    }
}

#[test]
fn a_weight_that_cannot_be_is_refused() {
    let mut backend = backend();
    let host = |dtype, offset, ld| {
        let part = HostPart { bytes: HostBytes::new(vec![0_u8; 400]), offset, n: 10, ld };
        HostWeight { parts: vec![part], dtype, layout: Layout::Nk, k: 10 }
    };
    assert!(backend.prepare(host(DType::F32, 0, 10)).is_ok());
    assert!(matches!(backend.prepare(host(DType::U32, 0, 10)), Err(KernelError::WeightType { .. })));
    for (offset, ld) in [(1, 10), (0, 11), (0, 9), (usize::MAX, 10), (0, usize::MAX)] {
        let error = backend.prepare(host(DType::F32, offset, ld)).unwrap_err();
        assert!(matches!(error, KernelError::HostRange { .. }), "{offset} {ld}: {error}");
    }
}
