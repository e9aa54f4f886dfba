//! `dist-cli`: plans, runs and measures GPT-3-class models. It parses, dispatches and gives the exit code; nothing more.

#![expect(
    unreachable_pub,
    reason = "a program has no outside: `pub` marks what a module offers to the others"
)]

mod bench;
mod cli;
mod commands;
mod doctor;
mod flags;
mod generation;
mod gpu;
mod interrupt;
mod launch;
mod machine;
mod model;
mod probe;
mod problem;
mod prompt_line;
mod prompts;
mod render;
mod session;
mod settings;

use std::process::ExitCode;

use clap::error::ErrorKind;
use cli::{Action, Cli, NoRun};
use generation::Ending;
use render::Console;

fn main() -> ExitCode {
    let is_started_rank = match launch::follow_parent() {
        Ok(is_started_rank) => is_started_rank,
        Err(error) => {
            Console::plain().error(&error);
            return ExitCode::FAILURE;
        }
    };
    let mut cli = match cli::parse(&std::env::args_os().collect::<Vec<_>>()) {
        Ok(cli) => cli,
        Err(NoRun::Clap(told)) => return not_run(&told),
        Err(NoRun::Settings(error)) => {
            Console::plain().error(&error);
            return ExitCode::from(problem::exit_of(&error) as u8);
        }
    };
    if is_started_rank {
        // Whoever started it reads its lines.
        cli.manner.color = cli::ColorFlag::Never;
    }
    let console = Console::new(&cli.manner);
    log(cli.manner.verbose);
    match run(cli, &console) {
        Ok(Ending::Whole | Ending::OutputClosed) => ExitCode::SUCCESS,
        Ok(Ending::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Err(error) => {
            console.error(&error);
            if is_started_rank {
                launch::tell_for_stopped_parent(&console.told(&error));
            }
            ExitCode::from(problem::exit_of(&error) as u8)
        }
    }
}

/// Help and version were asked for, or the command line is wrong.
fn not_run(told: &clap::Error) -> ExitCode {
    let is_help = told.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if told.use_stderr() && !is_help {
        let command = cli::typed_command(std::env::args_os());
        let variable = cli::variable_of(told, std::env::args_os(), |name| std::env::var_os(name).is_some());
        Console::plain().usage(told, &command, variable.as_deref());
    } else {
        // Help that nobody reads any more is no error.
        let _ = told.print();
    }
    ExitCode::from(told.exit_code() as u8)
}

fn run(cli: Cli, console: &Console) -> anyhow::Result<Ending> {
    match cli.action {
        Action::Infer(args) => return commands::infer::run(*args, console),
        Action::Benchmark(args) => return commands::benchmark::run(*args, console),
        Action::Export(args) => return commands::export::run(*args, console),
        Action::Shard(args) => return commands::shard::run(*args, console),
        Action::Plan(args) => commands::plan::run(*args)?,
        Action::Doctor(args) => commands::doctor::run(&args, console)?,
        Action::Kernels(args) => commands::kernels::run(&args, console)?,
        Action::Completions(args) => commands::completions::run(&args)?,
    }
    Ok(Ending::Whole)
}

/// What the libraries log, on standard error.
fn log(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(false).init();
}
