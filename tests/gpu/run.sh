#!/usr/bin/env bash
# Runs what collect.sh has collected beside this file, on a machine with a GPU: all tests, then all benches, and one
# table of what became of them. A test that is skipped here is a failure: this is where none may be.
#
#   run.sh            tests and benches
#   run.sh tests      tests only
#   run.sh sanitize   tests only, under compute-sanitizer's memcheck and racecheck
#
# Libraries are looked for in the folders of DIST_CUDA_LIB, by the loader, and in /usr/local/cuda/lib64; compiled kernels are
# kept in DIST_KERNEL_CACHE.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly what=${1:-all}
case $what in
    all | tests | sanitize) ;;
    *) echo "run.sh, run.sh tests or run.sh sanitize: $what is none of them" >&2 && exit 2 ;;
esac
readonly seconds_max=${SECONDS_MAX:-300}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export DIST_SKIP_LOG="$logs/skips" DIST_KERNEL_CACHE="${DIST_KERNEL_CACHE:-$logs/kernels}"
: >"$DIST_SKIP_LOG"
table=()
status=0

# row NAME RESULT START
row() {
    table+=("$(printf '%-28s %-40s %8.1f s' "$1" "$2" "$(awk "BEGIN { print $EPOCHREALTIME - $3 }")")")
}

# run_one NAME COMMAND…: its output is told if it fails
run_one() {
    local name=$1 start=$EPOCHREALTIME result
    shift
    if timeout "$seconds_max" "$@" >"$logs/out" 2>&1; then
        result=$(grep -E '^test result' "$logs/out" | tail -n 1 | sed -E 's/test result: ok. //; s/; [0-9]+ measured.*//')
    else
        result="FAILED with status $?"
        status=1
        tail -n 60 "$logs/out"
    fi
    row "$name" "${result:-ok}" "$start"
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,memory.free --format=csv,noheader || status=1
start=$EPOCHREALTIME
if bin/dist-cli doctor >"$logs/doctor" 2>&1; then row doctor ok "$start"; else row doctor FAILED "$start"; status=1; fi
grep -E '^  (GPUs|  )' "$logs/doctor"

while read -r name filter; do
    if [[ $what == sanitize ]]; then
        # racecheck finds races in cuBLASLt's kernels on Hopper, so its tests are left out there.
        for tool in memcheck racecheck; do
            own=()
            if [[ $tool == racecheck ]]; then own=(env DIST_TEST_OWN_KERNELS=1); fi
            run_one "$name, $tool" "${own[@]}" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
                --target-processes application-only "bin/$name" ${filter:+"$filter"} --test-threads 1
        done
    else
        run_one "$name" "bin/$name" ${filter:+"$filter"}
    fi
done <tests.txt

if [[ $what == all && -f benches.txt ]]; then
    while read -r name; do
        start=$EPOCHREALTIME
        result=ok
        timeout "$seconds_max" "bin/$name" --bench 2>&1 | tee "$logs/out"
        if ((PIPESTATUS[0] != 0)); then result=FAILED; elif grep -q '^SKIPPED' "$logs/out"; then result=SKIPPED; fi
        if [[ $result != ok ]]; then status=1; fi
        row "$name" "$result" "$start"
    done <benches.txt
fi

# racecheck's tests of the library are left out on purpose.
if grep -v 'DIST_TEST_OWN_KERNELS is set$' "$DIST_SKIP_LOG" >"$logs/skipped"; then
    sed 's/^/SKIPPED: /' "$logs/skipped"
    status=1
fi
echo
printf '%s\n' "${table[@]}"
exit "$status"
