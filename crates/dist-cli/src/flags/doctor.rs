//! Flags of `doctor`.

use clap::Args;

use super::MeshArgs;

const AFTER_HELP: &str = "\
Alone it looks at this machine. With --tp, --pp, --nnodes, or under mpirun, srun
or torchrun, the ranks meet as for a run, and each pair is measured.

Exit codes: 0 runs can be expected to work, 1 they cannot, 2 a flag is wrong.

Examples:
  dist-cli doctor
  dist-cli doctor --tp 2
  dist-cli doctor --tp 2 --nnodes 2 --node-rank 0 --master node1:29500 --secret-file secret
  mpirun -n 4 dist-cli doctor
  dist-cli doctor --json";

/// Flags of `doctor`.
#[derive(Args, Clone, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct DoctorArgs {
    /// How many ranks there are, and how they find each other.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Writes one JSON object
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}
