//! The bytes between ranks: frames with magic, protocol version and a bounded length, and messages inside them
//! (bincode with limits). It owns no socket: bytes come in as slices, cut anywhere.

use std::ops::Range;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of everything that ranks say to each other; ranks of different versions refuse each other by name.
pub const PROTOCOL_VERSION: u16 = 1;

/// Bytes before a frame's payload: magic (4), version (2), zero (2), length (4). This never changes between versions.
pub const HEADER_BYTES: usize = 12;

/// Largest payload before a peer has proved the secret.
pub const HANDSHAKE_LIMIT: usize = 4 << 10;

/// Largest payload of a command between rank 0 and a rank.
pub const CONTROL_LIMIT: usize = 16 << 20;

const MAGIC: [u8; 4] = *b"dGPT";

/// Largest message, in bytes, that bincode may read or take memory for.
const MESSAGE_LIMIT: usize = CONTROL_LIMIT;

/// What is wrong with bytes that came in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first bytes are not ours: some other program talks to this port.
    #[error("not a frame of this program, first bytes: {found:02x?}")]
    Foreign {
        /// The four bytes in the place of the magic.
        found: [u8; 4],
    },
    /// The peer is another build.
    #[error("protocol version {theirs} (ours: {ours}): run the same build of dist-cli on every machine")]
    Version {
        /// This build's version.
        ours: u16,
        /// The peer's version.
        theirs: u16,
    },
    /// The length is over the limit; nothing was allocated for it.
    #[error("frame of {len} bytes, at most {limit} are allowed here")]
    TooLong {
        /// The claimed length.
        len: usize,
        /// The limit of this connection.
        limit: usize,
    },
    /// The payload is not the message that belongs here.
    #[error("malformed message: {what}")]
    Malformed {
        /// What the decoder found.
        what: String,
    },
}

/// The header of a frame with `len` bytes of payload.
///
/// # Panics
/// If `len` does not fit in 32 bits; every limit is far below.
#[must_use]
pub fn header(len: usize) -> [u8; HEADER_BYTES] {
    let len = u32::try_from(len).expect("payloads are bounded below 4 GiB");
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    header[8..].copy_from_slice(&len.to_le_bytes());
    header
}

/// A whole frame around `payload`.
pub fn frame(payload: &[u8], limit: usize) -> Result<Vec<u8>, FrameError> {
    if payload.len() > limit {
        return Err(FrameError::TooLong { len: payload.len(), limit });
    }
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&header(payload.len()));
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// A whole frame around a message.
pub fn message_frame<M: Serialize>(message: &M, limit: usize) -> Result<Vec<u8>, FrameError> {
    frame(&to_bytes(message)?, limit)
}

/// A message as bytes.
pub fn to_bytes<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    bincode::serde::encode_to_vec(message, config())
        .map_err(|error| FrameError::Malformed { what: error.to_string() })
}

/// A message from exactly these bytes; bytes left over are an error.
pub fn from_bytes<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, FrameError> {
    let (message, read) = bincode::serde::decode_from_slice(bytes, config())
        .map_err(|error| FrameError::Malformed { what: error.to_string() })?;
    if read != bytes.len() {
        let what = format!("{} bytes after the message", bytes.len() - read);
        return Err(FrameError::Malformed { what });
    }
    Ok(message)
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MESSAGE_LIMIT>()
}

/// Cuts a stream of bytes into frames. It holds at most one unfinished frame and what came with its last bytes.
#[derive(Debug)]
pub struct FrameDecoder {
    limit: usize,
    bytes: Vec<u8>,
    /// Where the next frame begins in `bytes`.
    at: usize,
    failed: Option<FrameError>,
}

impl FrameDecoder {
    /// A decoder that refuses payloads over `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self { limit, bytes: Vec::new(), at: 0, failed: None }
    }

    /// Raises or lowers the limit for the frames to come, as when a peer has proved the secret.
    pub const fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Takes bytes in; ask [`next_frame`](Self::next_frame) until it has no more before feeding again.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.failed.is_some() {
            return;
        }
        if self.at == self.bytes.len() {
            self.bytes.clear();
            self.at = 0;
        } else if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The payload of the next whole frame; `None` until more bytes come. After an error there are no more frames.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let range = self.whole_frame()?;
        Ok(range.map(|range| {
            self.at = range.end;
            &self.bytes[range]
        }))
    }

    /// The payload that [`next_frame`](Self::next_frame) would give, left where it is.
    pub fn peek(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let range = self.whole_frame()?;
        Ok(range.map(|range| &self.bytes[range]))
    }

    fn whole_frame(&mut self) -> Result<Option<Range<usize>>, FrameError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let found = payload_len(&self.bytes[self.at..], self.limit);
        if let Err(error) = &found {
            self.bytes = Vec::new();
            self.at = 0;
            self.failed = Some(error.clone());
        }
        let start = self.at + HEADER_BYTES;
        Ok(found?.map(|len| start..start + len).filter(|range| range.end <= self.bytes.len()))
    }

    /// Bytes held for a frame that is not whole yet.
    #[must_use]
    pub const fn n_waiting(&self) -> usize {
        self.bytes.len() - self.at
    }
}

/// The length that the header at the start of `bytes` claims; foreign bytes are refused as early as they differ.
fn payload_len(bytes: &[u8], limit: usize) -> Result<Option<usize>, FrameError> {
    let n_magic = bytes.len().min(MAGIC.len());
    if bytes[..n_magic] != MAGIC[..n_magic] {
        let mut found = [0; 4];
        found[..n_magic].copy_from_slice(&bytes[..n_magic]);
        return Err(FrameError::Foreign { found });
    }
    let Some(version) = bytes.get(4..6) else { return Ok(None) };
    let theirs = u16::from_le_bytes([version[0], version[1]]);
    if theirs != PROTOCOL_VERSION {
        return Err(FrameError::Version { ours: PROTOCOL_VERSION, theirs });
    }
    let Some(rest) = bytes.get(6..HEADER_BYTES) else { return Ok(None) };
    if rest[..2] != [0, 0] {
        return Err(FrameError::Malformed { what: "reserved header bytes are not zero".to_owned() });
    }
    let len = u32::from_le_bytes([rest[2], rest[3], rest[4], rest[5]]) as usize;
    if len > limit {
        return Err(FrameError::TooLong { len, limit });
    }
    Ok(Some(len))
}
