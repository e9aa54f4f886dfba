//! The command line: its commands, where each flag's value comes from, and what `--help` says.
//!
//! Flags win over the environment (`DIST_` and the flag's name), the environment over `dist.toml`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::{
    ArgAction, ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum,
};

use crate::flags::benchmark::BenchmarkArgs;
use crate::flags::doctor::DoctorArgs;
use crate::flags::export::ExportArgs;
use crate::flags::infer::InferArgs;
use crate::flags::kernels::KernelsArgs;
use crate::flags::plan::PlanArgs;
use crate::flags::shard::ShardArgs;
use crate::problem::Problem;
use crate::settings::Settings;

const AFTER_HELP: &str = "\
Every flag is also an environment variable (--max-seq-len: DIST_MAX_SEQ_LEN)
and, but for those of `kernels`, a setting of dist.toml in the working
directory (max-seq-len = 1024).
Flags win over the environment, the environment over the file.

Exit codes:
  0    done; also when the reader of standard output went away
  1    the run failed: a file, the model, the machine
  2    the command line, the environment or dist.toml is wrong
  130  interrupted with Ctrl-C; what was written until then is whole

Examples:
  dist-cli infer                                          text by the model inside this program
  dist-cli infer --model ~/models/gpt2 --prompt 'The house stands'
  dist-cli benchmark --model gpt3-1.3b --batch 1,4
  dist-cli completions bash > ~/.local/share/bash-completion/completions/dist-cli";

/// Plans, runs and measures GPT-3-class models.
#[derive(Parser, Debug)]
#[command(name = "dist-cli", version, after_help = AFTER_HELP, max_term_width = 110)]
pub struct Cli {
    /// What to say beside the result.
    #[command(flatten)]
    pub manner: MannerArgs,
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Everywhere")]
pub struct MannerArgs {
    /// Reads settings from FILE instead of dist.toml
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Says nothing but the result and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
    /// Says more: once the start-up phases with their seconds, twice what the libraries log
    #[arg(long, short, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// When to colour messages; `NO_COLOR` is respected
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value_t = ColorFlag::Auto)]
    pub color: ColorFlag,
}

/// When to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ColorFlag {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Action {
    /// Writes text
    Infer(Box<InferArgs>),
    /// Measures how fast a model runs here, beside what this machine could do at best
    Benchmark(Box<BenchmarkArgs>),
    /// Says how a model would be split over devices, how fast that should be, and why not otherwise
    Plan(Box<PlanArgs>),
    /// Writes a checkpoint that knows no degree, or one that is cut for ranks
    Export(Box<ExportArgs>),
    /// Cuts a checkpoint for ranks, joins or cuts it anew, or compares its hashes
    Shard(Box<ShardArgs>),
    /// Looks at this machine and at what lies between ranks, and says what is wrong
    Doctor(Box<DoctorArgs>),
    /// Compiles the kernels of GPUs beforehand, or lists them
    Kernels(KernelsArgs),
    /// Writes a shell's completion script
    Completions(CompletionsArgs),
}

/// Flags of `completions`.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  dist-cli completions bash > ~/.local/share/bash-completion/completions/dist-cli
  dist-cli completions zsh > ~/.zfunc/_dist-cli
  dist-cli completions fish > ~/.config/fish/completions/dist-cli.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// Why there is nothing to run.
#[derive(Debug)]
pub enum NoRun {
    /// Help, version, or what clap has to say against the command line.
    Clap(clap::Error),
    /// The settings file.
    Settings(anyhow::Error),
}

/// The command with an environment variable for every flag.
pub fn command() -> Command {
    with_environment(Cli::command())
}

fn with_environment(command: Command) -> Command {
    let command = command.mut_args(|arg| {
        if arg.get_long().is_none() || arg.get_id() == "help" || arg.get_id() == "version" {
            return arg;
        }
        let name = format!("DIST_{}", arg.get_id().as_str().to_ascii_uppercase());
        let is_switch = matches!(arg.get_action(), ArgAction::SetTrue);
        let arg = arg.env(name).hide_env(true);
        if is_switch { arg.value_parser(switch) } else { arg }
    });
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, with_environment))
}

/// What a variable of a flag without a value says; an empty one says nothing.
fn switch(word: &str) -> Result<bool, String> {
    match word.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "" | "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => Err("it is a switch: 1, true, yes, on, or 0, false, no, off".to_owned()),
    }
}

/// `dist-cli`, and the command that was typed if there is such.
pub fn typed_command(mut args: impl Iterator<Item = OsString>) -> String {
    let (mut typed, mut at) = ("dist-cli".to_owned(), command());
    while let Some(sub) =
        args.find_map(|word| at.get_subcommands().find(|sub| word == sub.get_name()).cloned())
    {
        typed.extend([" ", sub.get_name()]);
        at = sub;
    }
    typed
}

/// The variable that a wrong value comes from, if it is one of a flag that was not typed.
pub fn variable_of(
    told: &clap::Error,
    mut args: impl Iterator<Item = OsString>,
    is_set: impl FnOnce(&str) -> bool,
) -> Option<String> {
    let Some(ContextValue::String(arg)) = told.get(ContextKind::InvalidArg) else { return None };
    let long = arg.strip_prefix("--")?.split([' ', '=']).next()?;
    let name_of = |word: OsString| {
        let word = word.to_string_lossy();
        word.strip_prefix("--").and_then(|word| word.split('=').next()).map(str::to_owned)
    };
    if args.any(|word| name_of(word).as_deref() == Some(long)) {
        return None;
    }
    let name = format!("DIST_{}", long.replace('-', "_").to_ascii_uppercase());
    is_set(&name).then_some(name)
}

/// Reads the command line, the environment and the settings file.
pub fn parse(args: &[OsString]) -> Result<Cli, NoRun> {
    let first = command().try_get_matches_from(args).map_err(NoRun::Clap)?;
    let path = first.get_one::<PathBuf>("config").cloned();
    let matches = match Settings::find(path.as_deref()).map_err(NoRun::Settings)? {
        None => first,
        Some(settings) => {
            let command = settings.apply(command()).map_err(NoRun::Settings)?;
            // The same words passed without the file, so it is the file's values that do not.
            command.try_get_matches_from(args).map_err(|error| {
                let what = format!("{} has a value that does not fit", settings.path().display());
                let told = error.to_string();
                let first_line = told.lines().next().unwrap_or_default();
                let cause = anyhow::anyhow!("{}", first_line.trim_start_matches("error: ").to_owned());
                NoRun::Settings(Problem::usage(what).because(cause).into())
            })?
        }
    };
    of_matches(&matches).map_err(NoRun::Clap)
}

fn of_matches(matches: &ArgMatches) -> Result<Cli, clap::Error> {
    let mut cli = Cli::from_arg_matches(matches)?;
    if let (Action::Infer(args), Some((_, matches))) = (&mut cli.action, matches.subcommand()) {
        args.prompts.settle(matches);
    }
    Ok(cli)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_flag_has_its_variable() {
        let root = command();
        for sub in root.get_subcommands() {
            for arg in sub.get_arguments().filter(|arg| arg.get_long().is_some() && arg.get_id() != "help") {
                let expected = format!("DIST_{}", arg.get_id().as_str().to_ascii_uppercase());
                assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(expected.as_str()));
            }
        }
    }

    #[test]
    fn a_wrong_value_that_nobody_typed_is_a_variables() {
        let words = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        let typed = words("dist-cli infer --max-seq-len abc");
        let told = command().try_get_matches_from(&typed).unwrap_err();
        let variable = |args: Vec<OsString>, is_set: bool| variable_of(&told, args.into_iter(), |_| is_set);
        assert_eq!(variable(typed, true), None);
        assert_eq!(variable(words("dist-cli infer --max-seq-len=abc"), true), None);
        assert_eq!(variable(words("dist-cli infer"), true).as_deref(), Some("DIST_MAX_SEQ_LEN"));
        assert_eq!(variable(words("dist-cli infer"), false), None);
    }

    #[test]
    fn what_was_typed_goes_down_to_the_last_command() {
        let typed = |words: &str| typed_command(words.split(' ').map(OsString::from));
        assert_eq!(typed("dist-cli kernels build --arch sm_99"), "dist-cli kernels build");
        assert_eq!(typed("dist-cli infer --prompt kernels"), "dist-cli infer");
        assert_eq!(typed("dist-cli nothing"), "dist-cli");
    }

    #[test]
    fn a_switch_takes_what_says_yes_or_no() {
        assert!(["1", "true", "YES", "on"].into_iter().all(|word| switch(word) == Ok(true)));
        assert!(["", "0", "False", "no", "off"].into_iter().all(|word| switch(word) == Ok(false)));
        assert!(["2", "maybe", "/tmp"].into_iter().all(|word| switch(word).is_err()));
    }

    #[test]
    fn every_command_shows_examples() {
        for sub in command().get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:\n  dist-cli "), "{}", sub.get_name());
        }
    }

    #[test]
    fn names_of_others_are_understood() {
        let args = ["dist-cli", "infer", "--max-tokens", "3", "--max-model-len=64", "--temperature", "0"];
        let cli = parse(&args.map(OsString::from)).unwrap();
        let Action::Infer(args) = cli.action else { panic!("not infer") };
        assert_eq!((args.sampling.max_new_tokens, args.limits.max_seq_len), (3, Some(64)));
    }
}
