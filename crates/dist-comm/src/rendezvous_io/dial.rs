//! Opening a connection to a rank: connect, prove, be taken. Blocking, each step within one deadline.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::Serialize;

use super::HANDSHAKE_DEADLINE;
use crate::auth::{Nonce, Secret};
use crate::codec::FrameDecoder;
use crate::deadline::Deadline;
use crate::rendezvous::Refusal;
use crate::rendezvous::handshake::{Dialer, DialerStep};

/// Longest silence before it is asked whether waiting is in vain.
const SILENCE: Duration = Duration::from_millis(50);

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum DialError {
    /// It knows the secret and does not want us.
    Refused(Refusal),
    /// It speaks another language or does not know the secret: trying again would not help.
    Foreign(String),
    /// It may be better the next time.
    Failed(String),
}

/// Dials `addr` and claims what `claims` says of the open connection. `is_in_vain` is asked while the other end is
/// silent.
pub(crate) fn dial<C: Serialize>(
    addr: SocketAddr,
    secret: &Secret,
    claims: impl FnOnce(&TcpStream) -> io::Result<C>,
    deadline: &Deadline,
    is_in_vain: impl Fn() -> bool,
) -> Result<(TcpStream, FrameDecoder), DialError> {
    let failed = |cause: io::Error| DialError::Failed(cause.to_string());
    let limit = deadline.left().min(HANDSHAKE_DEADLINE).max(Duration::from_millis(1));
    let mut stream = TcpStream::connect_timeout(&addr, limit).map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let nonce = Nonce::random().map_err(|error| DialError::Foreign(error.to_string()))?;
    let claims = claims(&stream).map_err(failed)?;
    let mut dialer = Dialer::new(nonce, &claims).map_err(|error| DialError::Foreign(error.to_string()))?;
    let handshake = Deadline::after(limit);
    let mut bytes = [0; 4096];
    loop {
        let n = match read_within(&mut stream, &mut bytes, &Deadline::after(handshake.left().min(SILENCE))) {
            Err(error)
                if error.kind() == io::ErrorKind::TimedOut && !handshake.is_over() && !is_in_vain() =>
            {
                continue;
            }
            read => read.map_err(failed)?,
        };
        match dialer.on_bytes(secret, &bytes[..n]) {
            Ok(DialerStep::Wait) => {}
            Ok(DialerStep::Send(answer)) => write_within(&mut stream, &answer, &handshake).map_err(failed)?,
            Ok(DialerStep::Done(Ok(()))) => return Ok((stream, dialer.into_decoder())),
            Ok(DialerStep::Done(Err(refusal))) => return Err(DialError::Refused(refusal)),
            Err(error) => return Err(DialError::Foreign(format!("{addr}: {error}"))),
        }
    }
}

/// Some bytes; a closed connection is an error.
pub(crate) fn read_within(
    stream: &mut TcpStream,
    bytes: &mut [u8],
    deadline: &Deadline,
) -> io::Result<usize> {
    loop {
        if deadline.is_over() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
        }
        stream.set_read_timeout(Some(deadline.left().max(Duration::from_millis(1))))?;
        match stream.read(bytes) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection")),
            Ok(n) => return Ok(n),
            Err(error) if is_for_now(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

/// All bytes.
pub(crate) fn write_within(stream: &mut TcpStream, mut bytes: &[u8], deadline: &Deadline) -> io::Result<()> {
    while !bytes.is_empty() {
        if deadline.is_over() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it takes no bytes"));
        }
        stream.set_write_timeout(Some(deadline.left().max(Duration::from_millis(1))))?;
        match stream.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(error) if is_for_now(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The next frame's payload.
pub(crate) fn read_frame(
    stream: &mut TcpStream,
    decoder: &mut FrameDecoder,
    deadline: &Deadline,
) -> io::Result<Vec<u8>> {
    let mut bytes = [0; 4096];
    loop {
        if let Some(payload) = decoder.next_frame().map_err(io::Error::other)? {
            return Ok(payload.to_vec());
        }
        let n = read_within(stream, &mut bytes, deadline)?;
        decoder.feed(&bytes[..n]);
    }
}

fn is_for_now(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::TimedOut)
}
