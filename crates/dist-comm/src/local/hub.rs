//! What the ranks of one process share: where each one is, and mailboxes. All waiting is here.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use dist_core::Rank;

use crate::call::{Call, Op};
use crate::error::{CommError, Departure, Missing, Seen};

/// Messages that one rank may be ahead of another's receiving before its next send waits.
const MAX_AHEAD: usize = 8;

/// One rank as the others see it.
#[derive(Debug, Default)]
struct Member {
    /// The collective that it entered last.
    entered: Option<Call>,
    /// Its last call of any kind, and when it was there.
    seen: Option<(Call, Instant)>,
    left: Option<Departure>,
}

/// Messages from one rank to another.
#[derive(Debug, Default)]
struct Channel {
    queue: VecDeque<(Call, Vec<u8>)>,
    /// Memory of messages that were taken, for the next ones.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct State {
    members: Vec<Member>,
    /// `[from · n + to]`.
    channels: Vec<Channel>,
}

/// Meeting point of the ranks of one communicator.
#[derive(Debug)]
pub(super) struct Hub {
    /// The ranks of the world that meet here, for messages.
    names: Vec<Rank>,
    state: Mutex<State>,
    changed: Condvar,
    /// What each rank brings to a collective, for even and for odd numbers: a rank that is at call `k` knows that all
    /// have finished call `k − 2`, so it may overwrite what it brought then.
    parts: Vec<[RwLock<Vec<u8>>; 2]>,
}

/// A lock whose holder panicked is still good: every section under it leaves whole values behind.
fn whole<T>(lock: Result<T, PoisonError<T>>) -> T {
    lock.unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    pub(super) fn new(names: Vec<Rank>) -> Self {
        let n = names.len();
        let state = State {
            members: (0..n).map(|_| Member::default()).collect(),
            channels: (0..n * n).map(|_| Channel::default()).collect(),
        };
        let parts = (0..n).map(|_| [RwLock::new(Vec::new()), RwLock::new(Vec::new())]).collect();
        Self { names, state: Mutex::new(state), changed: Condvar::new(), parts }
    }

    pub(super) fn n(&self) -> usize {
        self.names.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        whole(self.state.lock())
    }

    /// Keeps what `me` brings to call `number`.
    pub(super) fn bring(&self, me: usize, number: u64, bytes: &[u8]) {
        let mut part = whole(self.parts[me][(number % 2) as usize].write());
        part.clear();
        part.extend_from_slice(bytes);
    }

    /// What all ranks brought to call `number`, after they met in it.
    pub(super) fn parts(&self, number: u64) -> Vec<RwLockReadGuard<'_, Vec<u8>>> {
        self.parts.iter().map(|part| whole(part[(number % 2) as usize].read())).collect()
    }

    /// Waits until `ready` gives a result or the deadline has passed; `late` then says what was waited for.
    fn wait<T>(
        &self,
        deadline: Duration,
        mut ready: impl FnMut(&mut State) -> Option<Result<T, CommError>>,
        late: impl FnOnce(&State) -> CommError,
    ) -> Result<T, CommError> {
        let end = Instant::now().checked_add(deadline);
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&mut state) {
                return result;
            }
            let Some(end) = end else {
                state = whole(self.changed.wait(state));
                continue;
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late(&state));
            }
            state = whole(self.changed.wait_timeout(state, left)).0;
        }
    }

    /// Enters a collective and waits until all others are in it too.
    pub(super) fn meet(&self, me: usize, call: Call, deadline: Duration) -> Result<(), CommError> {
        {
            let mut state = self.lock();
            state.members[me].entered = Some(call);
            state.members[me].seen = Some((call, Instant::now()));
        }
        self.changed.notify_all();
        let ready = |state: &mut State| {
            let result = self.all_entered(state, me, &call)?;
            state.members[me].seen = Some((call, Instant::now()));
            Some(result)
        };
        let late = |state: &State| {
            let missing = absent(&state.members, call.number).map(|idx| self.missing(state, idx)).collect();
            CommError::Timeout { call: Box::new(self.named(call)), missing, waited: deadline }
        };
        self.wait(deadline, ready, late)
    }

    /// `None` while somebody may still come.
    fn all_entered(&self, state: &State, me: usize, call: &Call) -> Option<Result<(), CommError>> {
        for (idx, member) in state.members.iter().enumerate() {
            // A rank that is further on has agreed with our entry already.
            if let Some(theirs) = member.entered.filter(|theirs| theirs.number == call.number)
                && !theirs.agrees(call)
            {
                return Some(Err(self.mismatch(me, call, idx, theirs)));
            }
        }
        let mut waiting = false;
        for idx in absent(&state.members, call.number) {
            if let Some(why) = &state.members[idx].left {
                return Some(Err(self.lost(state, idx, call, why)));
            }
            waiting = true;
        }
        (!waiting).then_some(Ok(()))
    }

    /// Leaves `bytes` for `to`, waiting while it is too far behind.
    pub(super) fn send(
        &self,
        me: usize,
        (to, bytes): (usize, &[u8]),
        call: Call,
        deadline: Duration,
    ) -> Result<(), CommError> {
        let at = me * self.n() + to;
        let mut message = {
            let mut state = self.lock();
            state.members[me].seen = Some((call, Instant::now()));
            state.channels[at].spare.pop().unwrap_or_default()
        };
        message.clear();
        message.extend_from_slice(bytes);
        let mut message = Some(message);
        let ready = |state: &mut State| {
            if let Some(why) = &state.members[to].left {
                return Some(Err(self.lost(state, to, &call, why)));
            }
            if state.channels[at].queue.len() >= MAX_AHEAD {
                return None;
            }
            state.channels[at].queue.extend(message.take().map(|message| (call, message)));
            self.changed.notify_all();
            Some(Ok(()))
        };
        self.wait(deadline, ready, |state| self.timeout(state, to, call, deadline))
    }

    /// Takes the next message of `from`; what was sent before its sender left still counts.
    pub(super) fn recv(
        &self,
        me: usize,
        (from, bytes): (usize, &mut [u8]),
        call: Call,
        deadline: Duration,
    ) -> Result<(), CommError> {
        let at = from * self.n() + me;
        self.lock().members[me].seen = Some((call, Instant::now()));
        let ready = |state: &mut State| {
            if let Some(message) = state.channels[at].queue.pop_front() {
                return Some(Ok(message));
            }
            let why = state.members[from].left.as_ref()?;
            Some(Err(self.lost(state, from, &call, why)))
        };
        let (sent, message) =
            self.wait(deadline, ready, |state| self.timeout(state, from, call, deadline))?;
        self.changed.notify_all();
        if !sent.carries(&call) {
            return Err(self.mismatch(me, &call, from, sent));
        }
        bytes.copy_from_slice(&message);
        self.lock().channels[at].spare.push(message);
        Ok(())
    }

    /// Tells all that `me` will make no more calls; the first reason stays.
    pub(super) fn leave(&self, me: usize, why: Departure) {
        self.lock().members[me].left.get_or_insert(why);
        self.changed.notify_all();
    }

    fn missing(&self, state: &State, idx: usize) -> Missing {
        let seen = state.members[idx].seen;
        let last = seen.map(|(call, at)| Seen { call: self.named(call), ago: at.elapsed() });
        Missing { rank: self.names[idx], last }
    }

    fn lost(&self, state: &State, idx: usize, call: &Call, why: &Departure) -> CommError {
        let Missing { rank, last } = self.missing(state, idx);
        let call = Box::new(self.named(*call));
        CommError::RankLost { rank, call, last: last.map(Box::new), why: why.clone() }
    }

    fn mismatch(&self, me: usize, ours: &Call, idx: usize, theirs: Call) -> CommError {
        CommError::Mismatch {
            our_rank: self.names[me],
            ours: Box::new(self.named(*ours)),
            their_rank: self.names[idx],
            theirs: Box::new(self.named(theirs)),
        }
    }

    fn timeout(&self, state: &State, idx: usize, call: Call, waited: Duration) -> CommError {
        let missing = Vec::from([self.missing(state, idx)]);
        CommError::Timeout { call: Box::new(self.named(call)), missing, waited }
    }

    /// The call with ranks of the world instead of places in this communicator.
    fn named(&self, call: Call) -> Call {
        let name = |rank: Rank| self.names.get(rank.0).copied().unwrap_or(rank);
        let op = match call.op {
            Op::Broadcast { root } => Op::Broadcast { root: name(root) },
            Op::Send { to } => Op::Send { to: name(to) },
            Op::Recv { from } => Op::Recv { from: name(from) },
            op => op,
        };
        Call { op, ..call }
    }
}

/// Who has not entered call `number` yet.
fn absent(members: &[Member], number: u64) -> impl Iterator<Item = usize> {
    let is_absent = move |member: &Member| member.entered.is_none_or(|call| call.number < number);
    members.iter().enumerate().filter(move |(_, member)| is_absent(member)).map(|(idx, _)| idx)
}
