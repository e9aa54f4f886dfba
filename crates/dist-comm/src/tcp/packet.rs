//! A piece of a call on its way to a peer: which call, which piece. Its label has a fixed size, so that packets cost
//! neither memory nor a parser.

use dist_core::{DType, Rank};

use crate::call::{Call, CallName, Op};

/// Largest payload of a packet. Large buffers travel as many packets, each still in the cache when it is added; the
/// table in `benches/comm.rs` shows the choices.
pub(crate) const PACKET_BYTES: usize = 64 << 10;

/// Bytes of a label.
pub(crate) const LABEL_BYTES: usize = 56;

/// Which piece of which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    /// The call's number.
    pub(crate) number: u64,
    /// Size of the caller's part.
    pub(crate) bytes: u64,
    /// What both sides must agree on beside the number, as a hash.
    pub(crate) meaning: u64,
    /// The piece, counted from zero within the call.
    piece: u64,
    op: u8,
    dtype: u8,
    root: u32,
}

impl Label {
    /// The first piece of a call.
    pub(crate) fn of(call: &Call) -> Self {
        let (op, root) = match call.op {
            Op::AllReduce => (0, 0),
            Op::AllGather => (1, 0),
            Op::Broadcast { root } => (2, root.0 as u32),
            Op::Barrier => (3, 0),
            // Both sides of a message.
            Op::Send { .. } | Op::Recv { .. } => (4, 0),
        };
        let dtype = dtype_code(call.dtype);
        let mut hash = call.name.digest();
        for word in [u64::from(op), u64::from(root), u64::from(dtype), call.bytes as u64] {
            hash = mix(hash, word);
        }
        Self { number: call.number, bytes: call.bytes as u64, meaning: hash, piece: 0, op, dtype, root }
    }

    /// Another piece of the same call.
    pub(crate) fn at(self, piece: usize) -> Self {
        Self { piece: piece as u64, ..self }
    }

    pub(crate) fn to_bytes(self) -> [u8; LABEL_BYTES] {
        let mut bytes = [0; LABEL_BYTES];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.meaning.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.piece.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.root.to_le_bytes());
        (bytes[36], bytes[37]) = (self.op, self.dtype);
        bytes
    }

    /// `None` if the bytes are shorter than a label.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Self {
            number: word(0)?,
            bytes: word(8)?,
            meaning: word(16)?,
            piece: word(24)?,
            root: u32::from_le_bytes(bytes.get(32..36)?.try_into().ok()?),
            op: *bytes.get(36)?,
            dtype: *bytes.get(37)?,
        })
    }

    /// The call as the peer made it towards `me`; its name did not travel.
    pub(crate) fn call(self, me: Rank, name: CallName) -> Call {
        let op = match self.op {
            0 => Op::AllReduce,
            1 => Op::AllGather,
            2 => Op::Broadcast { root: Rank(self.root as usize) },
            3 => Op::Barrier,
            _ => Op::Send { to: me },
        };
        let dtypes = [DType::F32, DType::F16, DType::BF16, DType::U32, DType::I32, DType::U8];
        let dtype = dtypes.get(usize::from(self.dtype)).copied().unwrap_or(DType::U8);
        Call { number: self.number, op, bytes: self.bytes as usize, dtype, name }
    }
}

const fn dtype_code(dtype: DType) -> u8 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::U32 => 3,
        DType::I32 => 4,
        DType::U8 => 5,
    }
}

/// One step of FNV-1a, word by word: enough to tell honest calls apart.
pub(crate) const fn mix(hash: u64, word: u64) -> u64 {
    (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3)
}
