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
            Self::Torchrun => "torchrun's variables",
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
