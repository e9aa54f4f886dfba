//! How the ranks of a run come to be: this process's place among them, who starts whom, and where they meet.
//!
//! [`Launch::of`] decides from flags and environment, [`Launch::meet`] starts local ranks and brings all together. What
//! is computed there is no matter here: `infer`, `benchmark` and `doctor` all start their ranks this way.

mod address;
mod environment;
mod local;
mod nodelist;
mod place;
mod secret;
mod team;

pub use local::{LocalRanks, follow_parent, tell_for_stopped_parent};
pub use place::{Launch, Split, read_plan};
pub use team::{Identity, Team, explain, lost_problem};
