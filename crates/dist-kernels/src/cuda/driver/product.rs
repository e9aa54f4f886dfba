//! What a matrix product is, whoever computes it.

use dist_core::{Activation, DType};
use serde::{Deserialize, Serialize};

/// What happens to sums on their way out, as far as the library can do it: the bias, then the function. Its GELU is the
/// one with the tangent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EpilogueKind {
    /// Nothing.
    None,
    /// A bias.
    Bias,
    /// `max(x, 0)`.
    Relu,
    /// A bias, then `max(x, 0)`.
    BiasRelu,
    /// GELU.
    Gelu,
    /// A bias, then GELU.
    BiasGelu,
}

impl EpilogueKind {
    /// That of a product with or without a bias and with a function; `None` where the library has none such.
    pub fn of(has_bias: bool, function: Option<Activation>) -> Option<Self> {
        match (has_bias, function) {
            (false, None) => Some(Self::None),
            (true, None) => Some(Self::Bias),
            (false, Some(Activation::Relu)) => Some(Self::Relu),
            (true, Some(Activation::Relu)) => Some(Self::BiasRelu),
            (false, Some(Activation::GeluTanh)) => Some(Self::Gelu),
            (true, Some(Activation::GeluTanh)) => Some(Self::BiasGelu),
            (_, Some(Activation::GeluErf)) => None,
        }
    }

    /// Its function.
    pub fn function(self) -> Option<Activation> {
        match self {
            Self::None | Self::Bias => None,
            Self::Relu | Self::BiasRelu => Some(Activation::Relu),
            Self::Gelu | Self::BiasGelu => Some(Activation::GeluTanh),
        }
    }

    /// Whether it adds a bias.
    pub fn has_bias(self) -> bool {
        matches!(self, Self::Bias | Self::BiasRelu | Self::BiasGelu)
    }
}

/// A product, whatever its rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProductShape {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Elements from one row of the weight to the next.
    pub ld: usize,
    /// Type of inputs and weight: bf16 or f16.
    pub dtype: DType,
    /// Whether outputs are f32; they have the type of the inputs otherwise.
    pub out_f32: bool,
    /// On the way out.
    pub epilogue: EpilogueKind,
}

impl ProductShape {
    /// Whether the library takes it as the kernels mean it: to it, the bias of f32 outputs is f32.
    pub fn is_for_library(&self) -> bool {
        let is_native = matches!(self.dtype, DType::BF16 | DType::F16);
        is_native && (!self.out_f32 || self.epilogue == EpilogueKind::None)
    }

    /// Bytes of an output.
    pub fn out_bytes(&self) -> usize {
        if self.out_f32 { DType::F32.bytes() } else { self.dtype.bytes() }
    }
}

/// Device addresses of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    pub(crate) out: u64,
    pub(crate) x: u64,
    pub(crate) weight: u64,
    /// Zero: none.
    pub(crate) bias: u64,
}

/// Alignment of operands that cuBLASLt takes for granted when it offers algorithms.
const ALIGNMENT: u64 = 256;

impl Operands {
    /// Whether the library's algorithms may be run on them.
    pub(crate) fn are_aligned(&self) -> bool {
        [self.out, self.x, self.weight, self.bias].iter().all(|address| address % ALIGNMENT == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epilogue_is_its_bias_and_its_function() {
        let functions = [None, Some(Activation::Relu), Some(Activation::GeluTanh)];
        for (has_bias, function) in
            functions.into_iter().flat_map(|function| [(false, function), (true, function)])
        {
            let kind = EpilogueKind::of(has_bias, function).unwrap();
            assert_eq!((kind.has_bias(), kind.function()), (has_bias, function), "{kind:?}");
        }
        for has_bias in [false, true] {
            assert_eq!(EpilogueKind::of(has_bias, Some(Activation::GeluErf)), None);
        }
    }

    #[test]
    fn f32_outputs_are_the_librarys_without_an_epilogue_only() {
        let plain = ProductShape {
            n: 8,
            k: 8,
            ld: 8,
            dtype: DType::F16,
            out_f32: true,
            epilogue: EpilogueKind::None,
        };
        assert!(plain.is_for_library());
        assert!(!ProductShape { epilogue: EpilogueKind::Bias, ..plain }.is_for_library());
        assert!(ProductShape { epilogue: EpilogueKind::Bias, out_f32: false, ..plain }.is_for_library());
        assert!(!ProductShape { dtype: DType::F32, ..plain }.is_for_library());
        assert_eq!((plain.out_bytes(), ProductShape { out_f32: false, ..plain }.out_bytes()), (4, 2));
    }

    #[test]
    fn one_address_that_is_not_aligned_is_enough() {
        let aligned = Operands { out: 256, x: 512, weight: 1 << 30, bias: 0 };
        assert!(aligned.are_aligned());
        assert!(!Operands { bias: 16, ..aligned }.are_aligned());
        assert!(!Operands { x: 384, ..aligned }.are_aligned());
    }
}
