//! Memory to measure in, filled with numbers as models have them: zeros would be multiplied faster.

use dist_core::DType;
use dist_core::philox::NormalTable;
use half::{bf16, f16};

use super::super::driver::{Context, DeviceMemory, Operands, Stream};
use super::super::plans::PlanKey;
use crate::error::Result;

/// Numbers that are made; memory holds them again and again. No dimension of a model divides it.
const NUMBERS: usize = (1 << 20) + 8 * 37;
const KEY: [u32; 2] = [0x7475_6e65, 0];
/// The parts that operands begin at multiples of, as those of the ops do.
const ALIGNMENT: usize = 256;
/// The part of free memory that may be taken.
const OF_FREE: f64 = 0.8;

/// Bytes of each operand.
#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    weights: usize,
    x: usize,
    out: usize,
    bias: usize,
}

fn weight_bytes(key: &PlanKey) -> usize {
    (key.shape.n * key.shape.ld * key.shape.dtype.bytes()).next_multiple_of(ALIGNMENT)
}

impl Sizes {
    /// What `key` needs, with `beyond` bytes of weights beside one.
    fn of(key: &PlanKey, beyond: usize) -> Self {
        let (shape, size) = (&key.shape, key.shape.dtype.bytes());
        Self {
            weights: weight_bytes(key) + beyond,
            x: key.rows * shape.k * size,
            out: key.rows * shape.n * shape.out_bytes(),
            bias: shape.n * size,
        }
    }

    fn max(self, other: Self) -> Self {
        Self {
            weights: self.weights.max(other.weights),
            x: self.x.max(other.x),
            out: self.out.max(other.out),
            bias: self.bias.max(other.bias),
        }
    }

    fn total(self) -> usize {
        self.weights + self.x + self.out + self.bias
    }
}

/// Operands of the largest product that there is memory for, and so of all others.
#[derive(Debug)]
pub(super) struct Scratch {
    weights: DeviceMemory,
    x: DeviceMemory,
    out: DeviceMemory,
    bias: DeviceMemory,
    /// Numbers on their way.
    numbers: DeviceMemory,
    /// What the numbers are now.
    filled: Option<DType>,
}

impl Scratch {
    /// Takes memory, and says which of `keys` it is enough for.
    pub(super) fn new(context: &Context, keys: &[PlanKey]) -> Result<(Self, Vec<PlanKey>)> {
        let (free, _) = context.memory()?;
        let most = ((free as f64 * OF_FREE) as usize).saturating_sub(2 * NUMBERS);
        let beyond = 2 * context.info().l2_bytes;
        let (mut sizes, mut fitting) = (Sizes::default(), Vec::new());
        for key in keys {
            let grown = sizes.max(Sizes::of(key, beyond));
            if grown.total() <= most {
                sizes = grown;
                fitting.push(*key);
            }
        }
        let alloc = |n_bytes| context.alloc("measuring products", n_bytes);
        let scratch = Self {
            weights: alloc(sizes.weights)?,
            x: alloc(sizes.x)?,
            out: alloc(sizes.out)?,
            bias: alloc(sizes.bias)?,
            numbers: alloc(2 * NUMBERS)?,
            filled: None,
        };
        Ok((scratch, fitting))
    }

    /// Weights and biases from N(0, 0.02), inputs from N(0, 1), of `dtype`.
    pub(super) fn fill(&mut self, stream: &Stream, dtype: DType) -> Result<()> {
        if self.filled == Some(dtype) {
            return Ok(());
        }
        stream.upload(&mut self.numbers, 0, bytemuck::cast_slice(&numbers(dtype, 0.02)))?;
        repeat(stream, &self.numbers, &mut self.weights)?;
        repeat(stream, &self.numbers, &mut self.bias)?;
        stream.upload(&mut self.numbers, 0, bytemuck::cast_slice(&numbers(dtype, 1.0)))?;
        repeat(stream, &self.numbers, &mut self.x)?;
        self.filled = Some(dtype);
        Ok(())
    }

    /// Weights of `key` that there is place for.
    pub(super) fn n_weights(&self, key: &PlanKey) -> usize {
        self.weights.n_bytes() / weight_bytes(key)
    }

    /// The operands of a product, with weight `i` of them, again from the first after the last.
    pub(super) fn operands(&self, key: &PlanKey, i: usize) -> Operands {
        let at = i % self.n_weights(key) * weight_bytes(key);
        let bias = if key.shape.epilogue.has_bias() { self.bias.address() } else { 0 };
        Operands {
            out: self.out.address(),
            x: self.x.address(),
            weight: self.weights.address() + at as u64,
            bias,
        }
    }

    /// Makes numbers that are none of the outputs' bytes from `at` on.
    pub(super) fn poison(&mut self, stream: &Stream, at: usize, n_bytes: usize) -> Result<()> {
        Ok(stream.fill(&mut self.out, at, 0xff, n_bytes)?)
    }

    /// The outputs' bytes from `at` on.
    pub(super) fn outputs(&self, stream: &Stream, at: usize, found: &mut [u8]) -> Result<()> {
        Ok(stream.download(found, &self.out, at)?)
    }
}

fn numbers(dtype: DType, scale: f64) -> Vec<u16> {
    let table = NormalTable::new(scale);
    let rounded =
        |x: f32| if dtype == DType::F16 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() };
    (0..NUMBERS as u64 / 8).flat_map(|group| table.eight(KEY, group)).map(rounded).collect()
}

/// Fills `dst` with what `src` holds, again and again.
fn repeat(stream: &Stream, src: &DeviceMemory, dst: &mut DeviceMemory) -> Result<()> {
    let n_bytes = dst.n_bytes();
    for at in (0..n_bytes).step_by(src.n_bytes()) {
        stream.copy(dst, at, src, 0, src.n_bytes().min(n_bytes - at))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_models_in_both_types() {
        for dtype in [DType::BF16, DType::F16] {
            let value = |&bits: &u16| {
                f64::from(if dtype == DType::F16 {
                    f16::from_bits(bits).to_f32()
                } else {
                    bf16::from_bits(bits).to_f32()
                })
            };
            let values: Vec<f64> = numbers(dtype, 0.02).iter().map(value).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let square = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
            assert!(mean.abs() < 1e-4 && (square.sqrt() - 0.02).abs() < 1e-4, "{dtype}: {mean} {square}");
        }
    }
}
