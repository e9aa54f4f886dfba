//! Philox4x32-10, a counter-based random generator: any element of any stream can be computed alone.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

use sha2::{Digest, Sha256};

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// Ten rounds of Philox4x32: 128 random bits, a function of `counter` and `key` only.
#[must_use]
#[inline]
pub const fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let p0 = M0 as u64 * counter[0] as u64;
        let p1 = M1 as u64 * counter[2] as u64;
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
        round += 1;
    }
    counter
}

/// A number in [0, 1) with 24 random bits, exact in `f32`.
#[must_use]
pub fn unit_f32(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// The key of a named stream: the first eight bytes of SHA-256 over the seed (little endian) and the name.
#[must_use]
pub fn stream_key(seed: u64, name: &str) -> [u32; 2] {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(name.as_bytes()).finalize();
    let word = |at: usize| u32::from_le_bytes([digest[at], digest[at + 1], digest[at + 2], digest[at + 3]]);
    [word(0), word(4)]
}

/// Draws from N(0, 1) by element number, quantised to the 65,536 midpoint quantiles (|z| ≤ 4.33).
///
/// One Philox call serves eight consecutive elements, a 16-bit index each, so that billions of weights take seconds.
#[derive(Clone, Debug)]
pub struct NormalTable {
    quantiles: Vec<f32>,
}

impl NormalTable {
    /// Builds the table of quantiles, 256 KiB, each scaled by `std_dev`.
    #[must_use]
    pub fn new(std_dev: f64) -> Self {
        let quantiles = (0..65_536)
            .map(|i| (inverse_normal_cdf((f64::from(i) + 0.5) / 65_536.0) * std_dev) as f32)
            .collect();
        Self { quantiles }
    }

    /// Element `index` of the stream with this key.
    #[must_use]
    pub fn at(&self, key: [u32; 2], index: u64) -> f32 {
        self.eight(key, index / 8)[(index % 8) as usize]
    }

    /// Elements `8 · group … 8 · group + 7` of the stream with this key.
    #[must_use]
    #[inline]
    pub fn eight(&self, key: [u32; 2], group: u64) -> [f32; 8] {
        let bits = philox4x32([group as u32, (group >> 32) as u32, 0, 0], key);
        std::array::from_fn(|i| self.quantiles[(bits[i / 2] >> (16 * (i % 2))) as usize & 0xFFFF])
    }
}

/// Inverse of the standard normal distribution function, relative error below 1.2e-9.
///
/// Source: P. J. Acklam, "An algorithm for computing the inverse normal cumulative distribution function" (2003).
/// `libm` computes logarithm and root, so that every platform gets the same bits.
fn inverse_normal_cdf(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969_683_028_665_376e1,
        2.209_460_984_245_205e2,
        -2.759_285_104_469_687e2,
        1.383_577_518_672_69e2,
        -3.066_479_806_614_716e1,
        2.506_628_277_459_239,
    ];
    const B: [f64; 5] = [
        -5.447_609_879_822_406e1,
        1.615_858_368_580_409e2,
        -1.556_989_798_598_866e2,
        6.680_131_188_771_972e1,
        -1.328_068_155_288_572e1,
    ];
    const C: [f64; 6] = [
        -7.784_894_002_430_293e-3,
        -3.223_964_580_411_365e-1,
        -2.400_758_277_161_838,
        -2.549_732_539_343_734,
        4.374_664_141_464_968,
        2.938_163_982_698_783,
    ];
    const D: [f64; 4] =
        [7.784_695_709_041_462e-3, 3.224_671_290_700_398e-1, 2.445_134_137_142_996, 3.754_408_661_907_416];
    let horner = |c: &[f64], x: f64| c.iter().fold(0.0, |acc, &k| acc * x + k);
    let tail = |p: f64| {
        let q = libm::sqrt(-2.0 * libm::log(p));
        horner(&C, q) / (horner(&D, q) * q + 1.0)
    };
    if p < 0.024_25 {
        tail(p)
    } else if p > 1.0 - 0.024_25 {
        -tail(1.0 - p)
    } else {
        let q = p - 0.5;
        let r = q * q;
        horner(&A, r) * q / (horner(&B, r) * r + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the authors' Random123 distribution, file `kat_vectors`.
    #[test]
    fn philox_gives_the_known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normal_draws_have_the_moments_of_a_normal() {
        let (table, key) = (NormalTable::new(1.0), stream_key(7, "w"));
        let n = 1_u32 << 20;
        let draws: Vec<f64> = (0..n).map(|i| f64::from(table.at(key, u64::from(i)))).collect();
        let moment = |k: i32| draws.iter().map(|z| z.powi(k)).sum::<f64>() / f64::from(n);
        // Four standard errors of each moment of N(0, 1) at n = 2^20: sqrt(1/n), sqrt(2/n), sqrt(15/n), sqrt(96/n).
        assert!(moment(1).abs() < 0.004, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.0056, "{}", moment(2));
        assert!(moment(3).abs() < 0.0152, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.0383, "{}", moment(4));
    }

    #[test]
    fn streams_differ_by_seed_and_by_name() {
        let keys = [stream_key(1, "a"), stream_key(2, "a"), stream_key(1, "b")];
        assert!(keys[0] != keys[1] && keys[0] != keys[2] && keys[1] != keys[2]);
    }
}
