#!/usr/bin/env bash
# Builds what runs on a machine with a GPU and without Rust, and collects it in carry/, which git ignores: the release
# binary, the tests and benches of GPUs, run.sh, which runs them there, and record_gpu.sh, which measures for the record.
# Nothing of CUDA is needed here.
#
# A test or bench is one of GPUs if its name begins with cuda_; of dist-kernels' own tests those under cuda:: are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly out=carry
rm -rf "$out/bin" "$out/tests.txt" "$out/benches.txt"
mkdir -p "$out/bin"

# executables KIND COMMAND…: `name path` of each that the command builds
executables() {
    "${@:2}" --no-run --message-format=json 2>/dev/null | python3 -c '
import json, sys

for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"][0] == sys.argv[1]:
        print(message["target"]["name"], message["executable"])
' "$1"
}

# take NAME PATH
take() {
    strip -o "$out/bin/$1" "$2"
}

# There is no repository where these run; binaries and results name the commit all the same.
DIST_COMMIT=$(git describe --always --dirty --abbrev=12 --exclude '*')
export DIST_COMMIT
echo "$DIST_COMMIT" >"$out/commit"

cargo build --release --locked -p dist-cli
take dist-cli "${CARGO_TARGET_DIR:-target}/release/dist-cli"

cargo test --locked -p dist-kernels -p dist-models --no-run
while read -r name path; do
    if [[ $name == dist_kernels ]]; then
        take kernels_lib "$path"
        echo "kernels_lib cuda::" >>"$out/tests.txt"
    fi
done < <(executables lib cargo test --locked -p dist-kernels -p dist-models)
while read -r name path; do
    if [[ $name == cuda_* ]]; then
        take "$name" "$path"
        echo "$name" >>"$out/tests.txt"
    fi
done < <(executables test cargo test --locked -p dist-kernels -p dist-models)
while read -r name path; do
    if [[ $name == cuda_* ]]; then
        take "bench_$name" "$path"
        echo "bench_$name" >>"$out/benches.txt"
    fi
done < <(executables bench cargo bench --locked -p dist-kernels --bench 'cuda_*')

cp tests/gpu/run.sh benches/record_gpu.sh "$out/"
du -sh "$out"
