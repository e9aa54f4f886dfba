#!/usr/bin/env bash
# Ranks that Open MPI's mpirun starts write what one rank writes, and end with it.
#
#   tests/clusters/mpirun.sh target/release/dist-cli
#
# Exit status 77: this machine cannot do it; the reason is the last line.
set -euo pipefail
binary=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

need openmpi-bin mpirun
one_rank >"$scratch/one"

mpi() {
    # Two cores are enough for four ranks here, and root may start them.
    mpirun --allow-run-as-root --oversubscribe --bind-to none "$@"
}

for split in "--tp 4" "--tp 2 --pp 2" "--pp 4"; do
    # shellcheck disable=SC2086 # A split is several words.
    within 60 mpi -n 4 "$binary" infer $split "${request[@]}" >"$scratch/ranks" 2>"$scratch/said"
    same "$scratch/one" "$scratch/ranks" "mpirun -n 4 … $split"
    said "$scratch/said" "Open MPI"
done

within 60 mpi -n 4 "$binary" doctor --json >"$scratch/ranks" 2>"$scratch/said"
ranks_met "$scratch/ranks" 4 "mpirun -n 4 … doctor"

# What flags say against the launcher is an error that names both.
if within 60 mpi -n 4 "$binary" infer --tp 2 --pp 1 "${request[@]}" >/dev/null 2>"$scratch/said"; then
    fail "two degrees on four ranks were accepted"
fi
said "$scratch/said" "OMPI_COMM_WORLD_SIZE=4"

# mpirun ends the job when a rank is killed, and says which.
mpi -n 4 "$binary" infer --tp 2 --pp 2 "${long_request[@]}" >"$scratch/ranks" 2>"$scratch/said" &
job=$!
victim=$(rank_process OMPI_COMM_WORLD_RANK=2 "$binary") || fail "rank 2 never came"
wait_for_work 300
kill -9 "$victim"
ended_badly "$job" 20 "mpirun after a rank was killed"
nobody_left
echo "mpirun: all as it should be"
