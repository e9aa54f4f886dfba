//! What a rank says about a call: its number, what it does, and where in the model it stands. Names are for people and
//! for finding ranks that have come apart; nothing is decided by them.

use std::fmt;

use dist_core::{DType, Rank};

/// Where a call stands in the model and in time; both sides of a call give the same.
///
/// ```
/// use dist_comm::CallName;
///
/// let name = CallName::new("attention output").layer(11).step(73);
/// assert_eq!(name.to_string(), "layer 11, attention output; step 73");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallName {
    what: &'static str,
    layer: Option<usize>,
    phase: Option<&'static str>,
    step: Option<u64>,
}

impl CallName {
    /// A call about `what`, e.g. `attention output`.
    #[must_use]
    pub const fn new(what: &'static str) -> Self {
        Self { what, layer: None, phase: None, step: None }
    }

    /// In this layer.
    #[must_use]
    pub const fn layer(self, layer: usize) -> Self {
        Self { layer: Some(layer), ..self }
    }

    /// In a step of this kind, e.g. `decode`.
    #[must_use]
    pub const fn phase(self, phase: &'static str) -> Self {
        Self { phase: Some(phase), ..self }
    }

    /// In this step.
    #[must_use]
    pub const fn step(self, step: u64) -> Self {
        Self { step: Some(step), ..self }
    }

    /// Tells names apart without sending them.
    pub(crate) fn digest(&self) -> u64 {
        // FNV-1a: enough for honest ranks.
        let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        let layer = self.layer.map_or(0, |layer| layer as u64 + 1).to_le_bytes();
        let step = self.step.map_or(0, |step| step.wrapping_add(1)).to_le_bytes();
        let words = [self.what.as_bytes(), self.phase.unwrap_or("").as_bytes(), &layer, &step];
        // A byte that no text has stands between the parts.
        let bytes = words.into_iter().flat_map(|word| word.iter().copied().chain([0xff]));
        bytes.fold(0xcbf2_9ce4_8422_2325, mix)
    }
}

impl fmt::Display for CallName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}, ")?;
        }
        f.write_str(self.what)?;
        match (self.phase, self.step) {
            (Some(phase), Some(step)) => write!(f, "; {phase} step {step}"),
            (None, Some(step)) => write!(f, "; step {step}"),
            (Some(phase), None) => write!(f, "; {phase}"),
            (None, None) => Ok(()),
        }
    }
}

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Adds partial sums.
    AllReduce,
    /// Puts all ranks' parts one after another.
    AllGather,
    /// Copies from one rank to all.
    Broadcast {
        /// The rank that has it.
        root: Rank,
    },
    /// Waits for all.
    Barrier,
    /// Gives to one rank.
    Send {
        /// The rank that gets it.
        to: Rank,
    },
    /// Takes from one rank.
    Recv {
        /// The rank that gives it.
        from: Rank,
    },
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::Broadcast { .. } => "broadcast",
            Self::Barrier => "barrier",
            Self::Send { .. } => "send",
            Self::Recv { .. } => "recv",
        })
    }
}

/// One call of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Counted from one: collectives by communicator, sends and receives by pair of ranks and direction.
    pub number: u64,
    /// What it does.
    pub op: Op,
    /// Size of the caller's part.
    pub bytes: usize,
    /// Type of the elements.
    pub dtype: DType,
    /// Where it stands.
    pub name: CallName,
}

impl Call {
    /// Whether two ranks mean the same collective.
    pub(crate) fn agrees(&self, other: &Self) -> bool {
        self == other
    }

    /// Whether a message is the one that a receiver waits for.
    pub(crate) fn carries(&self, received: &Self) -> bool {
        (self.bytes, self.dtype, self.name) == (received.bytes, received.dtype, received.name)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} #{}", self.op, self.number)?;
        match self.op {
            Op::Send { to: Rank(to) } => write!(f, " to rank {to}")?,
            Op::Recv { from: Rank(from) } => write!(f, " from rank {from}")?,
            _ => {}
        }
        write!(f, " ({})", self.name)
    }
}
