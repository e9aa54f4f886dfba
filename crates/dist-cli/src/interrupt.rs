//! Ctrl-C: the first one asks, the second one ends the process at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::SIGINT;

/// The shell's code of a process that SIGINT ended.
pub const EXIT_CODE: u8 = 130;

/// From now on the first Ctrl-C sets the flag that is returned.
pub fn listen() -> anyhow::Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    // In this order: the exit is taken when an earlier signal has set the flag already.
    signal_hook::flag::register_conditional_shutdown(SIGINT, i32::from(EXIT_CODE), Arc::clone(&asked))?;
    signal_hook::flag::register(SIGINT, Arc::clone(&asked))?;
    Ok(asked)
}
