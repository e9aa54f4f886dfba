//! This process's place among the ranks, from flags, orders and the environment of other launchers.

use std::path::Path;

use dist_core::plan::Plan;
use dist_core::{Mesh, ModelConfig, Rank};

use super::environment::{Launched, Master, Variables, detect};
use super::local::{Orders, orders};
use super::{address, secret};
use crate::flags::{Degrees, DeviceRequest, MeshRequest, Nodes};
use crate::machine;
use crate::problem::Problem;

/// How the model is split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// The degrees.
    pub mesh: Mesh,
    /// Layers of each stage, where that was asked for.
    pub stages: Option<Vec<usize>>,
}

/// Who has started this process, and whom it starts.
#[derive(Clone, Debug)]
pub(super) enum How {
    /// The user. It starts all other ranks of this machine, and may be one machine of several.
    User(Option<Nodes>),
    /// This program.
    Child(Orders),
    /// Another program, which has started all other ranks as well.
    Other(Launched),
}

/// A process's place among the ranks.
#[derive(Clone, Debug)]
pub struct Launch {
    /// How the model is split.
    pub split: Split,
    /// Which rank this process is.
    pub rank: Rank,
    /// Which one it is on its machine.
    pub local_rank: usize,
    /// Ranks on its machine.
    pub local_size: usize,
    /// What was asked for.
    pub request: MeshRequest,
    pub(super) how: How,
    pub(super) master: Option<Master>,
    planned_for: Option<ModelConfig>,
}

impl Launch {
    /// Decides from the flags and this process's environment and orders.
    pub fn of(request: &MeshRequest) -> anyhow::Result<Self> {
        let vars = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let (degrees, planned_for) = degrees(request)?;
        let how = how(request, orders()?, &vars.collect())?;
        let place = place(&degrees, &how)?;
        let master = request.master.as_deref().map(address::parse).transpose()?;
        let master = match &how {
            How::Other(launched) => launched_master(launched, master)?,
            How::User(_) | How::Child(_) => master,
        };
        let Place { mesh, rank, local_rank, local_size } = place;
        let split = Split { mesh, stages: degrees.stages };
        Ok(Self {
            split,
            rank: Rank(rank),
            local_rank,
            local_size,
            request: request.clone(),
            how,
            master,
            planned_for,
        })
    }

    /// Ranks in all.
    pub fn world_size(&self) -> usize {
        self.split.mesh.world_size()
    }

    /// Where rank 0 listens, if that was given or agreed on.
    pub fn meets_at(&self) -> Option<String> {
        self.master.as_ref().map(|Master { host, port }| format!("{host}:{port}"))
    }

    /// Whether this process does what rank 0 tells it, and nothing else.
    pub fn is_follower(&self) -> bool {
        self.rank != Rank(0)
    }

    /// This rank's share of its machine: ranks of one machine share the cores, each has at least one. A launcher that
    /// binds ranks to cores has shared them already.
    pub fn share(&self, device: DeviceRequest) -> DeviceRequest {
        if matches!(self.how, How::Other(_)) && !device.is_chosen && machine::is_bound_by_parent() {
            return device;
        }
        let (all, n) = (device.threads, self.local_size);
        let one_more = usize::from(self.local_rank < all % n);
        DeviceRequest { threads: (all / n + one_more).max(1), ..device }
    }

    /// A plan from a file is for one model.
    pub fn check_model(&self, config: &ModelConfig) -> anyhow::Result<()> {
        let Some(planned) = &self.planned_for else { return Ok(()) };
        // The name is the folder's, which may differ from machine to machine.
        if *planned == (ModelConfig { name: planned.name.clone(), ..config.clone() }) {
            return Ok(());
        }
        let what = format!("the plan is for {}, the model is {} of another shape", planned.name, config.name);
        let help = "plan again for this model: dist-cli plan --model … --json";
        Err(Problem::usage(what).help(help).into())
    }

    /// The secret, and whether the user gave it.
    pub(super) fn secret(&self) -> anyhow::Result<dist_comm::auth::Secret> {
        if let How::Child(orders) = &self.how {
            return Ok(dist_comm::auth::Secret::new(&orders.secret)?);
        }
        if let Some(given) = secret::given(self.request.secret_file.as_deref())? {
            return Ok(given);
        }
        match &self.how {
            How::User(None) => secret::random(),
            How::Other(launched) if launched.is_one_machine => secret::of_user(),
            _ => {
                let problem = Problem::usage("ranks on several machines need a secret that they share");
                Err(problem.help(secret::HOW_TO).into())
            }
        }
    }
}

/// The split that was asked for by flags or by a plan, and the model of that plan.
fn degrees(request: &MeshRequest) -> anyhow::Result<(Degrees, Option<ModelConfig>)> {
    let Some(path) = &request.plan else { return Ok((request.degrees.clone(), None)) };
    let plan = read_plan(path)?;
    if plan.mesh.dp > 1 {
        let what = format!("{} plans {} copies of the model", path.display(), plan.mesh.dp);
        return Err(Problem::usage(what).help("start each copy by itself, with a plan for one").into());
    }
    let degrees = Degrees { tp: Some(plan.mesh.tp), pp: Some(plan.mesh.pp), stages: Some(plan.stages) };
    Ok((degrees, Some(plan.model)))
}

/// A plan has a few kilobytes; the reasons beside it a few for every split.
const PLAN_BYTES_MAX: u64 = 64 << 20;

/// What `dist-cli plan --json` writes, or the plan in it alone.
pub fn read_plan(path: &Path) -> anyhow::Result<Plan> {
    let cannot = |why: anyhow::Error| {
        let problem = Problem::usage(format!("--plan {} cannot be used", path.display()));
        problem.because(why).help("write one with: dist-cli plan --model … --tp N --pp N --json > FILE")
    };
    // A pipe would be waited for, and a device never ends.
    let metadata = std::fs::metadata(path).map_err(|error| cannot(error.into()))?;
    if !metadata.is_file() || metadata.len() > PLAN_BYTES_MAX {
        return Err(cannot(anyhow::anyhow!("it is no regular file of at most {PLAN_BYTES_MAX} bytes")).into());
    }
    let text = std::fs::read_to_string(path).map_err(|error| cannot(error.into()))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| cannot(error.into()))?;
    let plan = value.get("best").and_then(|best| best.get("plan")).unwrap_or(&value);
    serde_json::from_value(plan.clone()).map_err(|error| cannot(error.into()).into())
}

/// Our own orders come first, then a launcher's variables, then the user.
fn how(request: &MeshRequest, orders: Option<Orders>, vars: &Variables) -> Result<How, Problem> {
    if let Some(orders) = orders {
        return Ok(How::Child(orders));
    }
    let Some(launched) = detect(vars)? else { return Ok(How::User(request.nodes)) };
    match request.nodes {
        None => Ok(How::Other(launched)),
        Some(Nodes { n_nodes, node_rank }) => {
            let flags = format!("--nnodes {n_nodes} --node-rank {node_rank}");
            let (by, rank) = (launched.by.name(), launched.rank_variable());
            let problem = Problem::usage(format!("{flags} and {rank} ({by}) contradict each other"));
            Err(problem.help(format!("{by} has started all ranks already: leave the flags out")))
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Place {
    mesh: Mesh,
    rank: usize,
    local_rank: usize,
    local_size: usize,
}

fn place(degrees: &Degrees, how: &How) -> Result<Place, Problem> {
    match how {
        How::User(None) => {
            let mesh = mesh(degrees, None)?;
            Ok(Place { mesh, rank: 0, local_rank: 0, local_size: mesh.world_size() })
        }
        How::User(Some(Nodes { n_nodes, node_rank })) => {
            let mesh = mesh(degrees, None)?;
            let local_size = dist_core::shape::div_exact(mesh.world_size(), *n_nodes).ok_or_else(|| {
                let what =
                    format!("{} ranks cannot be dealt evenly to --nnodes {n_nodes}", mesh.world_size());
                Problem::usage(what).help("choose --tp and --pp so that every machine gets as many ranks")
            })?;
            Ok(Place { mesh, rank: node_rank * local_size, local_rank: 0, local_size })
        }
        How::Child(orders) => Ok(Place {
            mesh: mesh(degrees, None)?,
            rank: orders.rank,
            local_rank: orders.local_rank,
            local_size: orders.local_size,
        }),
        How::Other(launched) => Ok(Place {
            mesh: mesh(degrees, Some(launched))?,
            rank: launched.rank,
            local_rank: launched.local_rank,
            local_size: launched.local_size.unwrap_or(if launched.is_one_machine {
                launched.world_size
            } else {
                1
            }),
        }),
    }
}

/// The degrees; what is not given is 1, or fills up the ranks that a launcher has started.
fn mesh(degrees: &Degrees, launched: Option<&Launched>) -> Result<Mesh, Problem> {
    let (tp, pp) = (degrees.tp, degrees.pp);
    let Some(launched) = launched else {
        return Ok(Mesh { tp: tp.unwrap_or(1), pp: pp.unwrap_or(1), dp: 1 });
    };
    let world_size = launched.world_size;
    let given = tp.unwrap_or(1) * pp.unwrap_or(1);
    let rest = dist_core::shape::div_exact(world_size, given)
        .filter(|&rest| rest == 1 || tp.is_none() || pp.is_none());
    match (rest, tp, pp) {
        (Some(rest), None, _) => Ok(Mesh { tp: rest, pp: pp.unwrap_or(1), dp: 1 }),
        (Some(rest), Some(tp), None) => Ok(Mesh { tp, pp: rest, dp: 1 }),
        (Some(_), Some(tp), Some(pp)) => Ok(Mesh { tp, pp, dp: 1 }),
        (None, ..) => {
            let flags = [("--tp", tp), ("--pp", pp)];
            let flags = flags.iter().filter_map(|(flag, n)| Some(format!("{flag} {}", (*n)?)));
            let flags = flags.collect::<Vec<_>>().join(" ");
            let size = launched.size_variable();
            let problem =
                Problem::usage(format!("{flags} and {size} ({}) contradict each other", launched.by.name()));
            Err(problem.help(format!("start {given} ranks, or choose degrees whose product is {world_size}")))
        }
    }
}

/// Where rank 0 listens under a launcher. torchrun says it; what is only derived gives way to the flag.
fn launched_master(launched: &Launched, flag: Option<Master>) -> Result<Option<Master>, Problem> {
    use super::environment::Launcher;
    match (flag, &launched.master) {
        (None, Some(master)) => Ok(Some(master.clone())),
        (None, None) => {
            let what = format!("{} does not say where rank 0 is", launched.by.name());
            Err(Problem::usage(what)
                .help("give an address of rank 0's machine and a free port to all ranks: --master HOST:PORT"))
        }
        (Some(flag), Some(said)) if launched.by == Launcher::Torchrun && flag != *said => {
            let (flag, said) =
                (format!("--master {}:{}", flag.host, flag.port), format!("{}:{}", said.host, said.port));
            let what = format!("{flag} and MASTER_ADDR:MASTER_PORT={said} contradict each other");
            Err(Problem::usage(what).help("leave --master out, or unset MASTER_ADDR and MASTER_PORT"))
        }
        (Some(flag), _) if flag.port == 0 => {
            let problem =
                Problem::usage("--master with port 0: nobody could tell the other ranks which one it became");
            Err(problem.help("choose a port"))
        }
        (Some(flag), _) => Ok(Some(flag)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn degrees(tp: Option<usize>, pp: Option<usize>) -> Degrees {
        Degrees { tp, pp, stages: None }
    }

    fn under_torchrun(rank: usize, world_size: usize) -> How {
        let variables =
            [("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", rank), ("MASTER_PORT", 9)];
        let mut variables: Variables =
            variables.iter().map(|&(name, value)| (name.to_owned(), value.to_string())).collect();
        variables.insert("MASTER_ADDR".to_owned(), "localhost".to_owned());
        How::Other(detect(&variables).unwrap().unwrap())
    }

    fn launch(how: How, split: &Degrees) -> Launch {
        let Place { mesh, rank, local_rank, local_size } = place(split, &how).unwrap();
        let request = MeshRequest {
            degrees: split.clone(),
            plan: None,
            nodes: None,
            master: None,
            secret_file: None,
            collective_timeout: Duration::from_secs(1),
            rendezvous_timeout: Duration::from_secs(1),
            shares_memory: true,
        };
        let split = Split { mesh, stages: None };
        let (rank, planned_for, master) = (Rank(rank), None, None);
        Launch { split, rank, local_rank, local_size, request, how, master, planned_for }
    }

    #[test]
    fn degrees_that_are_not_given_fill_up_what_was_started() {
        let mesh_of = |tp, pp| {
            let How::Other(launched) = under_torchrun(1, 6) else { panic!("started by another") };
            mesh(&degrees(tp, pp), Some(&launched))
                .map(|mesh| (mesh.tp, mesh.pp))
                .map_err(|error| error.to_string())
        };
        assert_eq!(mesh_of(None, None), Ok((6, 1)));
        assert_eq!(mesh_of(Some(2), None), Ok((2, 3)));
        assert_eq!(mesh_of(None, Some(6)), Ok((1, 6)));
        assert_eq!(mesh_of(Some(3), Some(2)), Ok((3, 2)));
        for (tp, pp) in [(Some(4), None), (Some(3), Some(1)), (Some(6), Some(2)), (None, Some(12))] {
            assert!(
                mesh_of(tp, pp).is_err_and(|told| told.contains("WORLD_SIZE=6 (torchrun)")),
                "{tp:?} {pp:?}"
            );
        }
    }

    #[test]
    fn machines_take_equal_shares_of_the_ranks() {
        let of = |n_nodes, node_rank| {
            let how = How::User(Some(Nodes { n_nodes, node_rank }));
            place(&degrees(Some(2), Some(3)), &how).map(|place| (place.rank, place.local_size)).ok()
        };
        assert_eq!(
            [of(2, 0), of(2, 1), of(3, 2), of(4, 1)],
            [Some((0, 3)), Some((3, 3)), Some((4, 2)), None]
        );
    }

    #[test]
    fn ranks_of_one_machine_share_its_threads() {
        let device = |threads| DeviceRequest { threads, is_chosen: true, ..DeviceRequest::CPU };
        let shares = |threads, n: usize| {
            let of =
                |rank| launch(under_torchrun(rank, n), &degrees(None, None)).share(device(threads)).threads;
            (0..n).map(of).collect::<Vec<_>>()
        };
        assert_eq!(shares(8, 2), [4, 4]);
        assert_eq!(shares(8, 3), [3, 3, 2]);
        assert_eq!(shares(2, 4), [1, 1, 1, 1]);
        assert_eq!(launch(How::User(None), &degrees(None, None)).share(device(8)).threads, 8);
    }
}
