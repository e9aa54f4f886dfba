//! The meeting: rank 0 listens, local ranks are started, all find each other or somebody says why not.

use std::net::SocketAddr;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use dist_comm::rendezvous::RendezvousError;
use dist_comm::{Comm, GroupOptions, JoinRequest, SharedMemory, Solo, World};
use dist_core::plan::{MAX_TOP, Plan};
use dist_core::{Coord, Mesh, Rank};
use dist_models::engine::EngineError;
use dist_models::rank::RankLost;
use dist_models::runner::Comms;

use super::address;
use super::local::{Ended, LocalRanks, Orders};
use super::place::{How, Launch};
use crate::problem::Problem;
use crate::render::Console;

/// How often local ranks are looked at while all meet.
const LOOK: Duration = Duration::from_millis(20);

/// How long rank 0 may take to say why it refused a local rank that has ended.
const AFTERTHOUGHT: Duration = Duration::from_millis(500);

/// What all ranks must have in common.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Of the split.
    pub plan: String,
    /// Of the files.
    pub checkpoint: String,
}

/// Ranks that have met.
#[derive(Debug)]
pub struct Team {
    /// This rank's place among all.
    pub world: World,
    /// The ranks that this process started.
    pub locals: LocalRanks,
}

impl Launch {
    /// Starts the ranks that this process is to start, and waits until all ranks have met.
    pub fn meet(&self, identity: &Identity, console: &Console) -> anyhow::Result<Team> {
        let secret = self.secret()?;
        let request = JoinRequest {
            rank: self.rank,
            world_size: self.world_size(),
            generation: 0,
            plan_hash: identity.plan.clone(),
            checkpoint_hash: identity.checkpoint.clone(),
            secret,
            deadline: self.request.rendezvous_timeout,
            shared_memory: if self.request.shares_memory { SharedMemory::Use } else { SharedMemory::Avoid },
        };
        if !matches!(self.how, How::Child(_)) {
            console.of_rank(self.rank, &format!("pid {}", std::process::id()));
        }
        let start = Instant::now();
        let mut locals = LocalRanks::default();
        let meeting = if self.rank == Rank(0) {
            let listener = self.listen()?;
            let at = listener.local_addr()?;
            self.announce(at, console);
            self.start_locals(&[at], &request, console, &mut locals)?;
            begin(move || World::host(&listener, &request))
        } else {
            let at = self.master_addrs()?;
            self.start_locals(&at, &request, console, &mut locals)?;
            begin(move || World::join(&at, &request))
        };
        let world = self.await_all(&meeting, &mut locals)?;
        console.of_rank(
            self.rank,
            &format!("met {} ranks in {:.3} s", self.world_size(), start.elapsed().as_secs_f64()),
        );
        Ok(Team { world, locals })
    }

    fn listen(&self) -> anyhow::Result<std::net::TcpListener> {
        let loopback = super::environment::Master { host: "127.0.0.1".to_owned(), port: 0 };
        let other_node = match &self.how {
            How::Other(launched) => launched.other_node.as_deref(),
            How::User(_) | How::Child(_) => None,
        };
        let master = match &self.how {
            How::User(None) => &loopback,
            _ => self.master.as_ref().unwrap_or(&loopback),
        };
        address::listen(master, other_node)
    }

    fn master_addrs(&self) -> anyhow::Result<Vec<SocketAddr>> {
        match (&self.how, &self.master) {
            (How::Child(orders), _) => Ok(orders.master.clone()),
            (_, Some(master)) if master.port != 0 => address::resolve(master),
            _ => {
                let problem = Problem::usage("--master with port 0 is for the first machine only");
                Err(problem.help("rank 0 says which port it has taken").into())
            }
        }
    }

    /// Who has started the ranks, in one line; for machines that are started by hand, how.
    fn announce(&self, at: SocketAddr, console: &Console) {
        match &self.how {
            How::Other(launched) => {
                let (rank, size) = (launched.rank_variable(), launched.size_variable());
                console.note(&format!(
                    "ranks started by {} ({rank}, {size}), meeting at {at}",
                    launched.by.name()
                ));
            }
            How::User(Some(nodes)) => {
                console.note(&format!("rank 0 listens at {at}; start the other machines with:"));
                for node_rank in 1..nodes.n_nodes {
                    let args = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
                    console.note(&format!("  {}", command_of_node(args, nodes.n_nodes, node_rank, at)));
                }
            }
            How::User(None) | How::Child(_) => {}
        }
    }

    fn start_locals(
        &self,
        master: &[SocketAddr],
        request: &JoinRequest,
        console: &Console,
        locals: &mut LocalRanks,
    ) -> anyhow::Result<()> {
        let How::User(_) = self.how else { return Ok(()) };
        for local_rank in 1..self.local_size {
            let orders = Orders {
                rank: self.rank.0 + local_rank,
                world_size: self.world_size(),
                local_rank,
                local_size: self.local_size,
                master: master.to_vec(),
                secret: request.secret.expose().to_vec(),
            };
            locals.start(&orders, console)?;
        }
        Ok(())
    }

    /// A local rank that ends before all have met need not be waited for.
    fn await_all(&self, meeting: &Meeting, locals: &mut LocalRanks) -> anyhow::Result<World> {
        loop {
            match meeting.recv_timeout(LOOK) {
                Ok(Ok(world)) => return Ok(world),
                Ok(Err(error)) => {
                    locals.give_up();
                    return Err(self.no_meeting(&error, locals.ended()).into());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Problem::failed("the meeting of the ranks broke off").into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(ended) = locals.ended() {
                locals.give_up();
                return match meeting.recv_timeout(AFTERTHOUGHT) {
                    Ok(Ok(world)) => Ok(world),
                    Ok(Err(error)) => Err(self.no_meeting(&error, Some(ended)).into()),
                    Err(_) => {
                        let what = format!("{} {} before all ranks had met", ended.rank, ended.how);
                        Err(with_words(Problem::failed(what), ended).into())
                    }
                };
            }
        }
    }

    fn no_meeting(&self, error: &RendezvousError, ended: Option<Ended>) -> Problem {
        let help = match error {
            RendezvousError::Incomplete { missing, .. } if missing.is_empty() => {
                "start all ranks with the same flags, the same files and the same program".to_owned()
            }
            RendezvousError::Incomplete { .. } => {
                "start the missing ranks, or give them longer: --rendezvous-timeout SECONDS".to_owned()
            }
            RendezvousError::Unreachable { .. } => {
                "see whether rank 0 runs, at that address, and with the same secret".to_owned()
            }
            _ => format!("see what rank 0 says; this is {}", self.rank),
        };
        let problem = Problem::failed(error.to_string()).help(help);
        // A rank that was refused says so itself, which is known already.
        let is_told = matches!(error, RendezvousError::Incomplete { refused, .. } if !refused.is_empty());
        match ended.filter(|_| !is_told) {
            Some(ended) => with_words(problem, ended),
            None => problem,
        }
    }
}

fn with_words(problem: Problem, ended: Ended) -> Problem {
    let problem = match ended.help {
        Some(help) => problem.help(help),
        None => problem,
    };
    match ended.words {
        Some(words) => problem.because(anyhow::anyhow!("{words}")),
        None => problem,
    }
}

type Meeting = mpsc::Receiver<Result<World, RendezvousError>>;

/// Meets beside, so that this thread can see to its local ranks.
fn begin(meet: impl FnOnce() -> Result<World, RendezvousError> + Send + 'static) -> Meeting {
    let (done, meeting) = mpsc::channel();
    std::thread::spawn(move || {
        // Nobody waits any more where a local rank has ended.
        let _ = done.send(meet());
    });
    meeting
}

/// A command line for another machine, from that of this one.
fn command_of_node(
    args: impl Iterator<Item = String>,
    n_nodes: usize,
    node_rank: usize,
    master: SocketAddr,
) -> String {
    let own = ["--nnodes", "--node-rank", "--master"];
    let (mut words, mut args) = (Vec::new(), args);
    while let Some(word) = args.next() {
        if own.contains(&word.as_str()) {
            args.next();
        } else if !own.iter().any(|flag| word.strip_prefix(flag).is_some_and(|rest| rest.starts_with('='))) {
            words.push(quoted(&word));
        }
    }
    let (n_nodes, node_rank, master) = (n_nodes.to_string(), node_rank.to_string(), master.to_string());
    words.extend([own[0], &n_nodes, own[1], &node_rank, own[2], &master].map(str::to_owned));
    words.join(" ")
}

/// As a shell reads it back.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

impl Team {
    /// The groups of this rank, one a mesh axis.
    pub fn comms(&mut self, plan: &Plan, deadline: Duration) -> anyhow::Result<Comms> {
        let Coord { tp: column, pp: stage, .. } = plan.mesh.coord(self.world.rank());
        let rank = |tp, pp| plan.mesh.rank(Coord { tp, pp, dp: 0 });
        let Mesh { tp: n_tp, pp: n_pp, .. } = plan.mesh;
        let sharers: Vec<_> = (0..n_tp).map(|tp| rank(tp, stage)).collect();
        let stages: Vec<_> = (0..n_pp).map(|pp| rank(column, pp)).collect();
        let rows = plan.limits.max_batch_tokens * plan.model.d_model;
        let drawn = plan.limits.max_sample_rows * (2 + 2 * MAX_TOP);
        let messages = GroupOptions::messages(deadline, 4 * rows.max(drawn));
        let tp =
            self.group(&format!("layers of stage {stage}"), &sharers, GroupOptions::collectives(deadline))?;
        let pp = self.group(&format!("stages of column {column}"), &stages, messages)?;
        Ok(Comms { tp, pp })
    }

    fn group(&mut self, name: &str, ranks: &[Rank], options: GroupOptions) -> anyhow::Result<Comm> {
        if ranks.len() == 1 {
            return Ok(Comm::Solo(Solo::new()));
        }
        let tcp = self.world.connect(name, ranks, options)?.expect("every rank is in its own groups");
        Ok(tcp.into())
    }
}

/// The loss of a rank as people meet it, with what its process left behind if it was ours.
pub fn lost_problem(lost: &RankLost, locals: &mut LocalRanks) -> Problem {
    let problem = Problem::failed(lost.to_string());
    let ended = lost.ranks().into_iter().find_map(|rank| locals.end_of(rank));
    match ended {
        // Its own words are in the sentence already.
        Some(Ended { rank, how, .. }) => problem.because(anyhow::anyhow!("the process of {rank} {how}")),
        None => problem,
    }
}

/// An engine's error, with the loss of a rank put into words.
pub fn explain(error: anyhow::Error, locals: &mut LocalRanks) -> anyhow::Error {
    let lost = error.downcast_ref::<EngineError>().and_then(EngineError::lost);
    locals.give_up();
    lost.map_or(error, |lost| lost_problem(&lost, locals).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_for_another_machine_can_be_pasted() {
        let own =
            ["dist-cli", "infer", "--nnodes=2", "--prompt", "It's $5", "--master", "a:0", "--node-rank", "0"];
        let at: SocketAddr = "192.0.2.7:4000".parse().unwrap();
        let told = command_of_node(own.map(str::to_owned).into_iter(), 2, 1, at);
        let expected =
            r"dist-cli infer --prompt 'It'\''s $5' --nnodes 2 --node-rank 1 --master 192.0.2.7:4000";
        assert_eq!(told, expected);
    }
}
