//! Values from one type to another: the nearest one, ties to even, and never silently an infinity.

use dist_core::DType;
use half::{bf16, f16};

/// Appends `bytes`, of type `from`, as `to`; the first finite value that `to` cannot hold is an error.
pub(crate) fn cast(bytes: &[u8], from: DType, to: DType, out: &mut Vec<u8>) -> Result<(), f32> {
    match from {
        DType::F16 => encode(pairs(bytes).map(|b| f16::from_le_bytes(b).to_f32()), to, out),
        DType::BF16 => encode(pairs(bytes).map(|b| bf16::from_le_bytes(b).to_f32()), to, out),
        _ => encode(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)), to, out),
    }
}

fn pairs(bytes: &[u8]) -> impl Iterator<Item = [u8; 2]> {
    bytes.as_chunks::<2>().0.iter().copied()
}

fn encode(values: impl Iterator<Item = f32>, to: DType, out: &mut Vec<u8>) -> Result<(), f32> {
    for value in values {
        let is_held = match to {
            DType::F16 => {
                let near = f16::from_f32(value);
                out.extend(near.to_le_bytes());
                near.is_finite()
            }
            DType::BF16 => {
                let near = bf16::from_f32(value);
                out.extend(near.to_le_bytes());
                near.is_finite()
            }
            _ => {
                out.extend(value.to_le_bytes());
                true
            }
        };
        if !is_held && value.is_finite() {
            return Err(value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cast_f32(values: &[f32], to: DType) -> Result<Vec<u8>, f32> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut out = Vec::new();
        cast(&bytes, DType::F32, to, &mut out).map(|()| out)
    }

    #[test]
    fn values_are_rounded_to_the_nearest() {
        // One and the half of bf16's last place above it: the tie goes to even, a little more goes up.
        let tie = 1.0 + 2_f32.powi(-8);
        assert_eq!(cast_f32(&[tie, tie + 1e-6], DType::BF16), Ok(vec![0x80, 0x3F, 0x81, 0x3F]));
        assert_eq!(cast_f32(&[-0.0, 1.5], DType::F16), Ok(vec![0x00, 0x80, 0x00, 0x3E]));
    }

    #[test]
    fn what_a_type_cannot_hold_is_refused() {
        assert_eq!(cast_f32(&[1.0, 70_000.0], DType::F16), Err(70_000.0));
        assert!(cast_f32(&[f32::INFINITY], DType::F16).is_ok());
        assert!(cast_f32(&[70_000.0], DType::BF16).is_ok());
    }
}
