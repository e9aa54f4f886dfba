//! Flags of `benchmark`, and the request that they make.

use clap::Args;

use super::{DeviceArgs, DeviceRequest, MeshArgs, MeshRequest, ModelArgs, check_room, numbers};
use crate::bench::Cell;
use crate::model::ModelChoice;
use crate::session;

const AFTER_HELP: &str = "\
Every batch size is run with every prompt length and every number of new
tokens; tokens are drawn greedily and end-of-text is ignored. TTFT is per
sequence, from the arrival of the whole batch; TPOT is per decode step with the
whole batch running. Beside the results stand what this machine can do at best
(reading memory, multiplying; measured in the same run with the same threads)
and what the plan foretold.

--json writes one object: schema_version, command, commit, date, device,
ceilings, model, plan, load_ms, warmups, repeats, results.

Exit codes: 0 done, 1 the run failed, 2 a flag is wrong, 130 interrupted.

Examples:
  dist-cli benchmark
  dist-cli benchmark --model gpt3-1.3b --batch 1,4,8 --prompt-len 128 --new-tokens 32
  dist-cli benchmark --model ~/models/gpt2 --prompt-len 32,512 --repeats 5 --json > result.json";

/// Flags of `benchmark`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct BenchmarkArgs {
    /// Which model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Sequences that arrive at once
    #[arg(long, visible_alias = "batch-size", value_name = "N,…", value_delimiter = ',', value_parser = numbers::count, default_value = "1")]
    pub batch: Vec<usize>,
    /// Tokens of each prompt
    #[arg(long, visible_alias = "input-len", value_name = "N,…", value_delimiter = ',', value_parser = numbers::count, default_value = "128")]
    pub prompt_len: Vec<usize>,
    /// New tokens of each sequence
    #[arg(long, visible_alias = "output-len", value_name = "N,…", value_delimiter = ',', value_parser = numbers::count, default_value = "64")]
    pub new_tokens: Vec<usize>,
    /// Rounds before the measured ones
    #[arg(long, visible_alias = "num-iters-warmup", value_name = "N", default_value_t = 1)]
    pub warmups: usize,
    /// Measured rounds
    #[arg(long, visible_alias = "num-iters", value_name = "N", value_parser = numbers::count, default_value = "3")]
    pub repeats: usize,
    /// Sequences that run at the same time, where the others wait; by default all
    #[arg(long, visible_alias = "max-num-seqs", value_name = "N", value_parser = numbers::count)]
    pub max_seqs: Option<usize>,
    /// Tokens of one step, at least one for every sequence that runs; by default 512 on a CPU, 8192 on a GPU, or more
    #[arg(long, visible_alias = "max-num-batched-tokens", value_name = "N", value_parser = numbers::count)]
    pub max_batch_tokens: Option<usize>,
    /// Where to run.
    #[command(flatten)]
    pub device: DeviceArgs,
    /// On how many ranks.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Writes one JSON object instead of a table
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// What `benchmark` shall do.
#[derive(Debug)]
pub struct BenchmarkRequest {
    /// Which model.
    pub model: ModelChoice,
    /// Where to run.
    pub device: DeviceRequest,
    /// On how many ranks.
    pub mesh: MeshRequest,
    /// What to run, in order.
    pub cells: Vec<Cell>,
    /// Rounds before the measured ones.
    pub warmups: usize,
    /// Measured rounds.
    pub repeats: usize,
    /// Sequences at once, if not all.
    pub max_seqs: Option<usize>,
    /// Tokens of one step.
    pub max_batch_tokens: usize,
    /// Whether to write JSON.
    pub json: bool,
}

impl BenchmarkArgs {
    /// Everything that can be wrong without opening a file is said here.
    pub fn into_request(self) -> anyhow::Result<BenchmarkRequest> {
        let mut cells = Vec::new();
        for &batch in &self.batch {
            for &prompt_len in &self.prompt_len {
                cells.extend(self.new_tokens.iter().map(|&new_tokens| Cell {
                    batch,
                    prompt_len,
                    new_tokens,
                }));
            }
        }
        let running = cells.iter().map(|cell| cell.batch).max().unwrap_or(1);
        let running = self.max_seqs.map_or(running, |most| most.min(running));
        check_room(self.max_batch_tokens, running)?;
        let device = self.device.to_request()?;
        let of_device = || session::batch_tokens(device.kind).max(running);
        Ok(BenchmarkRequest {
            model: self.model.to_choice()?,
            device,
            mesh: self.mesh.to_request()?,
            cells,
            warmups: self.warmups,
            repeats: self.repeats,
            max_seqs: self.max_seqs,
            max_batch_tokens: self.max_batch_tokens.unwrap_or_else(of_device),
            json: self.json,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        args: BenchmarkArgs,
    }

    fn request(flags: &str) -> anyhow::Result<BenchmarkRequest> {
        let typed = ["benchmark", "--device", "cpu"].into_iter().chain(flags.split(' '));
        Typed::try_parse_from(typed).expect("sound flags").args.into_request()
    }

    #[test]
    fn a_step_that_is_too_small_for_its_sequences_is_refused() {
        let tokens =
            |flags| request(flags).map(|request| request.max_batch_tokens).map_err(|e| e.to_string());
        assert_eq!(tokens("--batch 1,8 --max-batch-tokens 8"), Ok(8));
        assert_eq!(tokens("--batch 1,8 --max-seqs 4 --max-batch-tokens 4"), Ok(4));
        assert_eq!((tokens("--batch 8"), tokens("--batch 600")), (Ok(512), Ok(600)));
        let refusal = request("--batch 1,8 --max-batch-tokens 4").expect_err("too small");
        assert!(
            refusal.to_string().contains("--max-batch-tokens 4 is less than the 8 sequences"),
            "{refusal}"
        );
        let help = crate::problem::help_of(&refusal).expect("a way on");
        assert_eq!(help, "raise it to 8, or let sequences wait: --max-seqs 4");
    }
}
