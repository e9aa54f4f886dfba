#!/usr/bin/env bash
# Measures all that README's tables quote for a GPU and writes it to $OUT (results/ beside this script by default) as
# CARD-*.json: h100-decode-6.7b.json. It runs from the folder that tests/gpu/collect.sh fills: no cargo, no git. About two
# minutes on one H200; needs 80 GB on the card, and 32 GB of memory.
#
#   record_gpu.sh [kernels|decode|first|offline]…
#
# DIST_COMMIT names the commit, else the file `commit` does. Kernels are kept in DIST_KERNEL_CACHE (kernels/ beside this
# script by default) and compiled before anything is measured.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly device=${DEVICE:-cuda} seconds_max=${SECONDS_MAX:-300}
results=$(realpath -m "${OUT:-results}")
DIST_COMMIT=${DIST_COMMIT:-$(cat commit 2>/dev/null)}
export DIST_COMMIT DIST_KERNEL_CACHE="${DIST_KERNEL_CACHE:-$PWD/kernels}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$results"
status=0
log=()
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
# The second word of NVIDIA's name: h100, h200, a100-sxm4-80gb.
card=$(awk '{ print tolower($2) }' <<<"$gpu")
card=${card:-gpu}
gpu_gib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
gpu_gib=$((${gpu_gib:-0} / 1024))

# measure NAME COMMAND…: its output becomes CARD-NAME.json if it succeeds
measure() {
    local name=$1 start=$EPOCHREALTIME result=ok
    shift
    if "$@" >"$scratch/out" 2>"$scratch/err"; then
        cp "$scratch/out" "$results/$card-$name.json"
    else
        result="FAILED with status $?"
        status=1
        tail -n 20 "$scratch/err"
    fi
    log+=("$(printf '%-24s %-24s %6.1f s' "$name" "$result" "$(awk "BEGIN { print $EPOCHREALTIME - $start }")")")
    echo "${log[-1]}"
}

# benchmark NAME PRESET FLAG…
benchmark() {
    local name=$1 preset=$2
    shift 2
    measure "$name" timeout "$seconds_max" bin/dist-cli benchmark --quiet --json --device "$device" --model "$preset" "$@"
}

# The table is kept beside the record.
kernels() {
    timeout "$seconds_max" bin/bench_cuda_kernels --json kernels.json >kernels.txt || return
    mv kernels.txt "$results/$card-kernels.txt" && cat kernels.json && rm kernels.json
}

decode() {
    local size
    for size in 1.3b 6.7b; do
        benchmark "decode-$size" "gpt3-$size" --batch 1,8,32,64 --prompt-len 128 --new-tokens 128 --max-batch-tokens 2048
    done
    benchmark decode-6.7b-1024 gpt3-6.7b --batch 64 --prompt-len 1024 --new-tokens 128 --max-batch-tokens 4096 --repeats 2
    benchmark decode-13b gpt3-13b --batch 1,32 --prompt-len 128 --new-tokens 128
}

# The whole prompt in one step.
first() {
    benchmark first-6.7b gpt3-6.7b --batch 1 --prompt-len 128,1024 --new-tokens 2 --max-batch-tokens 1024 --repeats 9
}

# prompts N LEN N_VOCAB: N prompts of LEN tokens each, no two alike
prompts() {
    awk -v n="$1" -v len="$2" -v vocab="$3" 'BEGIN {
        state = 1
        for (i = 0; i < n; i++) {
            printf "{\"prompt_ids\":["
            for (j = 0; j < len; j++) {
                state = (state * 16807) % 2147483647
                printf "%s%d", j ? "," : "", state % (vocab - 1) + 1
            }
            print "]}"
        }
    }'
}

# batch PRESET N LEN MAX_SEQS MAX_BATCH_TOKENS: N requests of LEN tokens in and as many out, all there at once
batch() {
    local preset=$1 n=$2 len=$3 answers=$scratch/answers.jsonl
    local command=(bin/dist-cli infer --device "$device" --model "$preset" --prompts prompts.jsonl --max-new-tokens "$len"
        --ignore-eos --temperature 0 --max-seq-len "$((2 * len))" --max-seqs "$4" --max-batch-tokens "$5")
    prompts "$n" "$len" 50257 >"$scratch/prompts.jsonl"
    timeout "$seconds_max" "${command[@]/#prompts.jsonl/$scratch/prompts.jsonl}" >"$answers" || return
    # All requests arrive together, so the last one's time is that of the batch.
    awk -v command="${command[*]}" -v commit="$DIST_COMMIT" -v date="$(date -u +%FT%TZ)" -v n="$n" -v len="$len" \
        -v name="$gpu" '
        match($0, /"total_ms":[0-9.]+/) { ms = substr($0, RSTART + 11, RLENGTH - 11); if (ms + 0 > most) most = ms + 0 }
        match($0, /"ttft_ms":[0-9.]+/) { ms = substr($0, RSTART + 10, RLENGTH - 10); if (ms + 0 > first) first = ms + 0 }
        match($0, /"n_new_tokens":[0-9]+/) { tokens += substr($0, RSTART + 15, RLENGTH - 15) }
        END {
            if (NR != n || most == 0) exit 1
            printf "{\"schema_version\":1,\"command\":\"%s\",\"commit\":\"%s\",\"date\":\"%s\",", command, commit, date
            printf "\"device\":{\"kind\":\"cuda\",\"name\":\"%s\"},\"requests\":%d,\"prompt_len\":%d,", name, n, len
            printf "\"new_tokens\":%d,\"seconds\":%.3f,\"last_first_token_s\":%.3f,\"output_tokens_per_s\":%.1f}\n",
                tokens, most / 1e3, first / 1e3, tokens / most * 1e3
        }' "$answers"
}

# As many sequences as there is memory for, up to what a step can use.
offline() {
    local seqs=256 tokens=2048
    if ((gpu_gib > 100)); then seqs=512 tokens=4096; fi
    measure offline-6.7b batch gpt3-6.7b 1024 128 "${MAX_SEQS:-$seqs}" "${MAX_BATCH_TOKENS:-$tokens}"
    measure offline-1.3b batch gpt3-1.3b 1024 128 "${MAX_SEQS:-512}" "${MAX_BATCH_TOKENS:-4096}"
    if ((gpu_gib > 100)); then
        measure offline-13b batch gpt3-13b 1024 128 "${MAX_SEQS:-384}" "${MAX_BATCH_TOKENS:-4096}"
    fi
}

all=(kernels decode first offline)
for what in "$@"; do
    if [[ " ${all[*]} " != *" $what "* ]]; then echo "nothing is called $what: ${all[*]}" >&2 && exit 2; fi
done
# What the machine is, beside every figure. Where only a part is measured again, behind what was measured before.
if (($# == 0)); then rm -f "$results/$card-machine.txt"; fi
{
    echo "commit=$DIST_COMMIT date=$(date -u +%FT%TZ) cores=$(nproc) memory=$(awk '/MemTotal/ { print $2 }' /proc/meminfo) kB"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,memory.total \
        --format=csv
    bin/dist-cli doctor | sed -nE '/^ +(CUDA driver|NVRTC|cuBLASLt) /{s/^ +//;s/ +/ /g;s/ (at|by the loader) .*//;p}'
    bin/dist-cli kernels list | grep -v '^kept in'
} >>"$results/$card-machine.txt" 2>&1
# Kernels are compiled by whoever needs them first, which must not be what is measured.
bin/dist-cli benchmark --quiet --device "$device" --batch 1,64 --prompt-len 128 --new-tokens 2 --repeats 1 >/dev/null || status=1
for what in "${@:-${all[@]}}"; do
    case $what in
        kernels) measure kernels kernels ;;
        *) "$what" ;;
    esac
done
printf '%s\n' "${log[@]}" >>"$results/$card-machine.txt"
exit "$status"
