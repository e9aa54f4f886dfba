//! The opening of every connection: challenge, answer, verdict. Both sides prove the secret and each proof covers what
//! its side says, so that a verdict cannot be forged either. Pure: bytes come in, frames go out.
//!
//! ```text
//! acceptor → dialer    Challenge { nonce }
//! dialer → acceptor    Answer { nonce, words, proof }      words: what the dialer claims
//! acceptor → dialer    Verdict { words, proof }            words: taken, or the refusal
//! ```

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Refusal;
use crate::auth::{Nonce, Nonces, Proof, Role, Secret, prove, verify};
use crate::codec::{FrameDecoder, FrameError, HANDSHAKE_LIMIT, from_bytes, message_frame, to_bytes};

#[derive(Serialize, Deserialize)]
struct Challenge {
    nonce: Nonce,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    nonce: Nonce,
    words: Vec<u8>,
    proof: Proof,
}

#[derive(Serialize, Deserialize)]
struct Verdict {
    words: Vec<u8>,
    proof: Proof,
}

/// Why a handshake ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The bytes are no handshake.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Its proof does not hold.
    #[error("the two sides have different secrets: give every rank the same one")]
    Secret,
}

/// The listening side of one connection.
#[derive(Debug)]
pub struct Acceptor {
    ours: Nonce,
    nonces: Option<Nonces>,
    decoder: FrameDecoder,
}

impl Acceptor {
    /// A connection came in: the state and the first frame to send. `nonce` must be fresh.
    pub fn new(nonce: Nonce) -> Result<(Self, Vec<u8>), HandshakeError> {
        let challenge = message_frame(&Challenge { nonce }, HANDSHAKE_LIMIT)?;
        Ok((Self { ours: nonce, nonces: None, decoder: FrameDecoder::new(HANDSHAKE_LIMIT) }, challenge))
    }

    /// Takes bytes; what the dialer claims once it has proved the secret, `None` while bytes are missing.
    pub fn on_bytes<C: DeserializeOwned>(
        &mut self,
        secret: &Secret,
        bytes: &[u8],
    ) -> Result<Option<C>, HandshakeError> {
        self.decoder.feed(bytes);
        if self.nonces.is_some() {
            return Err(FrameError::Malformed { what: "bytes before the verdict".to_owned() }.into());
        }
        let Some(payload) = self.decoder.next_frame()? else { return Ok(None) };
        let answer: Answer = from_bytes(payload)?;
        let nonces = Nonces { dialer: answer.nonce, acceptor: self.ours };
        if !verify(secret, Role::Dialer, &nonces, &answer.words, &answer.proof) {
            return Err(HandshakeError::Secret);
        }
        self.nonces = Some(nonces);
        Ok(Some(from_bytes(&answer.words)?))
    }

    /// The frame that takes or refuses the dialer; `None` before it has proved the secret.
    pub fn verdict(
        &self,
        secret: &Secret,
        verdict: &Result<(), Refusal>,
    ) -> Result<Option<Vec<u8>>, HandshakeError> {
        let Some(nonces) = &self.nonces else { return Ok(None) };
        let words = to_bytes(verdict)?;
        let proof = prove(secret, Role::Acceptor, nonces, &words);
        Ok(Some(message_frame(&Verdict { words, proof }, HANDSHAKE_LIMIT)?))
    }

    /// The frame for a dialer that did not prove the secret. It says so by a proof that cannot hold: ours would be one
    /// more thing to guess the secret from.
    pub fn rejection() -> Result<Vec<u8>, HandshakeError> {
        Ok(message_frame(&Verdict { words: Vec::new(), proof: Proof::none() }, HANDSHAKE_LIMIT)?)
    }

    /// The bytes that came after the answer.
    pub fn into_decoder(self) -> FrameDecoder {
        self.decoder
    }
}

/// The side that opened the connection.
#[derive(Debug)]
pub struct Dialer {
    ours: Nonce,
    words: Vec<u8>,
    nonces: Option<Nonces>,
    decoder: FrameDecoder,
}

/// What the dialer does next.
#[derive(Debug, PartialEq, Eq)]
pub enum DialerStep {
    /// Wait for more bytes.
    Wait,
    /// Send these bytes, then wait.
    Send(Vec<u8>),
    /// The acceptor has proved the secret and decided.
    Done(Result<(), Refusal>),
}

impl Dialer {
    /// A connection was opened; `nonce` must be fresh. The first frame is the acceptor's.
    pub fn new<C: Serialize>(nonce: Nonce, claims: &C) -> Result<Self, HandshakeError> {
        let words = to_bytes(claims)?;
        Ok(Self { ours: nonce, words, nonces: None, decoder: FrameDecoder::new(HANDSHAKE_LIMIT) })
    }

    /// Takes bytes.
    pub fn on_bytes(&mut self, secret: &Secret, bytes: &[u8]) -> Result<DialerStep, HandshakeError> {
        self.decoder.feed(bytes);
        let Some(payload) = self.decoder.next_frame()? else { return Ok(DialerStep::Wait) };
        let Some(nonces) = &self.nonces else {
            let Challenge { nonce } = from_bytes(payload)?;
            let nonces = Nonces { dialer: self.ours, acceptor: nonce };
            let proof = prove(secret, Role::Dialer, &nonces, &self.words);
            self.nonces = Some(nonces);
            let answer = Answer { nonce: self.ours, words: self.words.clone(), proof };
            return Ok(DialerStep::Send(message_frame(&answer, HANDSHAKE_LIMIT)?));
        };
        let verdict: Verdict = from_bytes(payload)?;
        if !verify(secret, Role::Acceptor, nonces, &verdict.words, &verdict.proof) {
            return Err(HandshakeError::Secret);
        }
        Ok(DialerStep::Done(from_bytes(&verdict.words)?))
    }

    /// The bytes that came after the verdict.
    pub fn into_decoder(self) -> FrameDecoder {
        self.decoder
    }
}
