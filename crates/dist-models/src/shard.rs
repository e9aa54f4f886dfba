//! What a sharded directory would hold, and whether one holds what it says. Cutting itself is an
//! [export](crate::export) that changes nothing.

mod verify;

use dist_core::DType;

use crate::export::{ExportError, ExportRequest};
pub use verify::{Verified, verify};

/// A tensor of a rank's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorListing {
    /// Canonical name.
    pub name: String,
    /// Type.
    pub dtype: DType,
    /// Local shape.
    pub shape: Vec<usize>,
    /// Length.
    pub n_bytes: u64,
}

/// What a rank's file would hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankListing {
    /// The rank.
    pub rank: usize,
    /// Length of the file.
    pub n_bytes: u64,
    /// Its tensors, in canonical order.
    pub tensors: Vec<TensorListing>,
}

/// What would be written, rank by rank; nothing is.
pub fn listing(request: &ExportRequest<'_>) -> Result<Vec<RankListing>, ExportError> {
    let files = request.outline()?.files.into_iter().enumerate();
    let tensor = |slot: crate::manifest::layout::Slot| TensorListing {
        name: slot.name,
        dtype: slot.dtype,
        shape: slot.shape,
        n_bytes: slot.length,
    };
    let ranks = files.map(|(rank, file)| RankListing {
        rank,
        n_bytes: file.length,
        tensors: file.slots.into_iter().map(tensor).collect(),
    });
    Ok(ranks.collect())
}
