//! What other programs that start ranks say in the environment. Pure: a map of variables in, a place among ranks out.
//!
//! Launchers nest: torchrun or mpirun inside a Slurm job is normal. The innermost one whose variables are complete has
//! started this process, and what lies around it says nothing about ranks.

use std::collections::BTreeMap;

use super::nodelist;
use crate::problem::Problem;

/// Environment variables by name.
pub type Variables = BTreeMap<String, String>;

/// Who starts ranks, innermost first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// torchrun, or anything else that sets the same variables.
    Torchrun,
    /// Open MPI's mpirun.
    OpenMpi,
    /// Slurm's srun.
    Slurm,
}

impl Launcher {
    const ALL: [Self; 3] = [Self::Torchrun, Self::OpenMpi, Self::Slurm];

    /// Its name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Torchrun => "torchrun",
            Self::OpenMpi => "Open MPI",
            Self::Slurm => "Slurm",
        }
    }

    /// The variables that say rank and number of ranks.
    const fn place(self) -> (&'static str, &'static str) {
        match self {
            Self::Torchrun => ("RANK", "WORLD_SIZE"),
            Self::OpenMpi => ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
            Self::Slurm => ("SLURM_PROCID", "SLURM_NTASKS"),
        }
    }

    /// All that must be there. A batch script of Slurm has a task number too, but no step.
    const fn required(self) -> &'static [&'static str] {
        match self {
            Self::Torchrun => &["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"],
            Self::OpenMpi => &["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"],
            Self::Slurm => &["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST"],
        }
    }
}

/// Where rank 0 listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// What a launcher says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Who.
    pub by: Launcher,
    /// Which rank this is.
    pub rank: usize,
    /// Ranks in all.
    pub world_size: usize,
    /// Which one it is on its machine.
    pub local_rank: usize,
    /// Ranks on its machine, where the launcher tells.
    pub local_size: Option<usize>,
    /// Whether all ranks are surely on one machine.
    pub is_one_machine: bool,
    /// Where rank 0 listens, where the launcher tells or enough to agree on.
    pub master: Option<Master>,
    /// A node of the job other than the first, by which the first can find its own address.
    pub other_node: Option<String>,
}

impl Launched {
    /// The variable that says which rank this is, with its value.
    pub fn rank_variable(&self) -> String {
        format!("{}={}", self.by.place().0, self.rank)
    }

    /// The variable that says how many ranks there are, with its value.
    pub fn size_variable(&self) -> String {
        format!("{}={}", self.by.place().1, self.world_size)
    }
}

/// The innermost launcher whose variables are complete. One rank alone was not started to meet others.
pub fn detect(vars: &Variables) -> Result<Option<Launched>, Problem> {
    let is_complete = |launcher: &Launcher| launcher.required().iter().all(|name| vars.contains_key(*name));
    let Some(by) = Launcher::ALL.into_iter().find(is_complete) else { return Ok(None) };
    let (rank_var, size_var) = by.place();
    let (rank, world_size) = (number(vars, rank_var)?, number(vars, size_var)?);
    if rank >= world_size {
        let what = format!("{rank_var}={rank} and {size_var}={world_size} contradict each other");
        return Err(Problem::usage(what).help("ranks count from 0"));
    }
    if world_size == 1 {
        return Ok(None);
    }
    let launched = match by {
        Launcher::Torchrun => torchrun(vars)?,
        Launcher::OpenMpi => open_mpi(vars)?,
        Launcher::Slurm => slurm(vars)?,
    };
    Ok(Some(Launched { rank, world_size, ..launched }))
}

fn torchrun(vars: &Variables) -> Result<Launched, Problem> {
    let text = |name: &str| vars.get(name).map_or("", String::as_str);
    let host = text("MASTER_ADDR").trim().to_owned();
    let port = port_number(vars, "MASTER_PORT")?;
    // torchrun itself listens at this port then, and ranks have to meet elsewhere.
    let is_taken = text("TORCHELASTIC_USE_AGENT_STORE").eq_ignore_ascii_case("true");
    let job =
        ["torchrun", text("TORCHELASTIC_RUN_ID"), text("MASTER_PORT"), text("TORCHELASTIC_RESTART_COUNT")];
    let port = if is_taken { port_of(&job) } else { port };
    let local_size = optional(vars, "LOCAL_WORLD_SIZE")?;
    let is_loopback = ["localhost", "127.0.0.1", "::1"].contains(&host.as_str());
    Ok(Launched {
        is_one_machine: is_loopback || local_size == Some(number(vars, "WORLD_SIZE")?),
        local_size,
        local_rank: optional(vars, "LOCAL_RANK")?.unwrap_or(0),
        master: Some(Master { host, port }),
        ..blank(Launcher::Torchrun)
    })
}

fn open_mpi(vars: &Variables) -> Result<Launched, Problem> {
    let local_size = optional(vars, "OMPI_COMM_WORLD_LOCAL_SIZE")?;
    let is_one_machine = local_size == Some(number(vars, "OMPI_COMM_WORLD_SIZE")?);
    let job = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"]
        .map(|name| vars.get(name).map_or("", String::as_str));
    let is_named = job.iter().any(|part| !part.is_empty());
    let master = (is_one_machine && is_named).then(|| Master {
        host: "127.0.0.1".to_owned(),
        port: port_of(&["openmpi", job[0], job[1], job[2]]),
    });
    let local_rank = number(vars, "OMPI_COMM_WORLD_LOCAL_RANK")?;
    Ok(Launched { local_rank, local_size, is_one_machine, master, ..blank(Launcher::OpenMpi) })
}

fn slurm(vars: &Variables) -> Result<Launched, Problem> {
    let list = &vars["SLURM_STEP_NODELIST"];
    let nodes = nodelist::expand(list)
        .ok_or_else(|| Problem::usage(format!("SLURM_STEP_NODELIST={list} is no list of nodes")))?;
    let node = optional(vars, "SLURM_NODEID")?.unwrap_or(0);
    let tasks = vars.get("SLURM_STEP_TASKS_PER_NODE").and_then(|list| nodelist::tasks(list));
    let is_one_machine = nodes.len() == 1;
    let text = |name: &str| vars.get(name).map_or("", String::as_str);
    let job = ["slurm", text("SLURM_JOB_ID"), text("SLURM_STEP_ID"), text("SLURM_RESTART_COUNT")];
    let host = if is_one_machine { "127.0.0.1".to_owned() } else { nodes[0].clone() };
    Ok(Launched {
        is_one_machine,
        local_size: tasks.and_then(|tasks| tasks.get(node).copied()),
        local_rank: number(vars, "SLURM_LOCALID")?,
        master: Some(Master { host, port: port_of(&job) }),
        other_node: nodes.get(1).cloned(),
        ..blank(Launcher::Slurm)
    })
}

const fn blank(by: Launcher) -> Launched {
    Launched {
        by,
        rank: 0,
        world_size: 0,
        local_rank: 0,
        local_size: None,
        is_one_machine: false,
        master: None,
        other_node: None,
    }
}

/// A port that all ranks of a job come to by themselves, below those that the system hands out.
fn port_of(job: &[&str]) -> u16 {
    // FNV-1a; 0xff stands between the parts, which no UTF-8 text has.
    let bytes = job.iter().flat_map(|part| part.bytes().chain([0xff]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    10_000 + (hash % 20_000) as u16
}

fn number(vars: &Variables, name: &str) -> Result<usize, Problem> {
    let text = vars.get(name).map_or("", String::as_str);
    text.trim().parse().map_err(|_| Problem::usage(format!("{name}={text} is no number")))
}

fn optional(vars: &Variables, name: &str) -> Result<Option<usize>, Problem> {
    vars.contains_key(name).then(|| number(vars, name)).transpose()
}

fn port_number(vars: &Variables, name: &str) -> Result<u16, Problem> {
    let port = number(vars, name)?;
    u16::try_from(port).map_err(|_| Problem::usage(format!("{name}={port} is no port")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `mpirun -n 2` of Open MPI 4.1.4, rank 1.
    const OPEN_MPI: &str = "OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_NODE_RANK=1 \
        OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_MCA_ess_base_jobid=1063321601 \
        OMPI_MCA_orte_ess_node_rank=1 OMPI_MCA_orte_ess_num_procs=2 \
        OMPI_MCA_orte_hnp_uri=1063321600.0;tcp://192.0.2.2:60207 PMIX_NAMESPACE=1063321601 PMIX_RANK=1";

    /// `srun -N2 -n4 --mpi=none` of Slurm 22.05, task 3.
    const SRUN: &str = "SLURM_CPUS_ON_NODE=2 SLURM_GTIDS=2,3 SLURM_JOB_ID=1 SLURM_JOB_NODELIST=n[1-2] \
        SLURM_JOB_NUM_NODES=2 SLURM_LOCALID=1 SLURM_NNODES=2 SLURM_NODEID=1 SLURM_NPROCS=4 SLURM_NTASKS=4 \
        SLURM_PROCID=3 SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=4 \
        SLURM_STEP_TASKS_PER_NODE=2(x2) SLURM_TASKS_PER_NODE=2(x2)";

    /// The script of `sbatch -N2 -n4` of Slurm 22.05: a task number, but no step that would have started four.
    const SBATCH: &str = "SLURM_JOB_ID=2 SLURM_JOB_NODELIST=n[1-2] SLURM_JOB_NUM_NODES=2 SLURM_LOCALID=0 SLURM_NNODES=2 \
        SLURM_NODEID=0 SLURM_NPROCS=4 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_TASKS_PER_NODE=2(x2)";

    /// `torchrun --standalone --nproc-per-node 2`, rank 1.
    const TORCHRUN: &str = "GROUP_RANK=0 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=node7 MASTER_PORT=29500 RANK=1 \
        ROLE_RANK=1 ROLE_WORLD_SIZE=2 TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_RUN_ID=none \
        TORCHELASTIC_USE_AGENT_STORE=True WORLD_SIZE=2";

    fn variables(texts: &[&str]) -> Variables {
        let words = texts.iter().flat_map(|text| text.split_whitespace());
        words
            .map(|word| {
                word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap()
            })
            .collect()
    }

    fn found(texts: &[&str]) -> Option<Launched> {
        detect(&variables(texts)).unwrap()
    }

    fn refusal(texts: &[&str]) -> String {
        detect(&variables(texts)).unwrap_err().to_string()
    }

    #[test]
    fn mpirun_says_everything_but_a_port() {
        let launched = found(&[OPEN_MPI]).unwrap();
        assert_eq!((launched.by, launched.rank, launched.world_size), (Launcher::OpenMpi, 1, 2));
        assert_eq!((launched.local_rank, launched.local_size, launched.is_one_machine), (1, Some(2), true));
        let master = launched.master.unwrap();
        assert_eq!(master.host, "127.0.0.1");
        assert!((10_000..30_000).contains(&master.port));
        let other_rank = OPEN_MPI.replace("RANK=1", "RANK=0");
        assert_eq!(found(&[&other_rank]).unwrap().master.unwrap(), master, "all ranks come to one port");
        let other_job = OPEN_MPI.replace("1063321601", "1063321602");
        assert_ne!(found(&[&other_job]).unwrap().master.unwrap(), master);
        let two_machines = OPEN_MPI.replace("WORLD_SIZE=2", "WORLD_SIZE=4");
        let launched = found(&[&two_machines]).unwrap();
        assert_eq!((launched.is_one_machine, launched.master), (false, None));
    }

    #[test]
    fn srun_says_which_node_is_the_first() {
        let launched = found(&[SRUN]).unwrap();
        assert_eq!((launched.by, launched.rank, launched.world_size), (Launcher::Slurm, 3, 4));
        assert_eq!((launched.local_rank, launched.local_size, launched.is_one_machine), (1, Some(2), false));
        assert_eq!(launched.master.map(|master| master.host).as_deref(), Some("n1"));
        assert_eq!(launched.other_node.as_deref(), Some("n2"));
        let one_node = SRUN.replace("STEP_NODELIST=n[1-2]", "STEP_NODELIST=n2");
        let launched = found(&[&one_node]).unwrap();
        assert_eq!(launched.master.map(|master| master.host).as_deref(), Some("127.0.0.1"));
        assert!(launched.is_one_machine);
        let wrong = SRUN.replace("STEP_NODELIST=n[1-2]", "STEP_NODELIST=n[1-");
        assert_eq!(refusal(&[&wrong]), "SLURM_STEP_NODELIST=n[1- is no list of nodes");
    }

    #[test]
    fn a_batch_script_is_no_rank() {
        assert_eq!(found(&[SBATCH]), None);
    }

    #[test]
    fn torchruns_own_port_is_left_to_it() {
        let launched = found(&[TORCHRUN]).unwrap();
        assert_eq!((launched.by, launched.rank, launched.local_size), (Launcher::Torchrun, 1, Some(2)));
        let master = launched.master.unwrap();
        assert_eq!(master.host, "node7");
        assert_ne!(master.port, 29500);
        let by_hand = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29501";
        let launched = found(&[by_hand]).unwrap();
        assert_eq!(launched.master.map(|master| master.port), Some(29501));
        assert!(launched.is_one_machine, "all ranks reach a loopback address");
    }

    #[test]
    fn the_innermost_complete_launcher_wins() {
        assert_eq!(found(&[SRUN, OPEN_MPI, TORCHRUN]).unwrap().by, Launcher::Torchrun);
        assert_eq!(found(&[SRUN, OPEN_MPI]).unwrap().by, Launcher::OpenMpi);
        let incomplete = "MASTER_ADDR=node7 MASTER_PORT=29500";
        assert_eq!(found(&[SRUN, incomplete]).unwrap().by, Launcher::Slurm);
        assert_eq!(found(&[incomplete, "RANK=3"]), None);
        assert_eq!(found(&[]), None);
    }

    #[test]
    fn one_rank_alone_meets_nobody() {
        let alone = SRUN.replace("SLURM_NTASKS=4", "SLURM_NTASKS=1").replace("PROCID=3", "PROCID=0");
        assert_eq!(found(&[&alone]), None);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let with = |from: &str, to: &str| refusal(&[&TORCHRUN.replace(from, to)]);
        assert_eq!(with(" RANK=1", " RANK=one"), "RANK=one is no number");
        assert_eq!(with(" RANK=1", " RANK=2"), "RANK=2 and WORLD_SIZE=2 contradict each other");
        assert_eq!(with("PORT=29500", "PORT=70000"), "MASTER_PORT=70000 is no port");
    }
}
