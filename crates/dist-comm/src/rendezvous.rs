//! How ranks find each other: every rank presents itself to rank 0, which admits whoever knows the secret and holds
//! the same plan and checkpoint, and tells all of them who is there. Pure: connections, bytes and time come in as
//! arguments, effects go out; `rendezvous_io.rs` owns the sockets.

pub mod handshake;
mod roll;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use dist_core::Rank;
use serde::{Deserialize, Serialize};

use self::handshake::{Acceptor, HandshakeError};
use self::roll::Roll;
pub use self::roll::{Refusal, RendezvousError, TurnedAway};
use crate::auth::{Nonce, Secret};
use crate::codec::{CONTROL_LIMIT, message_frame};

/// What a rank says of itself, proved by the secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presentation {
    /// Which rank it is.
    pub rank: Rank,
    /// How many ranks it expects.
    pub world_size: usize,
    /// Hash of its plan, as text.
    pub plan_hash: String,
    /// Hash of its checkpoint, as text.
    pub checkpoint_hash: String,
    /// Which forming of the ranks this is; it grows when survivors form again.
    pub generation: u64,
    /// How the others reach it.
    pub member: Member,
}

/// How a rank is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Where it listens for the other ranks.
    pub addr: SocketAddr,
    /// Names the machine; ranks with the same name share memory.
    pub host: String,
    /// Its process.
    pub pid: u32,
}

/// The last word of a rendezvous, to every admitted rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// All are here.
    Welcome {
        /// A random number that names this run, so that connections between ranks cannot mix with another run's.
        session: [u8; 16],
        /// All ranks in order.
        members: Vec<Member>,
    },
    /// It failed; why, as rank 0 says it.
    Abort {
        /// The sentence.
        why: String,
    },
}

/// What rank 0 waits for.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Rank 0's own presentation; the others must agree with it.
    pub ours: Presentation,
    /// The shared secret.
    pub secret: Secret,
    /// Names this run.
    pub session: [u8; 16],
    /// How long the ranks may take to come.
    pub deadline: Duration,
    /// How long a connection may take to prove the secret.
    pub handshake_deadline: Duration,
    /// How many connections may be unproved at one time; the oldest makes room.
    pub strangers_max: usize,
}

/// A connection, as the driver numbers it; a number is never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// What the driver is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send these bytes.
    Send(ConnId, Vec<u8>),
    /// Close the connection after what was sent.
    Close(ConnId),
    /// Tell the operator.
    Report(Event),
}

/// Something that the operator may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A rank was admitted.
    Admitted(Rank),
    /// A rank that knows the secret was refused.
    Refused(Rank, Refusal),
    /// An admitted rank went away before the others came.
    Left(Rank),
    /// A connection that proved nothing was closed.
    Stranger {
        /// What it did.
        why: String,
    },
}

#[derive(Debug)]
struct Stranger {
    acceptor: Acceptor,
    since: Duration,
}

/// Rank 0's state while the ranks come. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Rendezvous {
    setup: Setup,
    started: Duration,
    strangers: BTreeMap<ConnId, Stranger>,
    turned_away: TurnedAway,
    roll: Roll,
    outcome: Option<Result<Vec<Member>, RendezvousError>>,
}

impl Rendezvous {
    /// Rank 0 is present; with a world of one that is all.
    #[must_use]
    pub fn new(setup: Setup, now: Duration) -> Self {
        let roll = Roll::new(setup.ours.clone());
        let (strangers, turned_away) = (BTreeMap::new(), TurnedAway::default());
        let mut new = Self { setup, started: now, strangers, turned_away, roll, outcome: None };
        if let Some(members) = new.roll.members() {
            new.outcome = Some(Ok(members));
        }
        new
    }

    /// How it ended, once it has.
    #[must_use]
    pub const fn outcome(&self) -> Option<&Result<Vec<Member>, RendezvousError>> {
        self.outcome.as_ref()
    }

    /// The connection of each admitted rank.
    pub fn connections(&self) -> impl Iterator<Item = (Rank, ConnId)> {
        self.roll.connections()
    }

    /// Connections that have proved nothing yet.
    #[must_use]
    pub fn n_strangers(&self) -> usize {
        self.strangers.len()
    }

    /// A connection came in. `nonce` must be fresh.
    pub fn on_connect(&mut self, conn: ConnId, nonce: Nonce, now: Duration) -> Vec<Effect> {
        if self.outcome.is_some() {
            return vec![Effect::Close(conn)];
        }
        let mut effects = Vec::new();
        if self.strangers.len() >= self.setup.strangers_max
            && let Some((&oldest, _)) = self.strangers.iter().min_by_key(|(_, stranger)| stranger.since)
        {
            effects.extend(self.dismiss(oldest, "made room for a newer connection".to_owned()));
        }
        match Acceptor::new(nonce) {
            Ok((acceptor, challenge)) => {
                self.strangers.insert(conn, Stranger { acceptor, since: now });
                effects.push(Effect::Send(conn, challenge));
            }
            Err(error) => effects.extend(self.dismiss(conn, error.to_string())),
        }
        effects
    }

    /// Bytes came, cut anywhere.
    pub fn on_bytes(&mut self, conn: ConnId, bytes: &[u8], now: Duration) -> Vec<Effect> {
        if self.outcome.is_some() {
            return Vec::new();
        }
        let Some(stranger) = self.strangers.get_mut(&conn) else {
            // An admitted rank says nothing until all are here.
            return self.leave(conn, Some("spoke before the welcome"));
        };
        match stranger.acceptor.on_bytes(&self.setup.secret, bytes) {
            Ok(None) => Vec::new(),
            Ok(Some(presentation)) => self.judge(conn, presentation, now),
            Err(error) => {
                let is_secret = error == HandshakeError::Secret;
                let rejection = is_secret.then(Acceptor::rejection).and_then(Result::ok);
                let mut effects: Vec<_> =
                    rejection.map(|frame| Effect::Send(conn, frame)).into_iter().collect();
                effects.extend(self.dismiss(conn, error.to_string()));
                effects
            }
        }
    }

    /// The peer closed the connection, or it failed.
    pub fn on_close(&mut self, conn: ConnId) -> Vec<Effect> {
        if self.outcome.is_some() {
            return Vec::new();
        }
        match self.strangers.remove(&conn) {
            Some(_) => {
                vec![self.report_stranger("closed the connection before it proved the secret".to_owned())]
            }
            None => self.leave(conn, None),
        }
    }

    /// Time passed.
    pub fn on_tick(&mut self, now: Duration) -> Vec<Effect> {
        if self.outcome.is_some() {
            return Vec::new();
        }
        let limit = self.setup.handshake_deadline;
        let late: Vec<_> = (self.strangers.iter())
            .filter(|(_, stranger)| now.saturating_sub(stranger.since) >= limit)
            .map(|(&conn, _)| conn)
            .collect();
        let mut effects = Vec::new();
        for conn in late {
            effects.extend(self.dismiss(conn, format!("proved nothing within {limit:?}")));
        }
        let waited = now.saturating_sub(self.started);
        if waited >= self.setup.deadline {
            effects.extend(self.fail(waited));
        }
        effects
    }

    /// When [`on_tick`](Self::on_tick) has something to do next.
    #[must_use]
    pub fn next_tick(&self) -> Duration {
        let strangers =
            self.strangers.values().map(|stranger| stranger.since + self.setup.handshake_deadline);
        strangers.fold(self.started + self.setup.deadline, Duration::min)
    }

    fn judge(&mut self, conn: ConnId, presentation: Presentation, now: Duration) -> Vec<Effect> {
        let Some(stranger) = self.strangers.remove(&conn) else { return Vec::new() };
        let rank = presentation.rank;
        let verdict = self.roll.admit(conn, presentation);
        let mut effects = Vec::new();
        match stranger.acceptor.verdict(&self.setup.secret, &verdict) {
            Ok(Some(frame)) => effects.push(Effect::Send(conn, frame)),
            Ok(None) | Err(_) => effects.push(Effect::Close(conn)),
        }
        match verdict {
            Ok(()) => {
                effects.push(Effect::Report(Event::Admitted(rank)));
                if let Some(members) = self.roll.members() {
                    effects.extend(self.welcome(members));
                    return effects;
                }
            }
            Err(refusal) => {
                effects.extend([Effect::Close(conn), Effect::Report(Event::Refused(rank, refusal))]);
            }
        }
        if self.roll.is_hopeless() {
            effects.extend(self.fail(now.saturating_sub(self.started)));
        }
        effects
    }

    fn welcome(&mut self, members: Vec<Member>) -> Vec<Effect> {
        let outcome = Outcome::Welcome { session: self.setup.session, members: members.clone() };
        self.outcome = Some(Ok(members));
        self.tell_all(&outcome)
    }

    fn fail(&mut self, waited: Duration) -> Vec<Effect> {
        let error = self.roll.error(waited, self.turned_away.clone());
        let mut effects = self.tell_all(&Outcome::Abort { why: error.to_string() });
        effects.extend(self.connections().map(|(_, conn)| Effect::Close(conn)));
        self.outcome = Some(Err(error));
        effects
    }

    /// The last word to the admitted; whoever is still a stranger is closed.
    fn tell_all(&mut self, outcome: &Outcome) -> Vec<Effect> {
        let strangers = std::mem::take(&mut self.strangers);
        let mut effects: Vec<_> = strangers.into_keys().map(Effect::Close).collect();
        match message_frame(outcome, CONTROL_LIMIT) {
            Ok(frame) => {
                effects.extend(self.connections().map(|(_, conn)| Effect::Send(conn, frame.clone())));
            }
            Err(_) => effects.extend(self.connections().map(|(_, conn)| Effect::Close(conn))),
        }
        effects
    }

    fn dismiss(&mut self, conn: ConnId, why: String) -> Vec<Effect> {
        self.strangers.remove(&conn);
        vec![Effect::Close(conn), self.report_stranger(why)]
    }

    fn report_stranger(&mut self, why: String) -> Effect {
        self.turned_away.count += 1;
        self.turned_away.last.clone_from(&why);
        Effect::Report(Event::Stranger { why })
    }

    fn leave(&mut self, conn: ConnId, why: Option<&str>) -> Vec<Effect> {
        let Some(rank) = self.roll.leave(conn) else { return Vec::new() };
        let close = why.map(|_| Effect::Close(conn));
        close.into_iter().chain([Effect::Report(Event::Left(rank))]).collect()
    }
}
