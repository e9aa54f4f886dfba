# What the scripts beside this one share; sourced with `binary` set. Leaves a scratch folder in `scratch`, which goes with
# all that `at_end` was given.
# shellcheck shell=bash

scratch=$(mktemp -d)
mkdir "$scratch/log"
endings=()
# Tells our processes from those of another run of the same binary.
export CLUSTER_RUN=$scratch
# Names of namespaces and links are this run's own. Without namespaces a script sets `has_hosts=0`.
id=$((BASHPID % 100000))
has_hosts=1
printf '127.0.0.1 localhost\n' >"$scratch/hosts"

finish() {
    local status=$?
    set +e
    # What still runs after a failure would hold the namespaces and the launchers.
    # shellcheck disable=SC2046 # One word a process.
    kill -9 $(processes "$binary") 2>/dev/null
    for ((i = ${#endings[@]} - 1; i >= 0; i--)); do eval "${endings[$i]}" >/dev/null 2>&1; done
    rm -rf "$scratch"
    exit "$status"
}
trap finish EXIT

# Runs a command at the end, last given first.
at_end() {
    endings+=("$1")
}

# in_host HOST COMMAND…: not `ip netns exec`, which mounts another /sys, where slurmd misses its control groups.
in_host() {
    local host=$1
    shift
    if ((!has_hosts)); then
        "$@"
        return
    fi
    nsenter --net="/run/netns/d$id-$host" unshare --uts --mount bash -c \
        'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"' "$host" "$scratch/hosts" "$@"
}

# One prompt, greedy, as JSON; and one that takes long enough to be disturbed.
request=(--json --temperature 0 --max-new-tokens 24 --prompt "The house stands")
long_request=(--model gpt3-125m --temperature 0 --prompt-ids "1,2,3" --max-new-tokens 2000 --json)

# stop PIDFILE: ends a daemon and waits until it has ended.
stop() {
    local pid until=$((SECONDS + 10))
    pid=$(cat "$1") || return 0
    kill "$pid" || return 0
    while [[ -d /proc/$pid && $(awk '{ print $3 }' "/proc/$pid/stat") != Z ]] && ((SECONDS <= until)); do
        sleep 0.05
    done
    kill -9 "$pid"
}

skip() {
    echo "cannot be run here: $1"
    exit 77
}

fail() {
    echo "FAILED: $1"
    for file in "$scratch"/said* "$scratch"/log/*; do
        if [[ -s $file ]]; then
            echo "--- ${file##*/}"
            tail -n 30 "$file"
        fi
    done
    exit 1
}

# need PACKAGE COMMAND: installs what is missing, where that is allowed.
need() {
    if command -v "$2" >/dev/null; then return; fi
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        skip "$2 is missing, and installing $1 takes root and apt-get"
    fi
    export DEBIAN_FRONTEND=noninteractive
    local log=$scratch/apt
    if ! { apt-get update && apt-get install -y --no-install-recommends "$1"; } >"$log" 2>&1; then
        skip "$1 cannot be installed: $(tail -n 1 "$log")"
    fi
}

# within SECONDS COMMAND…: also for functions, which `timeout` does not know.
within() {
    local limit=$1
    shift
    "$@" &
    local job=$! until=$((SECONDS + limit))
    while kill -0 "$job" 2>/dev/null; do
        if ((SECONDS > until)); then
            kill -9 "$job"
            fail "not done after $limit s: $*"
        fi
        sleep 0.05
    done
    wait "$job"
}

ids() {
    grep -o '"ids":\[[0-9,]*\]' "$1" | head -n 1
}

one_rank() {
    "$binary" infer "${request[@]}" </dev/null 2>/dev/null
}

# same A B WHAT: both wrote the same new tokens.
same() {
    local a b
    a=$(ids "$1")
    b=$(ids "$2" || true)
    if [[ -z $a || $a != "$b" ]]; then
        fail "$3: one rank wrote $a, these ranks $b"
    fi
    echo "$3: the tokens of one rank"
}

# ranks_met FILE N WHAT: doctor's report has N ranks and all their pairs, and found nothing that forbids a run.
ranks_met() {
    local n_ranks n_pairs
    n_ranks=$(grep -o '"pid":[0-9]*' "$1" | sort -u | wc -l)
    n_pairs=$(grep -o '"round_trip_us":[0-9.]*' "$1" | wc -l)
    if ((n_ranks != $2 || n_pairs != $2 * ($2 - 1) / 2)) || ! grep -q '"is_fit":true' "$1"; then
        fail "$3: $n_ranks ranks and $n_pairs pairs, in $(cat "$1")"
    fi
    echo "$3: $n_ranks ranks, $n_pairs pairs"
}

said() {
    grep -qF -- "$2" "$1" || fail "nobody said: $2"
}

# rank_process VARIABLE=VALUE BINARY: the process of that binary with that variable, once it is there.
rank_process() {
    local until=$((SECONDS + 20)) pid
    while ((SECONDS <= until)); do
        for pid in $(processes "$2"); do
            if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx -- "$1"; then
                echo "$pid"
                return
            fi
        done
        sleep 0.05
    done
    return 1
}

# Processes of this run that run a binary.
processes() {
    local exe dir
    for exe in /proc/[0-9]*/exe; do
        if [[ $(readlink "$exe" 2>/dev/null) != "$1" ]]; then continue; fi
        dir=${exe%/exe}
        if tr '\0' '\n' <"$dir/environ" 2>/dev/null | grep -qxF "CLUSTER_RUN=$CLUSTER_RUN"; then
            echo "${dir#/proc/}"
        fi
    done
}

# Waits until all ranks are at work: each has taken processor time for its weights and then some.
wait_for_work() {
    local until=$((SECONDS + 60)) pid ticks least
    while ((SECONDS <= until)); do
        least=1000000
        for pid in $(processes "$binary"); do
            ticks=$(awk '{ print $14 + $15 }' "/proc/$pid/stat" 2>/dev/null || echo 0)
            if ((ticks < least)); then least=$ticks; fi
        done
        # In hundredths of a second.
        if ((least < 1000000 && least >= "$1")); then return; fi
        sleep 0.05
    done
    fail "the ranks never began"
}

# ended_badly JOB SECONDS WHAT: a job in the background ends with an error in time.
ended_badly() {
    local until=$((SECONDS + $2))
    while kill -0 "$1" 2>/dev/null; do
        if ((SECONDS > until)); then
            kill -9 "$1"
            fail "$3: still there after $2 s"
        fi
        sleep 0.05
    done
    if wait "$1"; then fail "$3: ended as if all were well"; fi
    echo "$3: ended with an error"
}

# nobody_left [SECONDS]: no process of the binary is left, after a moment.
nobody_left() {
    local until=$((SECONDS + ${1:-5}))
    while ((SECONDS <= until)); do
        if [[ -z $(processes "$binary") ]]; then return; fi
        sleep 0.05
    done
    fail "ranks are left over: $(processes "$binary" | tr '\n' ' ')"
}
