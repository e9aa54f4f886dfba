//! `dist-cli completions`: the script by which a shell knows the flags.

use crate::cli::{CompletionsArgs, command};
use crate::render;

/// Writes the script.
pub fn run(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command(), "dist-cli", &mut script);
    render::result(&String::from_utf8_lossy(&script))
}
