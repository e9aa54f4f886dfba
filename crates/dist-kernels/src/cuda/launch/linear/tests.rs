//! Every launch of `gemm_hopper` that a rule could choose, against the general kernel.

use std::sync::Arc;

use dist_core::philox::{NormalTable, stream_key};
use half::bf16;

use super::*;
use crate::backend::Backend;
use crate::cuda::CudaOptions;
use crate::cuda::cache::KernelCache;
use crate::cuda::gemms::GemmChoice;
use crate::cuda::staging::StagingOptions;
use crate::cuda::test_support::{Gpu, libraries, skip};

/// What no product gives.
const POISON: u8 = 0x7B;

/// Rows, outputs, inputs, and whether outputs are f32: tiles that are full and not, stages of k that all parts have alike and
/// not, one and more of them than a ring holds.
const SHAPES: [(usize, usize, usize, bool); 6] = [
    (65, 40, 64, false),
    (130, 777, 200, false),
    (300, 520, 1032, true),
    (129, 160, 2048, false),
    (256, 384, 3080, false),
    (700, 328, 520, true),
];

struct Case {
    shape: ProductShape,
    rows: usize,
    x: CudaBuf,
    /// The same rows, the last one first.
    turned: CudaBuf,
    weight: CudaBuf,
    bias: CudaBuf,
}

fn numbers(name: &str, std_dev: f64, len: usize) -> Vec<bf16> {
    let (table, key) = (NormalTable::new(std_dev), stream_key(7, name));
    let eights = (0..len.div_ceil(8) as u64).flat_map(|group| table.eight(key, group).map(bf16::from_f32));
    eights.take(len).collect()
}

impl Case {
    fn new(gpu: &mut CudaBackend, (rows, n, k, out_f32): (usize, usize, usize, bool)) -> Result<Self> {
        let mut upload = |name: &str, values: &[bf16]| {
            let mut buf = gpu.alloc(name, DType::BF16, values.len())?;
            gpu.upload(&mut buf, 0, bytemuck::cast_slice(values))?;
            Ok::<_, crate::KernelError>(buf)
        };
        let x = numbers("x", 1.0, rows * k);
        let turned: Vec<bf16> = x.chunks(k).rev().flatten().copied().collect();
        let epilogue = if out_f32 {
            EpilogueKind::None
        } else {
            EpilogueKind::of(true, Some(Activation::GeluTanh)).expect("the library has it")
        };
        Ok(Self {
            shape: ProductShape { n, k, ld: k, dtype: DType::BF16, out_f32, epilogue },
            rows,
            x: upload("x", &x)?,
            turned: upload("turned", &turned)?,
            weight: upload("weight", &numbers("weight", 0.05, n * k))?,
            bias: upload("bias", &numbers("bias", 1.0, n))?,
        })
    }

    /// The outputs of all rows, by `multiply`.
    fn run(
        &self,
        gpu: &mut CudaBackend,
        x: &CudaBuf,
        multiply: impl FnOnce(&mut CudaBackend, &Product) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let ProductShape { n, out_f32, .. } = self.shape;
        let n_bytes = self.rows * n * self.shape.out_bytes();
        // What lies behind must stay.
        let mut found = vec![POISON; n_bytes + 64];
        let mut out = gpu.alloc("out", DType::U8, found.len())?;
        gpu.upload(&mut out, 0, &found)?;
        let bias = if out_f32 { 0 } else { self.bias.address() };
        let (x, weight) = (x.address(), self.weight.address());
        let operands = Operands { out: out.address(), x, weight, bias };
        multiply(gpu, &Product::of(&self.shape, &operands, self.rows))?;
        gpu.download(&out, 0, &mut found)?;
        assert!(found[n_bytes..].iter().all(|&byte| byte == POISON), "{:?}: behind the outputs", self.shape);
        found.truncate(n_bytes);
        Ok(found)
    }

    fn values(&self, bytes: &[u8]) -> Vec<f32> {
        if self.shape.out_f32 {
            bytes.chunks(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect()
        } else {
            bytes.chunks(2).map(|two| bf16::from_le_bytes([two[0], two[1]]).to_f32()).collect()
        }
    }
}

/// The GPU, as long as the first value is kept.
fn backend(test: &str) -> Option<(Gpu, CudaBackend)> {
    let one = Gpu::find(test)?;
    let cache = std::env::var_os("DIST_KERNEL_CACHE").map(std::path::PathBuf::from);
    let cache = KernelCache::new(cache.unwrap_or_else(|| std::env::temp_dir().join("dist-kernel-cache")));
    let staging = StagingOptions { n_readers: 1, chunk_bytes: 1 << 20, n_buffers: 1 };
    let (libraries, gemm) = (Arc::new(libraries()), GemmChoice::Own);
    let options = CudaOptions { libraries, cache, ordinal: 0, cast: None, staging, gemm };
    Some((one, CudaBackend::new(options).expect("the GPU was found before")))
}

/// The largest error of sums of `k` products of such numbers, of which bf16 keeps eight bits. A stage that is left out or
/// taken twice is off by 0.4.
fn most(k: usize, expected: f32, out_f32: bool) -> f32 {
    let of_sums = 0.05 * k as f32 * 2.0_f32.powi(-24) * 32.0;
    of_sums + if out_f32 { 0.0 } else { expected.abs() * 2.0_f32.powi(-7) + 1e-3 }
}

#[test]
fn every_launch_of_gemm_hopper_gives_what_the_general_kernel_gives() {
    let test = "every_launch_of_gemm_hopper_gives_what_the_general_kernel_gives";
    let Some((_one, mut gpu)) = backend(test) else { return };
    let chip = Chip::of(gpu.context.info());
    if !chip.is_hopper {
        return skip(test, "the GPU is not a Hopper");
    }
    for shape in SHAPES {
        let case = Case::new(&mut gpu, shape).expect("memory");
        let (rows, n, k, out_f32) = shape;
        let general = case.run(&mut gpu, &case.x, CudaBackend::multiply_tiles).expect("it runs");
        let expected = case.values(&general);
        let mut n_launches = 0;
        for (launch, _) in choice::gemm_launches((rows, n, k), chip) {
            let run = |gpu: &mut CudaBackend, x| {
                case.run(gpu, x, |gpu, product| gpu.multiply_tiles_as(product, &launch)).expect("it runs")
            };
            let (found, turned) = (run(&mut gpu, &case.x), run(&mut gpu, &case.turned));
            for (i, (found, expected)) in case.values(&found).iter().zip(&expected).enumerate() {
                let error = (found - expected).abs();
                assert!(error <= most(k, *expected, out_f32), "{launch:?}: {i} is {found}, not {expected}");
            }
            let row_bytes = found.len() / rows;
            let back: Vec<u8> = turned.chunks(row_bytes).rev().flatten().copied().collect();
            assert!(found == back, "{launch:?}: the bits of a row depend on its place");
            n_launches += 1;
        }
        assert!(n_launches > 10, "{shape:?}: {n_launches} launches");
    }
}
