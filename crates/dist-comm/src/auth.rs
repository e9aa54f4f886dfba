//! Proof of the shared secret: challenge and response with HMAC-SHA256, both sides in turn. The secret itself is never
//! sent and never shown. It owns no socket; `rendezvous/handshake.rs` says who sends what when.

use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// Shortest secret that is taken: 16 bytes.
pub const SECRET_BYTES_MIN: usize = 16;

/// A secret that all ranks of a run share.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

/// Why there is no secret or no nonce.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The secret could be guessed.
    #[error(
        "the secret has {len} bytes, at least {SECRET_BYTES_MIN} are needed: use `head -c 32 /dev/urandom | base64`"
    )]
    WeakSecret {
        /// Its length.
        len: usize,
    },
    /// The operating system gave no random bytes.
    #[error("no random bytes from the operating system: {cause}")]
    Entropy {
        /// Its answer.
        cause: String,
    },
}

impl Secret {
    /// Takes a secret that a person or a launcher chose.
    pub fn new(bytes: &[u8]) -> Result<Self, AuthError> {
        if bytes.len() < SECRET_BYTES_MIN {
            return Err(AuthError::WeakSecret { len: bytes.len() });
        }
        Ok(Self(bytes.to_vec()))
    }

    /// A new secret of 32 random bytes, for ranks that one launcher starts.
    pub fn random() -> Result<Self, AuthError> {
        Ok(Self(random_bytes::<32>()?.to_vec()))
    }

    /// The secret's bytes, for a launcher that hands it to the ranks it starts.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Random bytes that are used once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nonce(pub [u8; 32]);

impl Nonce {
    /// A fresh one from the operating system.
    pub fn random() -> Result<Self, AuthError> {
        random_bytes().map(Self)
    }
}

/// Bytes from the operating system.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], AuthError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| AuthError::Entropy { cause: error.to_string() })?;
    Ok(bytes)
}

/// Which side makes a proof. It is part of the proof, so that nobody's own words can be sent back to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The side that opened the connection.
    Dialer,
    /// The side that listens.
    Acceptor,
}

/// Knowledge of the secret, bound to a role, to both nonces and to the words that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof([u8; 32]);

impl Proof {
    /// One that holds for nothing.
    #[must_use]
    pub const fn none() -> Self {
        Self([0; 32])
    }
}

/// Both sides' nonces of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nonces {
    /// The dialer's.
    pub dialer: Nonce,
    /// The acceptor's.
    pub acceptor: Nonce,
}

/// Proves that `role` knows the secret and says `words` on the connection with these nonces.
#[must_use]
pub fn prove(secret: &Secret, role: Role, nonces: &Nonces, words: &[u8]) -> Proof {
    Proof(mac(secret, role, nonces, words).finalize().into_bytes().into())
}

/// Whether a proof holds; takes the same time wherever it differs.
#[must_use]
pub fn verify(secret: &Secret, role: Role, nonces: &Nonces, words: &[u8], proof: &Proof) -> bool {
    mac(secret, role, nonces, words).verify_slice(&proof.0).is_ok()
}

fn mac(secret: &Secret, role: Role, nonces: &Nonces, words: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&secret.0).expect("HMAC takes keys of any length");
    let role: &[u8; 8] = match role {
        Role::Dialer => b"dialer..",
        Role::Acceptor => b"acceptor",
    };
    // Every part but the last has a fixed length, so that no two inputs run together to the same bytes.
    mac.update(b"dist-comm handshake 1");
    mac.update(role);
    mac.update(&nonces.dialer.0);
    mac.update(&nonces.acceptor.0);
    mac.update(words);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonces() -> Nonces {
        Nonces { dialer: Nonce([1; 32]), acceptor: Nonce([2; 32]) }
    }

    #[test]
    fn a_proof_holds_for_its_own_role_nonces_and_words_only() {
        let secret = Secret::new(&[7; 32]).unwrap();
        let other = Secret::new(&[8; 32]).unwrap();
        let proof = prove(&secret, Role::Dialer, &nonces(), b"words");
        let swapped = Nonces { dialer: nonces().acceptor, acceptor: nonces().dialer };
        assert!(verify(&secret, Role::Dialer, &nonces(), b"words", &proof));
        assert!(!verify(&secret, Role::Acceptor, &nonces(), b"words", &proof), "reflected");
        assert!(!verify(&secret, Role::Dialer, &swapped, b"words", &proof));
        assert!(!verify(&secret, Role::Dialer, &nonces(), b"word", &proof));
        assert!(!verify(&other, Role::Dialer, &nonces(), b"words", &proof));
    }

    #[test]
    fn secrets_are_not_shown_and_not_short() {
        let secret = Secret::new(b"correct horse battery").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert!(matches!(Secret::new(b"short"), Err(AuthError::WeakSecret { len: 5 })));
        assert_ne!(Secret::random().unwrap().expose(), Secret::random().unwrap().expose());
    }

    #[test]
    fn the_mac_is_hmac_sha256_as_published() {
        // RFC 4231, test case 1: what we call is HMAC-SHA256.
        let mut mac = Hmac::<Sha256>::new_from_slice(&[0x0b; 20]).unwrap();
        mac.update(b"Hi There");
        let found = mac.finalize().into_bytes();
        assert_eq!(found[..8], [0xb0, 0x34, 0x4c, 0x61, 0xd8, 0xdb, 0x38, 0x53]);
    }
}
