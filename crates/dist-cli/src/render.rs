//! What people and programs see. Results go to standard output, everything else to standard error; nothing else prints.

mod answers;
mod benchmark;
mod console;
mod doctor;
mod kernels;
mod plan;
mod progress;
mod shard;
mod text;

pub use answers::{JsonLines, Silent, answer_json};
pub use benchmark::{benchmark_json, benchmark_table};
pub use console::Console;
pub use doctor::{doctor_json, doctor_text};
pub use kernels::{built_json, built_text, listed_json, listed_text};
pub use plan::{plan_json, plan_text};
pub use progress::{BatchBar, CopyBar, LoadBar};
pub use shard::{exported_json, exported_text, listing_json, listing_text, verified_json, verified_text};
pub use text::TextWatch;

use std::io::{self, Write};

use crate::generation::output_problem;

/// Milliseconds with three digits after the point, as JSON has them.
fn milliseconds(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Writes a whole result; that nobody reads it any more is no error.
pub fn result(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(output_problem(error).into()),
        _ => Ok(()),
    }
}
