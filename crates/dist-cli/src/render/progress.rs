//! Bars on a terminal, for what takes longer than a second.

use std::time::{Duration, Instant};

use dist_models::decoder::LoadProgress;
use dist_models::export::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Console;

/// Waiting that needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// How far loading is.
pub struct LoadBar {
    start: Instant,
    bar: Option<ProgressBar>,
    is_shown: bool,
}

impl LoadBar {
    /// A bar that waits a second before it shows.
    pub fn new(console: &Console) -> Self {
        Self { start: Instant::now(), bar: None, is_shown: console.has_bars() }
    }

    /// Takes news.
    pub fn update(&mut self, progress: LoadProgress) {
        if !self.is_shown || self.start.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::new(progress.total_bytes);
            bar.with_style(style("loading {wide_bar} {decimal_bytes}/{decimal_total_bytes} {eta}"))
        });
        bar.set_position(progress.done_bytes);
    }

    /// Wipes it.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How far reading and writing are.
pub struct CopyBar {
    start: Instant,
    what: &'static str,
    bar: Option<ProgressBar>,
    is_shown: bool,
}

impl CopyBar {
    /// A bar that waits a second before it shows; `what` is done to the bytes.
    pub fn new(console: &Console, what: &'static str) -> Self {
        Self { start: Instant::now(), what, bar: None, is_shown: console.has_bars() }
    }

    /// Takes news.
    pub fn update(&mut self, progress: Progress) {
        if !self.is_shown || self.start.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let template =
                "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}";
            let bar = ProgressBar::new(progress.total_bytes).with_elapsed(self.start.elapsed());
            bar.with_style(style(template)).with_message(self.what)
        });
        bar.set_position(progress.done_bytes);
        if progress.done_bytes == progress.total_bytes {
            // What follows is the disk's business.
            bar.set_message("to the disk");
        }
    }
}

impl Drop for CopyBar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// How many prompts of a batch are answered.
pub struct BatchBar(ProgressBar);

impl BatchBar {
    /// A bar over `n` prompts.
    pub fn new(console: &Console, n: usize) -> Self {
        let target = if console.has_bars() && n > 1 {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(n as u64), target);
        Self(bar.with_style(style("{wide_bar} {pos}/{len} prompts {elapsed}<{eta}")))
    }

    /// One more is answered.
    pub fn advance(&self) {
        self.0.inc(1);
    }

    /// Writes without the bar in between.
    pub fn beside<T>(&self, write: impl FnOnce() -> T) -> T {
        self.0.suspend(write)
    }
}

impl Drop for BatchBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
