#!/usr/bin/env bash
# Measures all that README's tables quote for a CPU and writes it to benches/results/cpu-*. About ten minutes, on a
# machine that does nothing else; needs 8 GB of memory and 12 GB of disk in TMPDIR.
#
#   benches/record_cpu.sh [linear|attention|ops|comm|decode|ranks|start|shard]…
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=$PWD/benches/results
binary=${CARGO_TARGET_DIR:-target}/release/dist-cli
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$results"

device=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)
origin="device=\"$device\" cores=$(nproc) commit=$(git rev-parse --short HEAD) date=$(date -u +%FT%TZ)"

# The table at the end of a criterion bench; its last lines say where it comes from.
kernels() {
    cargo bench -q -p dist-kernels --bench "$1" 2>/dev/null | sed -n '/^op  /,$p' >"$results/cpu-$1.txt"
}

median() {
    sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'
}

decode() {
    "$binary" benchmark --quiet --json --model gpt3-1.3b --batch 1,4,8,16,32 --prompt-len 16 --new-tokens 24 --repeats 3 \
        >"$results/cpu-decode.json"
    "$binary" benchmark --quiet --json --model gpt3-1.3b --prompt-len 512 --new-tokens 2 --repeats 3 \
        >"$results/cpu-prefill.json"
}

# One rank with two threads and two ranks with one each, by turns.
ranks() {
    local round
    for round in 1 2 3; do
        for tp in 1 2; do
            "$binary" benchmark --quiet --json --model gpt3-1.3b --tp "$tp" --threads 2 --batch 1,4 --prompt-len 16 \
                --new-tokens 24 --repeats 2 >"$results/cpu-ranks-tp$tp-$round.json"
        done
    done
    "$binary" benchmark --quiet --json --model gpt3-1.3b --pp 2 --threads 2 --batch 8 --prompt-len 16 --new-tokens 24 \
        --repeats 2 >"$results/cpu-ranks-pp2.json"
}

# Process start to the first byte of text, and the peak of memory with a mapped model.
start() {
    local i before
    {
        echo "$origin"
        for ((i = 0; i < 21; i++)); do
            before=$(date +%s%N)
            "$binary" infer --quiet --max-new-tokens 2 </dev/null | head -c 1 >/dev/null
            echo $((($(date +%s%N) - before) / 1000))
        done | median | sed 's/$/ µs from process start to the first byte of text, demo model, median of 21: dist-cli infer --quiet | head -c 1/'
        "$binary" export --model gpt3-1.3b --random-weights --out "$scratch/model" >/dev/null 2>&1
        "$binary" infer --model "$scratch/model" --prompt-ids 5,6,7 --max-new-tokens 64 --max-seq-len 512 --json \
            </dev/null >/dev/null 2>&1 &
        local pid=$! peak=0 now
        while kill -0 "$pid" 2>/dev/null; do
            now=$(awk '/^VmHWM/ { print $2 }' "/proc/$pid/status" 2>/dev/null || true)
            if [[ -n $now ]]; then peak=$now; fi
            sleep 0.02
        done
        wait "$pid"
        echo "$((peak * 1024)) bytes resident at most, gpt3-1.3b in bf16 mapped from a file, --max-seq-len 512"
        echo "$(du -sb "$scratch/model" | cut -f 1) bytes of weights in that file; KV cache of 512 tokens $((512 * 24 * 2 * 2048 * 4))"
    } >"$results/cpu-start.txt"
}

# Cutting 5 GB, beside copying and hashing the same bytes with the system's own programs.
shard() {
    local i from=$scratch/whole before
    "$binary" export --model gpt3-2.7b --random-weights --out "$from" >/dev/null 2>&1
    {
        echo "$origin"
        echo "$(du -sb "$from" | cut -f 1) bytes; seconds of: dist-cli shard --tp 2; cp and sha256sum at the same time"
        for ((i = 0; i < 3; i++)); do
            before=$(date +%s%N)
            "$binary" shard --model "$from" --tp 2 --out "$scratch/cut" >/dev/null 2>&1
            printf '%s ' "$((($(date +%s%N) - before) / 1000000))e-3"
            rm -rf "$scratch/cut"
            before=$(date +%s%N)
            sha256sum "$from"/*.safetensors >/dev/null &
            cp -r "$from" "$scratch/cut"
            sync -f "$scratch/cut"
            wait
            echo "$((($(date +%s%N) - before) / 1000000))e-3"
            rm -rf "$scratch/cut"
        done
    } >"$results/cpu-shard.txt"
}

cargo build -q --release -p dist-cli
all=(linear attention ops comm decode ranks start shard)
for what in "${@:-${all[@]}}"; do
    echo "$what"
    case $what in
        linear | attention | ops) kernels "$what" ;;
        comm) cargo bench -q -p dist-comm -- 2 4 2>/dev/null >"$results/cpu-comm.txt" ;;
        decode | ranks | start | shard) "$what" ;;
        *) echo "nothing is called $what: ${all[*]}" && exit 2 ;;
    esac
done
