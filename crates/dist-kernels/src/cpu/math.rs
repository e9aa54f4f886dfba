//! Elementary functions and activations, eight lanes at a time; an element's result does not depend on its place.
//!
//! Largest errors against `f64`, measured by the tests below over every 509th float of the whole range: `exp` 0.98 ulp
//! (subnormal results included), `erf` 0.97 ulp.

use super::simd::{LANES, Simd};
use crate::args::Activation;

/// `eˣ`.
///
/// Source: Moshier, Cephes `expf` (range reduction by n·ln 2 in two parts, polynomial of degree 5), with fused
/// multiply-adds and the power of two applied in two factors, so that results fade into subnormals.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // Beyond these bounds the result is 0 or ∞. The operands stand such that NaN passes.
    let x = s.min(s.splat(89.0), s.max(s.splat(-104.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let p =
        polynomial(s, r, &[1.987_569_2e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]);
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let n = s.to_int(n);
    let half = s.shr::<1>(n);
    s.mul(s.mul(p, power_of_two(s, half)), power_of_two(s, s.sub_int(n, half)))
}

/// `2ⁿ` for n in −126..=127.
#[inline(always)]
fn power_of_two<S: Simd>(s: S, n: S::I) -> S::V {
    s.float_of(s.shl::<23>(s.add_int(n, s.splat_int(127))))
}

/// Horner's scheme, highest power first.
#[inline(always)]
fn polynomial<S: Simd>(s: S, x: S::V, coefficients: &[f32]) -> S::V {
    let mut sum = s.splat(coefficients[0]);
    for &c in &coefficients[1..] {
        sum = s.fma(sum, x, s.splat(c));
    }
    sum
}

/// The error function.
///
/// Source: N. Juffa, <https://stackoverflow.com/a/35148199> (two minimax polynomials, the outer one in the exponent).
#[inline(always)]
pub(super) fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    let (t, square) = (s.abs(x), s.mul(x, x));
    let inner = polynomial(
        s,
        square,
        &[-5.967_617e-4, 4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1],
    );
    let inner = s.fma(inner, x, x);
    // Beyond 4 the result rounds to one; the bound keeps infinities out of the polynomial. NaN passes.
    let t = s.min(s.splat(4.0), t);
    let square = s.mul(t, t);
    let even = s.fma(s.splat(-3.883_964_4e-3), t, s.splat(2.425_462_2e-2));
    let odd = s.fma(s.splat(-1.728_534_7e-5), t, s.splat(3.831_971_3e-4));
    let outer = s.fma(odd, square, even);
    let outer = s.fma(outer, t, s.splat(-1.067_778_8e-1));
    let outer = s.fma(outer, t, s.splat(-6.348_467e-1));
    let outer = s.fma(outer, t, s.splat(-1.287_175_1e-1));
    let outer = s.fma(outer, t, s.sub(s.zero(), t));
    let outer = s.copysign(s.sub(s.splat(1.0), exp(s, outer)), x);
    s.select(s.gt(t, s.splat(0.927_734_4)), outer, inner)
}

/// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, computed as `x / (1 + exp(−2 …))`, which keeps the left tail exact.
#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    const TWO_ROOT: f32 = 1.595_769; // 2 √(2/π)
    let cubic = s.fma(s.mul(s.mul(x, x), s.splat(0.044_715)), x, x);
    s.div(x, s.add(s.splat(1.0), exp(s, s.mul(cubic, s.splat(-TWO_ROOT)))))
}

/// `x/2 · (1 + erf(x/√2))`.
#[inline(always)]
fn gelu_erf<S: Simd>(s: S, x: S::V) -> S::V {
    let erf = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.mul(s.mul(x, s.splat(0.5)), s.add(s.splat(1.0), erf))
}

/// One vector of an activation.
#[inline(always)]
pub(super) fn activation<S: Simd>(s: S, activation: Activation, x: S::V) -> S::V {
    match activation {
        Activation::GeluTanh => gelu_tanh(s, x),
        Activation::GeluErf => gelu_erf(s, x),
        Activation::Relu => s.max(s.zero(), x),
    }
}

/// Applies an activation to every element of `xs`, for the epilogue of `linear`.
#[inline(always)]
pub(super) fn activate<S: Simd>(s: S, function: Activation, xs: &mut [f32]) {
    let (whole, rest) = xs.as_chunks_mut::<LANES>();
    for x in whole {
        *x = s.to_array(activation(s, function, s.lanes(*x)));
    }
    if !rest.is_empty() {
        s.store_partial(activation(s, function, s.load_partial(rest)), rest);
    }
}

#[cfg(test)]
mod tests;
