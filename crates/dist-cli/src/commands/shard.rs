//! `dist-cli shard`: a checkpoint in, the same one cut for ranks out; or what that would be; or whether it is sound.

use std::path::PathBuf;
use std::time::Instant;

use dist_models::export;
use dist_models::shard;

use super::export::{split, watched, write};
use crate::flags::shard::{ShardArgs, ShardRequest, Task};
use crate::generation::Ending;
use crate::render::{self, Console};

/// Runs the command.
pub fn run(args: ShardArgs, console: &Console) -> anyhow::Result<Ending> {
    let request = args.into_request()?;
    if request.task == Task::Verify {
        return verify(&request, console);
    }
    let model = request.model.open()?;
    let split = split(&request.cut, &model)?;
    let out = request.cut.out.clone().unwrap_or_else(|| PathBuf::from("."));
    let order = export::ExportRequest {
        source: &model.checkpoint,
        dtype: None,
        max_seq_len: None,
        split: &split,
        out: &out,
        overwrite: request.cut.overwrite,
        threads: request.cut.threads,
    };
    if request.task == Task::Write {
        return write(&order, request.cut.json, console);
    }
    let ranks = shard::listing(&order)?;
    let text = if request.cut.json {
        render::listing_json(&split, &ranks)?
    } else {
        render::listing_text(&split, &ranks)
    };
    render::result(&text)?;
    Ok(Ending::Whole)
}

fn verify(request: &ShardRequest, console: &Console) -> anyhow::Result<Ending> {
    let (dir, start) = (request.model.directory()?, Instant::now());
    let Some(verified) = watched(console, "comparing", |watch| shard::verify(&dir, watch))? else {
        return Ok(Ending::Interrupted);
    };
    let took = start.elapsed();
    render::result(&if request.cut.json {
        render::verified_json(&dir, &verified, took)?
    } else {
        render::verified_text(&dir, &verified)
    })?;
    Ok(Ending::Whole)
}
