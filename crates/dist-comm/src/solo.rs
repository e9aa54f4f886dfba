//! A world of one rank: nothing to wait for, nothing to add. It exists so that callers need no `if`.

use dist_core::raw::RawBuf;
use dist_core::{DType, Rank};

use crate::call::{Call, CallName, Op};
use crate::error::CommError;

/// The communicator of a rank that is alone.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Solo {
    calls: u64,
}

impl Solo {
    /// A world of one.
    #[must_use]
    pub const fn new() -> Self {
        Self { calls: 0 }
    }

    fn call(&mut self, op: Op, bytes: usize, dtype: DType, name: CallName) -> Call {
        self.calls += 1;
        Call { number: self.calls, op, bytes, dtype, name }
    }

    /// Copies the only part.
    pub(crate) fn all_gather(&mut self, src: &RawBuf, dst: RawBuf, name: CallName) -> Result<(), CommError> {
        let (found, expected) = (dst.n_bytes(), src.n_bytes());
        let call = self.call(Op::AllGather, expected, src.dtype(), name);
        if found != expected {
            return Err(CommError::BufferSize { call: Box::new(call), found, expected });
        }
        match (src, dst) {
            (RawBuf::Host { bytes: src, .. }, RawBuf::Host { bytes: dst, .. }) => dst.copy_from_slice(src),
            (RawBuf::Device { ptr: src, .. }, RawBuf::Device { ptr: dst, .. }) if *src == dst => {}
            _ => {
                let (what, cure) = ("device memory to copy", "gather in place, or skip the call on one rank");
                return Err(CommError::Unsupported { comm: "solo", what, cure });
            }
        }
        Ok(())
    }

    /// The root can only be rank 0.
    pub(crate) fn broadcast(&mut self, buf: &RawBuf, root: Rank, name: CallName) -> Result<(), CommError> {
        let call = self.call(Op::Broadcast { root }, buf.n_bytes(), buf.dtype(), name);
        if root == Rank(0) {
            Ok(())
        } else {
            Err(CommError::NoSuchRank { call: Box::new(call), rank: root, world_size: 1 })
        }
    }

    /// There is nobody to send to or receive from.
    pub(crate) fn pair(&mut self, op: Op, buf: &RawBuf, rank: Rank, name: CallName) -> Result<(), CommError> {
        let call = self.call(op, buf.n_bytes(), buf.dtype(), name);
        Err(CommError::NoSuchRank { call: Box::new(call), rank, world_size: 1 })
    }
}
