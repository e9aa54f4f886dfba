//! How the model is split over ranks, and how the ranks find each other.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::numbers;
use crate::problem::Problem;

/// Flags about the split.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Split")]
pub struct DegreeArgs {
    /// Ranks that share each layer
    #[arg(long, visible_alias = "tensor-parallel-size", value_name = "N", value_parser = numbers::count)]
    pub tp: Option<usize>,
    /// Stages that the layers are dealt to
    #[arg(long, visible_alias = "pipeline-parallel-size", value_name = "N", value_parser = numbers::count)]
    pub pp: Option<usize>,
    /// Layers of each stage, first stage first; by default as many as take the same time
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = numbers::count)]
    pub stages: Option<Vec<usize>>,
}

/// The split, as far as it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Degrees {
    /// Ranks that share each layer.
    pub tp: Option<usize>,
    /// Stages.
    pub pp: Option<usize>,
    /// Layers of each stage.
    pub stages: Option<Vec<usize>>,
}

impl DegreeArgs {
    /// Stages that are listed have been counted.
    pub fn to_degrees(&self) -> anyhow::Result<Degrees> {
        let Self { tp, pp, stages } = self.clone();
        let counted = stages.as_ref().map(Vec::len);
        if let (Some(pp), Some(counted)) = (pp, counted)
            && pp != counted
        {
            let what = format!("--pp {pp} and --stages with {counted} stages contradict each other");
            return Err(Problem::usage(what).help("leave --pp out: the stages are counted").into());
        }
        Ok(Degrees { tp, pp: pp.or(counted), stages })
    }
}

/// Flags about ranks.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Split")]
pub struct MeshArgs {
    /// The split.
    #[command(flatten)]
    pub degrees: DegreeArgs,
    /// Splits as a file of `dist-cli plan --json` says; takes the place of --tp, --pp and --stages
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tp", "pp", "stages"])]
    pub plan: Option<PathBuf>,
    /// Machines; each is started by hand with its --node-rank
    #[arg(long, value_name = "N", value_parser = numbers::count)]
    pub nnodes: Option<usize>,
    /// Which of the machines this is, from 0
    #[arg(long, value_name = "R")]
    pub node_rank: Option<usize>,
    /// Where rank 0 listens; port 0 lets rank 0 choose one
    #[arg(long, value_name = "HOST:PORT")]
    pub master: Option<String>,
    /// File with the secret that all ranks share; `DIST_SECRET` may hold the secret itself
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Seconds that a rank may keep the others waiting in one call
    #[arg(long, value_name = "SECONDS", value_parser = numbers::seconds, default_value = "60")]
    pub collective_timeout: Duration,
    /// Seconds that the ranks may take to find each other
    #[arg(long, value_name = "SECONDS", value_parser = numbers::seconds, default_value = "60")]
    pub rendezvous_timeout: Duration,
    /// Ranks of one machine talk over TCP too
    #[arg(long)]
    pub no_shared_memory: bool,
}

/// What was asked for.
#[derive(Clone, Debug)]
pub struct MeshRequest {
    /// The split.
    pub degrees: Degrees,
    /// The plan whose split is taken.
    pub plan: Option<PathBuf>,
    /// Machines that are started by hand, and which one this is.
    pub nodes: Option<Nodes>,
    /// Where rank 0 listens.
    pub master: Option<String>,
    /// The secret's file.
    pub secret_file: Option<PathBuf>,
    /// How long a rank may keep the others waiting.
    pub collective_timeout: Duration,
    /// How long the ranks may take to find each other.
    pub rendezvous_timeout: Duration,
    /// Whether ranks of one machine share memory.
    pub shares_memory: bool,
}

/// Machines that are started by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// How many.
    pub n_nodes: usize,
    /// Which one this is.
    pub node_rank: usize,
}

impl MeshArgs {
    /// The request; no file is opened.
    pub fn to_request(&self) -> anyhow::Result<MeshRequest> {
        Ok(MeshRequest {
            degrees: self.degrees.to_degrees()?,
            plan: self.plan.clone(),
            nodes: self.nodes()?,
            master: self.master.clone(),
            secret_file: self.secret_file.clone(),
            collective_timeout: self.collective_timeout,
            rendezvous_timeout: self.rendezvous_timeout,
            shares_memory: !self.no_shared_memory,
        })
    }

    fn nodes(&self) -> anyhow::Result<Option<Nodes>> {
        let n_nodes = match (self.nnodes, self.node_rank) {
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                let problem = Problem::usage("--node-rank says which machine this is, not of how many");
                return Err(problem.help("add --nnodes N").into());
            }
            (Some(n_nodes), _) => n_nodes,
        };
        if n_nodes == 1 && self.node_rank.unwrap_or(0) == 0 {
            return Ok(None);
        }
        let Some(node_rank) = self.node_rank else {
            let problem = Problem::usage(format!("--nnodes {n_nodes} needs to know which machine this is"));
            return Err(problem.help("add --node-rank 0 here, --node-rank 1 on the next machine").into());
        };
        if node_rank >= n_nodes {
            let what = format!("--node-rank {node_rank}: {n_nodes} machines are 0 to {}", n_nodes - 1);
            return Err(Problem::usage(what).into());
        }
        if self.master.is_none() {
            let what = format!("--nnodes {n_nodes} needs to know where rank 0 listens");
            let help = "add --master HOST:PORT with an address of the first machine that the others reach";
            return Err(Problem::usage(what).help(help).into());
        }
        Ok(Some(Nodes { n_nodes, node_rank }))
    }
}
