//! Ranks and where they stand: tensor-parallel, pipeline and data-parallel coordinates.

use serde::{Deserialize, Serialize};

/// A member of the world, counted from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rank(pub usize);

impl std::fmt::Display for Rank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {}", self.0)
    }
}

/// The degrees of a split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mesh {
    /// Ranks that share each layer.
    pub tp: usize,
    /// Stages that the layers are dealt to.
    pub pp: usize,
    /// Whole copies of the model.
    pub dp: usize,
}

/// A rank's place in a mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Coord {
    /// Place among the ranks that share a layer.
    pub tp: usize,
    /// Pipeline stage.
    pub pp: usize,
    /// Which copy.
    pub dp: usize,
}

impl Mesh {
    /// One rank.
    pub const SOLO: Self = Self { tp: 1, pp: 1, dp: 1 };

    /// Ranks of the mesh.
    #[must_use]
    pub const fn world_size(self) -> usize {
        self.tp * self.pp * self.dp
    }

    /// Where a rank stands; tensor-parallel neighbours have neighbouring ranks.
    #[must_use]
    pub const fn coord(self, rank: Rank) -> Coord {
        Coord { tp: rank.0 % self.tp, pp: rank.0 / self.tp % self.pp, dp: rank.0 / (self.tp * self.pp) }
    }

    /// The rank that stands at `coord`.
    #[must_use]
    pub const fn rank(self, coord: Coord) -> Rank {
        Rank((coord.dp * self.pp + coord.pp) * self.tp + coord.tp)
    }
}

impl std::fmt::Display for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tp {} × pp {} × dp {}", self.tp, self.pp, self.dp)
    }
}
