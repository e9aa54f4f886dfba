//! The way to one peer: packets over shared memory on one machine, over TCP otherwise. Nothing here waits.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use super::packet::{LABEL_BYTES, PACKET_BYTES};
use crate::codec::{FrameDecoder, HEADER_BYTES, header};
#[cfg(target_os = "linux")]
use crate::shm::{Consumer, Producer};

/// Largest frame of a TCP link.
pub(crate) const FRAME_LIMIT: usize = LABEL_BYTES + PACKET_BYTES;

/// Bytes that are read from a socket at once.
const READ_BYTES: usize = 64 << 10;

/// The way to one peer.
#[derive(Debug)]
pub(crate) enum Link {
    /// Both ranks are on one machine. The connection that brought them together stays open.
    #[cfg(target_os = "linux")]
    Shm { out: Producer, into: Consumer, _stream: TcpStream },
    /// Anywhere.
    Tcp(TcpLink),
}

impl Link {
    /// Takes a packet; `false` if there is no room now.
    pub(crate) fn try_push(&mut self, label: &[u8; LABEL_BYTES], payload: &[u8]) -> io::Result<bool> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { out, .. } => Ok(out.try_push(label, payload)),
            Self::Tcp(tcp) => tcp.try_push(label, payload),
        }
    }

    /// Whether a packet has come.
    pub(crate) fn is_ready(&mut self) -> io::Result<bool> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { into, .. } => Ok(into.is_ready()),
            Self::Tcp(tcp) => tcp.is_ready(),
        }
    }

    /// The packet that [`is_ready`](Self::is_ready) saw: label and payload.
    pub(crate) fn front(&self) -> Option<(&[u8], &[u8])> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { into, .. } => into.peek(),
            Self::Tcp(tcp) => tcp.front.as_deref().and_then(|packet| packet.split_at_checked(LABEL_BYTES)),
        }
    }

    /// Is done with that packet.
    pub(crate) fn pop(&mut self) {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { into, .. } => into.pop(),
            Self::Tcp(tcp) => tcp.spare = tcp.front.take().unwrap_or_default(),
        }
    }

    /// Pushes on what a socket did not take yet; whether all is out.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { .. } => Ok(true),
            Self::Tcp(tcp) => tcp.flush(),
        }
    }

    /// Takes in what has come, so that a peer that waits for room can go on.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { .. } => Ok(()),
            Self::Tcp(tcp) => tcp.read_once().map(drop),
        }
    }

    /// What to poll, if it can be polled.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Shm { .. } => None,
            Self::Tcp(tcp) => Some(tcp.stream.as_fd()),
        }
    }
}

/// Packets over a connection.
#[derive(Debug)]
pub(crate) struct TcpLink {
    stream: TcpStream,
    decoder: FrameDecoder,
    /// The packet that is looked at, with its label.
    front: Option<Vec<u8>>,
    /// Memory for the next one.
    spare: Vec<u8>,
    unsent: Vec<u8>,
    sent: usize,
    read: Vec<u8>,
    is_closed: bool,
}

impl TcpLink {
    pub(crate) fn new(stream: TcpStream, mut decoder: FrameDecoder) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        decoder.set_limit(FRAME_LIMIT);
        Ok(Self {
            stream,
            decoder,
            front: None,
            spare: Vec::new(),
            unsent: Vec::new(),
            sent: 0,
            read: vec![0; READ_BYTES],
            is_closed: false,
        })
    }

    fn try_push(&mut self, label: &[u8; LABEL_BYTES], payload: &[u8]) -> io::Result<bool> {
        if !self.flush()? {
            return Ok(false);
        }
        let head: [u8; HEADER_BYTES] = header(LABEL_BYTES + payload.len());
        let parts = [&head[..], &label[..], payload];
        let wrote = match self.stream.write_vectored(&parts.map(IoSlice::new)) {
            Ok(n) => n,
            Err(error) if is_for_now(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut skip = wrote;
        for part in parts {
            let skipped = skip.min(part.len());
            skip -= skipped;
            self.unsent.extend_from_slice(&part[skipped..]);
        }
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<bool> {
        while self.sent < self.unsent.len() {
            match self.stream.write(&self.unsent[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if is_for_now(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(true)
    }

    fn is_ready(&mut self) -> io::Result<bool> {
        if self.front.is_some() || self.take_front()? {
            return Ok(true);
        }
        while self.read_once()? {
            if self.take_front()? {
                return Ok(true);
            }
        }
        if self.is_closed {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(false)
    }

    fn take_front(&mut self) -> io::Result<bool> {
        let Some(packet) = self.decoder.next_frame().map_err(io::Error::other)? else { return Ok(false) };
        let mut front = std::mem::take(&mut self.spare);
        front.clear();
        front.extend_from_slice(packet);
        self.front = Some(front);
        Ok(true)
    }

    /// Whether bytes came.
    fn read_once(&mut self) -> io::Result<bool> {
        if self.is_closed {
            return Ok(false);
        }
        match self.stream.read(&mut self.read) {
            Ok(0) => {
                self.is_closed = true;
                Ok(false)
            }
            Ok(n) => {
                self.decoder.feed(&self.read[..n]);
                Ok(true)
            }
            Err(error) if is_for_now(&error) => Ok(false),
            // What came before the reset still counts; then it is closed.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                self.is_closed = true;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

fn is_for_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
