//! The two implementations of the lanes, operation by operation, bit by bit.

use half::{bf16, f16};

use super::*;

/// Numbers at the edges of every operation.
const EDGES: [f32; 24] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    -0.5,
    1.5,
    2.5,
    -2.5,
    1e-45,
    -1e-40,
    f32::MIN_POSITIVE,
    f32::MAX,
    f32::MIN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    2_147_483_648.0,
    -2_147_483_648.0,
    2_147_483_520.0,
    3.402_823e38,
    1.000_000_1,
    -7.25,
    0.1,
];

/// Runs every operation on three vectors and lists the bits of the results.
struct Everything([[f32; LANES]; 3]);

impl Kernel for Everything {
    type Out = Vec<[u32; LANES]>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let [a, b, c] = self.0.map(|lanes| s.lanes(lanes));
        let truth = |mask| s.select(mask, s.splat(1.0), s.splat(0.0));
        let int = |i| s.float_of(i);
        let mut out = vec![
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.fma(a, b, c),
            s.max(a, b),
            s.min(a, b),
            s.abs(a),
            s.copysign(a, b),
            s.round(a),
            truth(s.gt(a, b)),
            s.select(s.gt(a, b), b, c),
            int(s.to_int(a)),
            int(s.add_int(s.to_int(a), s.splat_int(127))),
            int(s.sub_int(s.to_int(a), s.splat_int(-3))),
            int(s.shl::<23>(s.to_int(a))),
            int(s.shr::<4>(s.to_bits(a))),
            s.sum_each([a, b, c, a, b, c, s.add(a, b), s.sub(a, c)]),
            s.splat(s.sum(a)),
            s.load_partial(&self.0[0][..3]),
        ];
        out.extend(s.transpose([a, b, c, b, a, c, b, s.zero()]));
        out.into_iter().map(|v| s.to_array(v).map(canonical)).collect()
    }
}

/// The bits of a number; all NaNs are one.
fn canonical(x: f32) -> u32 {
    if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }
}

fn both(kernel: impl Fn() -> Everything) {
    let fast = CpuKernels::new(CpuPath::Auto).unwrap();
    let plain = CpuKernels::new(CpuPath::Portable).unwrap();
    println!("path: {} against {}", fast.name(), plain.name());
    assert_eq!(fast.run(kernel()), plain.run(kernel()));
}

#[test]
fn every_operation_gives_the_same_bits_on_both_paths() {
    for shift_b in 0..EDGES.len() {
        for shift_c in 0..3 {
            let lanes = |shift: usize, i: usize| EDGES[(i * 3 + shift) % EDGES.len()];
            both(|| {
                Everything([
                    std::array::from_fn(|i| lanes(shift_c, i)),
                    std::array::from_fn(|i| lanes(shift_b, i)),
                    std::array::from_fn(|i| lanes(shift_b + 7 * shift_c, i)),
                ])
            });
        }
    }
}

proptest::proptest! {
    #[test]
    fn random_bits_give_the_same_bits_on_both_paths(bits in proptest::array::uniform24(0_u32..)) {
        let at = |row: usize| std::array::from_fn(|i| f32::from_bits(bits[row * LANES + i]));
        both(|| Everything([at(0), at(1), at(2)]));
    }
}

/// Widens eight stored numbers.
struct Widen<'a>(&'a [u16; LANES], DType);

impl Kernel for Widen<'_> {
    type Out = [u32; LANES];

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Out {
        let p = self.0.as_ptr().cast();
        // SAFETY: the array holds eight 16-bit numbers.
        let v = unsafe {
            match self.1 {
                DType::F16 => StoredF16::load(s, p),
                _ => StoredBf16::load(s, p),
            }
        };
        s.to_array(v).map(canonical)
    }
}

#[test]
fn every_stored_number_is_widened_exactly() {
    let (fast, plain) =
        (CpuKernels::new(CpuPath::Auto).unwrap(), CpuKernels::new(CpuPath::Portable).unwrap());
    for base in (0..=u16::MAX).step_by(LANES) {
        let bits: [u16; LANES] = std::array::from_fn(|i| base + i as u16);
        let f16s = bits.map(|bits| canonical(f16::from_bits(bits).to_f32()));
        let bf16s = bits.map(|bits| canonical(bf16::from_bits(bits).to_f32()));
        for kernels in [fast, plain] {
            assert_eq!(kernels.run(Widen(&bits, DType::F16)), f16s, "{} f16", kernels.name());
            assert_eq!(kernels.run(Widen(&bits, DType::BF16)), bf16s, "{} bf16", kernels.name());
        }
    }
}

#[test]
fn an_implementation_that_is_not_there_is_an_error() {
    let asked = CpuKernels::new(CpuPath::Avx2);
    let auto = CpuKernels::new(CpuPath::Auto).unwrap();
    assert_eq!(asked.is_ok(), auto.name() == "avx2");
}
