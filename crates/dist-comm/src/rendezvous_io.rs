//! The sockets of a rendezvous: rank 0 drives the state machine of `rendezvous.rs`, the others dial. Every wait has a
//! deadline, every socket has `TCP_NODELAY`.

pub(crate) mod dial;
mod host;

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dist_core::Rank;

use crate::auth::{Secret, random_bytes};
use crate::codec::{CONTROL_LIMIT, FrameDecoder, from_bytes};
use crate::deadline::Deadline;
use crate::rendezvous::{Member, Outcome, Presentation, RendezvousError};
use dial::{DialError, dial, read_frame};

pub(crate) use host::host;

/// How long a connection may take to prove the secret.
pub(crate) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);

/// Pauses between two attempts to reach a rank: the first and the longest.
const RETRIES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(500)];

/// Whether ranks of one machine share memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedMemory {
    /// Where they can.
    Use,
    /// Never: everything goes over TCP.
    Avoid,
}

/// What a rank brings to a rendezvous.
#[derive(Clone, Debug)]
pub struct JoinRequest {
    /// Which rank it is.
    pub rank: Rank,
    /// How many ranks there are.
    pub world_size: usize,
    /// Which forming of the ranks this is.
    pub generation: u64,
    /// Hash of the plan, as text.
    pub plan_hash: String,
    /// Hash of the checkpoint, as text.
    pub checkpoint_hash: String,
    /// The secret that all ranks share.
    pub secret: Secret,
    /// How long the ranks may take to find each other.
    pub deadline: Duration,
    /// Whether ranks of one machine share memory.
    pub shared_memory: SharedMemory,
}

/// What came of a rendezvous: who is there, and a connection between rank 0 and each other rank.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) session: [u8; 16],
    pub(crate) members: Vec<Member>,
    /// Where the other ranks reach us.
    pub(crate) listener: TcpListener,
    /// Rank 0: to every other rank. Others: to rank 0.
    pub(crate) lines: Vec<(Rank, TcpStream, FrameDecoder)>,
}

pub(crate) fn local_error(what: &str, cause: &dyn std::fmt::Display) -> RendezvousError {
    RendezvousError::Local { what: what.to_owned(), cause: cause.to_string() }
}

/// What this rank says of itself; its data listener is bound beside the address by which it reaches rank 0.
fn present(request: &JoinRequest, ip: IpAddr) -> std::io::Result<(Presentation, TcpListener)> {
    let listener = TcpListener::bind((ip, 0))?;
    let member = Member {
        addr: listener.local_addr()?,
        host: machine(request.shared_memory),
        pid: std::process::id(),
    };
    let presentation = Presentation {
        rank: request.rank,
        world_size: request.world_size,
        plan_hash: request.plan_hash.clone(),
        checkpoint_hash: request.checkpoint_hash.clone(),
        generation: request.generation,
        member,
    };
    Ok((presentation, listener))
}

/// Names what ranks must have in common to share memory: one kernel, one set of processes, one network.
fn machine(shared_memory: SharedMemory) -> String {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned());
    let space = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}"));
    let name = read("/proc/sys/kernel/hostname").unwrap_or_else(|_| "machine".to_owned());
    if let (SharedMemory::Use, Ok(boot), Ok(pid), Ok(net)) =
        (shared_memory, read("/proc/sys/kernel/random/boot_id"), space("pid"), space("net"))
    {
        return format!("{name} {boot} {} {}", pid.display(), net.display());
    }
    // A name that nobody else has. Without random bytes the port and the process still tell ranks apart.
    let own = random_bytes::<16>().map_or_else(|_| u128::from(std::process::id()), u128::from_le_bytes);
    format!("{name} {own:032x}")
}

/// Joins as any rank but 0: tries every address of rank 0 until one answers.
pub(crate) fn join(master: &[SocketAddr], request: &JoinRequest) -> Result<Joined, RendezvousError> {
    let deadline = Deadline::after(request.deadline);
    let mut pause = RETRIES[0];
    let mut cause = "no address to try".to_owned();
    let addr = master.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
    while !deadline.is_over() {
        for &at in master {
            match try_join(at, request, &deadline) {
                Ok(joined) => return Ok(joined),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again(found)) => cause = found,
            }
        }
        std::thread::sleep(pause.min(deadline.left()));
        pause = (pause * 2).min(RETRIES[1]);
    }
    Err(RendezvousError::Unreachable { addr, waited: deadline.waited(), cause })
}

enum Attempt {
    Final(RendezvousError),
    Again(String),
}

fn try_join(at: SocketAddr, request: &JoinRequest, deadline: &Deadline) -> Result<Joined, Attempt> {
    let again = |cause: &dyn std::fmt::Display| Attempt::Again(cause.to_string());
    let mut bound = None;
    let claims = |stream: &TcpStream| {
        let (presentation, listener) = present(request, stream.local_addr()?.ip())?;
        bound = Some(listener);
        Ok(presentation)
    };
    let (mut stream, mut decoder) = match dial(at, &request.secret, claims, deadline, || false) {
        Ok(line) => line,
        Err(DialError::Refused(refusal)) => {
            return Err(Attempt::Final(RendezvousError::Refused { rank: request.rank, refusal }));
        }
        Err(DialError::Foreign(cause)) => {
            let (addr, waited) = (at.to_string(), deadline.waited());
            return Err(Attempt::Final(RendezvousError::Unreachable { addr, waited, cause }));
        }
        Err(DialError::Failed(cause)) => return Err(Attempt::Again(cause)),
    };
    let Some(listener) = bound else { return Err(again(&"no listener")) };
    decoder.set_limit(CONTROL_LIMIT);
    // Rank 0 decides by its own deadline; ours ends a little later, so that its words reach us.
    let outcome = Deadline::after(deadline.left() + Duration::from_secs(1));
    let payload = read_frame(&mut stream, &mut decoder, &outcome)
        .map_err(|error| again(&format!("no word from rank 0 after it took us: {error}")))?;
    match from_bytes::<Outcome>(&payload) {
        Ok(Outcome::Welcome { session, mut members }) => {
            // Rank 0 may listen on every interface; it is where we have found it.
            if let Some(first) = members.first_mut()
                && first.addr.ip().is_unspecified()
            {
                first.addr.set_ip(at.ip());
            }
            Ok(Joined { session, members, listener, lines: vec![(Rank(0), stream, decoder)] })
        }
        Ok(Outcome::Abort { why }) => Err(Attempt::Final(RendezvousError::Aborted { why })),
        Err(error) => Err(again(&error)),
    }
}

/// Time since `start`, as the state machine counts it.
fn since(start: Instant) -> Duration {
    start.elapsed()
}
