//! Element types of tensors as they are stored and computed; conversion of values is the kernels' business.

use serde::{Deserialize, Serialize};

/// Type of one element of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an `f32`.
    BF16,
    /// Token ids, positions, lengths, block numbers.
    U32,
    /// Cache slots; −1 marks a padding row.
    I32,
    /// Raw bytes: boolean masks, packed weights.
    U8,
}

impl DType {
    /// Size of one element in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 => 1,
        }
    }

    /// Whether weights may be stored in this type.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// The name that configuration files and flags use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::U8 => "u8",
        }
    }

    /// Reads a name as written in flags and `config.json` (`bf16`, `bfloat16`, `torch.float16`, …).
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name.strip_prefix("torch.").unwrap_or(name).to_ascii_lowercase().as_str() {
            "f32" | "float32" | "float" => Some(Self::F32),
            "f16" | "float16" | "half" => Some(Self::F16),
            "bf16" | "bfloat16" => Some(Self::BF16),
            _ => None,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
