//! The ranks of a session: rank 0 asks what each has, plans for all and tells them; the others obey.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use dist_comm::{Comm, Solo, Wait, World};
use dist_core::plan::Plan;
use dist_core::{ModelConfig, Rank};
use dist_kernels::cpu::CpuBackend;
use dist_models::decoder::{LoadProgress, OnProgress};
use dist_models::engine::{Engine, EngineError, Followers, start_rank};
use dist_models::rank::{Ended, Leader, checkpoint_identity, rank_main};
use dist_models::runner::{Comms, Runner};
use serde::{Deserialize, Serialize};

use super::{Device, Session, split_plan};
use crate::flags::DeviceRequest;
use crate::generation::Ending;
use crate::launch::{Identity, Launch, LocalRanks, Team, explain, lost_problem};
use crate::machine;
use crate::model::{Holding, Model, ModelChoice};
use crate::problem::Problem;
use crate::render::Console;

/// What a rank has, as far as the plan depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its share of the memory that is free on its machine; `u64::MAX` where the system does not tell.
    pub available: u64,
    /// How many of the bytes that it will hold can be dropped and read again.
    pub evictable: u64,
}

impl Facts {
    /// `free` is what the device has of its own, if it does not share the machine's.
    fn of(model: &Model, weights: u64, free: Option<u64>, launch: &Launch) -> Self {
        if let Some(available) = free {
            return Self { available, evictable: 0 };
        }
        let available = machine::available_bytes().map_or(u64::MAX, |bytes| bytes / launch.local_size as u64);
        let evictable = match model.holding {
            Holding::Mapped | Holding::Embedded => weights,
            Holding::Read | Holding::Random => 0,
        };
        Self { available, evictable }
    }
}

/// All ranks of a run, as rank 0 sees them before there is a plan.
pub struct Crew {
    /// What each rank has.
    pub facts: Vec<Facts>,
    team: Option<Team>,
    limit: Duration,
}

/// What ranks must have in common before they say anything else, and this rank's share of the weights.
fn identity(launch: &Launch, model: &Model) -> anyhow::Result<(Identity, u64)> {
    launch.check_model(model.config())?;
    let split = split_plan(model, &launch.split)?;
    let checkpoint = checkpoint_identity(&model.checkpoint)?;
    Ok((Identity { plan: split.hash().to_string(), checkpoint }, split.memory(launch.rank).weights))
}

impl Crew {
    /// Starts and meets the other ranks, and asks what they have.
    pub fn gather(
        launch: &Launch,
        model: &Model,
        free: Option<u64>,
        console: &Console,
    ) -> anyhow::Result<Self> {
        let limit = launch.request.collective_timeout;
        if launch.world_size() == 1 {
            launch.check_model(model.config())?;
            let facts = vec![Facts::of(model, model.checkpoint.weight_bytes(), free, launch)];
            return Ok(Self { facts, team: None, limit });
        }
        let (identity, weights) = identity(launch, model)?;
        let mut team = launch.meet(&identity, console)?;
        let mut facts = vec![Facts::of(model, weights, free, launch)];
        for rank in (1..launch.world_size()).map(Rank) {
            let told = team.world.control().recv(rank, Wait::UntilSilentFor(limit));
            let told = told.map_err(|error| explain(EngineError::from(error).into(), &mut team.locals))?;
            facts.push(serde_json::from_slice(&told)?);
        }
        Ok(Self { facts, team: Some(team), limit })
    }

    /// Has all ranks take in their weights under `plan`.
    pub fn begin<B: Device>(
        self,
        backend: B,
        model: &Model,
        plan: &Plan,
        (console, progress): (&Console, &mut dyn FnMut(LoadProgress)),
    ) -> anyhow::Result<Session<B>> {
        let start = Instant::now();
        let Some(mut team) = self.team else {
            let comms = Comms { tp: Comm::Solo(Solo::new()), pp: Comm::Solo(Solo::new()) };
            let runner = start_rank(backend, comms, &model.checkpoint, plan, Rank(0), &mut |news| {
                progress(news);
                ControlFlow::Continue(())
            })?;
            let engine = Engine::new(runner, Followers::None, plan, model.tokenizer.clone());
            return Ok(Session { engine, load: start.elapsed(), locals: LocalRanks::default() });
        };
        let begun = lead(&mut team, backend, model, plan, self.limit, progress);
        let Team { world, mut locals } = team;
        let runner = begun.map_err(|error| fail(&world, error, &mut locals))?;
        told_load(console, Rank(0), start);
        let leader = Leader::new(world, self.limit).map_err(EngineError::from);
        let leader = leader.map_err(|error| explain(error.into(), &mut locals))?;
        let followers = Followers::Ranks(Box::new(leader));
        let engine = Engine::new(runner, followers, plan, model.tokenizer.clone());
        Ok(Session { engine, load: start.elapsed(), locals })
    }
}

fn lead<B: Device>(
    team: &mut Team,
    backend: B,
    model: &Model,
    plan: &Plan,
    limit: Duration,
    progress: &mut dyn FnMut(LoadProgress),
) -> anyhow::Result<Runner<B>> {
    team.world.control().broadcast(&serde_json::to_vec(plan)?, limit).map_err(EngineError::from)?;
    let comms = team.comms(plan, limit)?;
    load(&team.world, limit, progress, |progress| {
        start_rank(backend, comms, &model.checkpoint, plan, Rank(0), progress)
    })
}

/// Loads, and gives up as soon as another rank is gone.
fn load<B: Device>(
    world: &World,
    limit: Duration,
    progress: &mut dyn FnMut(LoadProgress),
    start: impl FnOnce(OnProgress<'_>) -> Result<Runner<B>, EngineError>,
) -> anyhow::Result<Runner<B>> {
    let mut lost = None;
    let started = start(&mut |news| {
        progress(news);
        match world.look(limit) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                lost = Some(error);
                ControlFlow::Break(())
            }
        }
    });
    match lost {
        Some(lost) => Err(EngineError::from(lost).into()),
        None => Ok(started?),
    }
}

fn told_load(console: &Console, rank: Rank, start: Instant) {
    console.of_rank(rank, &format!("weights in {:.1} s", start.elapsed().as_secs_f64()));
}

/// Tells the other ranks that this one ends by itself, unless it is another rank that is lost.
fn fail(world: &World, error: anyhow::Error, locals: &mut LocalRanks) -> anyhow::Error {
    let is_loss = error.downcast_ref::<EngineError>().is_some_and(|error| error.lost().is_some());
    if !is_loss {
        world.fail(&format!("{error:#}"));
    }
    explain(error, locals)
}

/// A rank that follows: loads what rank 0's plan gives it and runs rank 0's steps until it says stop.
pub fn follow(
    launch: &Launch,
    model: &ModelChoice,
    device: DeviceRequest,
    console: &Console,
) -> anyhow::Result<Ending> {
    let model = model.open()?;
    let (identity, weights) = identity(launch, &model)?;
    let facts = Facts::of(&model, weights, None, launch);
    let mut team = launch.meet(&identity, console)?;
    let runner = prepare(&mut team, launch, (&model, facts), device, console);
    let Team { mut world, mut locals } = team;
    let mut runner = runner.map_err(|error| fail(&world, error, &mut locals))?;
    match rank_main(&mut world, &mut runner, launch.request.collective_timeout)? {
        Ended::Told => Ok(Ending::Whole),
        Ended::Lost(lost) => {
            locals.give_up();
            Err(lost_problem(&lost, &mut locals).into())
        }
    }
}

fn prepare(
    team: &mut Team,
    launch: &Launch,
    (model, facts): (&Model, Facts),
    device: DeviceRequest,
    console: &Console,
) -> anyhow::Result<Runner<CpuBackend>> {
    let limit = launch.request.collective_timeout;
    let control = team.world.control();
    control.send(Rank(0), &serde_json::to_vec(&facts)?, limit).map_err(EngineError::from)?;
    let told = control.recv(Rank(0), Wait::UntilSilentFor(limit)).map_err(EngineError::from)?;
    let plan: Plan = serde_json::from_slice(&told)?;
    let unnamed = |config: &ModelConfig| ModelConfig { name: String::new(), ..config.clone() };
    if plan.mesh != launch.split.mesh || unnamed(&plan.model) != unnamed(model.config()) {
        return Err(Problem::failed("rank 0 plans for another model or another split than it met for").into());
    }
    let start = Instant::now();
    let comms = team.comms(&plan, limit)?;
    let (backend, _) = CpuBackend::open_as(launch.share(device))?;
    let runner = load(&team.world, limit, &mut |_| {}, |progress| {
        start_rank(backend, comms, &model.checkpoint, &plan, launch.rank, progress)
    })?;
    told_load(console, launch.rank, start);
    Ok(runner)
}
