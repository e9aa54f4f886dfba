//! `dist-cli doctor`: what is there, what lies between ranks, what is wrong and what to do.

use std::time::Duration;

use dist_comm::Wait;
use dist_comm::probe::probe;
use dist_core::Rank;
use dist_kernels::cpu::CpuBackend;
use dist_models::engine::EngineError;

use crate::bench::Ceilings;
use crate::doctor::{Machine, RankFacts, Rates, Report};
use crate::flags::DeviceRequest;
use crate::flags::doctor::DoctorArgs;
use crate::launch::{self, Identity, Launch, Team};
use crate::problem::Problem;
use crate::render::{self, Console};
use crate::session::Device;

/// Runs the command.
pub fn run(args: &DoctorArgs, console: &Console) -> anyhow::Result<()> {
    let launch = Launch::of(&args.mesh.to_request()?)?;
    let facts = facts(&launch, console);
    let report = if launch.world_size() == 1 {
        Report::new(vec![facts], Vec::new())
    } else {
        let identity = Identity { plan: format!("doctor {}", launch.split.mesh), checkpoint: String::new() };
        let mut team = launch.meet(&identity, console)?;
        let gathered = gather(&launch, &mut team, facts);
        match gathered.map_err(|error| launch::explain(error, &mut team.locals))? {
            Some(report) => report,
            None => return Ok(()),
        }
    };
    render::result(&if args.json { render::doctor_json(&report)? } else { render::doctor_text(&report) })?;
    if report.is_fit() {
        return Ok(());
    }
    Err(Problem::failed("runs cannot be expected to work here").help("see the errors above").into())
}

/// What this rank sees. One rank a machine measures it, while the others wait for it.
fn facts(launch: &Launch, console: &Console) -> RankFacts {
    let measure = || {
        console.note("measuring what this machine can do");
        let threads = std::thread::available_parallelism().map_or(1, Into::into);
        let all = DeviceRequest { threads, ..DeviceRequest::CPU };
        let (mut backend, _) = CpuBackend::open_as(all).ok()?;
        let Ceilings { read_bytes_per_s, flops_per_s, .. } = backend.ceilings().ok()?;
        Some(Rates { read_bytes_per_s, flops_per_s })
    };
    let rates = (launch.local_rank == 0).then(measure).flatten();
    RankFacts {
        rank: launch.rank.0,
        pid: std::process::id(),
        local_size: launch.local_size,
        machine: Machine::of_this(launch.meets_at().as_deref(), rates),
    }
}

/// All ranks' facts and pairs, at rank 0.
fn gather(launch: &Launch, team: &mut Team, facts: RankFacts) -> anyhow::Result<Option<Report>> {
    let limit: Duration = launch.request.collective_timeout;
    let world = &mut team.world;
    if launch.is_follower() {
        let told = world.control().send(Rank(0), &serde_json::to_vec(&facts)?, limit);
        told.map_err(EngineError::from)?;
        probe(world, limit)?;
        return Ok(None);
    }
    let mut ranks = vec![facts];
    for rank in (1..launch.world_size()).map(Rank) {
        let told = world.control().recv(rank, Wait::Within(limit)).map_err(EngineError::from)?;
        ranks.push(serde_json::from_slice(&told)?);
    }
    let pairs = probe(world, limit)?.unwrap_or_default();
    Ok(Some(Report::new(ranks, pairs)))
}
