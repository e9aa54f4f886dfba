#!/usr/bin/env bash
# Two machines that are network namespaces, joined by a cable: ranks that are started by hand with --nnodes, or under
# torchrun's variables, write what one rank writes; when a rank is killed or the cable goes dead, both machines end with
# an error that names a rank; doctor sees both machines, and says what is wrong when they cannot meet.
#
#   tests/clusters/netns.sh target/release/dist-cli
#
# Exit status 77: this machine cannot do it; the reason is the last line.
set -euo pipefail
binary=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

if ((EUID != 0)); then skip "network namespaces are made as root"; fi
need iproute2 ip

# A rank that is silent for so many seconds is given up, and one more is allowed to say so; the slack is for a machine
# with fewer cores than ranks.
readonly timeout_s=3 slack_s=4
readonly at=198.18.79.1:29500

# Machines `n1` and `n2` with a cable between them.
make_hosts() {
    local host
    for host in n1 n2; do
        ip netns add "d$id-$host" || return 1
        at_end "ip netns del d$id-$host"
        ip -n "d$id-$host" link set lo up || return 1
    done
    ip -n "d$id-n1" link add cable type veth peer name cable netns "d$id-n2" || return 1
    for host in n1 n2; do
        ip -n "d$id-$host" addr add "198.18.79.${host#n}/24" dev cable || return 1
        ip -n "d$id-$host" link set cable up || return 1
        echo "198.18.79.${host#n} $host" >>"$scratch/hosts"
    done
}

# await FILE WORDS: until somebody has said so.
await() {
    local until=$((SECONDS + 60))
    until grep -qF -- "$2" "$1" 2>/dev/null; do
        if ((SECONDS > until)); then fail "nobody said in time: $2"; fi
        sleep 0.02
    done
}

# both COMMAND ARGUMENTS…: runs it on n1, and on n2 what n1 says to run there. Leaves `job1` and `job2`.
both() {
    rm -f "$scratch"/said.* "$scratch"/ranks*
    in_host n1 "$binary" "$@" --secret-file "$scratch/secret" --nnodes 2 --node-rank 0 --master "$at" -v \
        </dev/null >"$scratch/ranks.1" 2>"$scratch/said.1" &
    job1=$!
    await "$scratch/said.1" "--node-rank 1"
    in_host n2 bash -c "exec $(grep -F -- '--node-rank 1' "$scratch/said.1")" \
        </dev/null >"$scratch/ranks.2" 2>"$scratch/said.2" &
    job2=$!
}

# ended JOB SECONDS STATUS WHAT: in time, and with that exit status.
ended() {
    local until=$((SECONDS + $2)) status=0
    while kill -0 "$1" 2>/dev/null; do
        if ((SECONDS > until)); then fail "$4: still there after $2 s"; fi
        sleep 0.02
    done
    wait "$1" || status=$?
    if ((status != $3)); then fail "$4: ended with $status instead of $3"; fi
}

tests_by_hand() {
    local split
    for split in "--tp 2" "--pp 2" "--tp 2 --pp 2"; do
        # shellcheck disable=SC2086 # A split is several words.
        both infer $split "${request[@]}"
        ended "$job1" 60 0 "--nnodes 2 $split, first machine"
        ended "$job2" 10 0 "--nnodes 2 $split, second machine"
        same "$scratch/one" "$scratch/ranks.1" "--nnodes 2 $split"
        if [[ -s $scratch/ranks.2 ]]; then fail "the second machine wrote to its standard output"; fi
    done
    nobody_left
}

test_under_torchrun() {
    local rank jobs=()
    rm -f "$scratch"/said.*
    for rank in 3 2 1 0; do
        in_host "n$((rank / 2 + 1))" env WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 RANK="$rank" LOCAL_RANK=$((rank % 2)) \
            MASTER_ADDR=n1 MASTER_PORT=29500 DIST_SECRET="$(cat "$scratch/secret")" \
            "$binary" infer --tp 2 --pp 2 "${request[@]}" </dev/null >"$scratch/ranks.$rank" 2>"$scratch/said.$rank" &
        jobs[rank]=$!
    done
    for rank in 0 1 2 3; do ended "${jobs[$rank]}" 60 0 "torchrun's rank $rank"; done
    same "$scratch/one" "$scratch/ranks.0" "torchrun's variables on two machines"
    said "$scratch/said.0" "torchrun"
    nobody_left
}

kill_rank() {
    local pid
    pid=$(sed -n "s/^rank $1: pid \([0-9]*\)$/\1/p" "$scratch"/said.[12])
    if [[ -z $pid ]]; then fail "rank $1 never said its process"; fi
    kill -9 "$pid"
}

unplug() {
    ip -n "d$id-$1" link set cable down
}

# end_by WHAT SECONDS STATUS COMMAND…: with four ranks at work the command is done; the first machine ends with an error
# in that time, the second with that status.
end_by() {
    local what=$1 limit=$(($2 + slack_s)) status=$3 rank start took_ms
    shift 3
    both infer --tp 2 --pp 2 --collective-timeout "$timeout_s" "${long_request[@]}"
    for rank in 0 1; do await "$scratch/said.1" "rank $rank: weights in"; done
    for rank in 2 3; do await "$scratch/said.2" "rank $rank: weights in"; done
    start=${EPOCHREALTIME/./}
    "$@"
    ended "$job1" "$limit" 1 "$what, first machine"
    ended "$job2" "$limit" "$status" "$what, second machine"
    took_ms=$(((${EPOCHREALTIME/./} - start) / 1000))
    nobody_left 2
    echo "$what: both machines ended after $took_ms ms"
}

# blames MACHINE RANKS: the error of a machine names one of those ranks.
blames() {
    grep "^error: " "$scratch/said.$1" | grep -q "rank [$2]" || fail "machine n$1 names none of the ranks [$2]"
}

tests_of_ends() {
    local rank host
    for rank in 1 3; do
        # A closed connection is an error at once, not at the deadline.
        end_by "rank $rank is killed" 1 1 kill_rank "$rank"
        blames 1 "$rank"
        blames 2 "$rank"
    done
    # The ranks that it has started go with it.
    end_by "the first process of n2 is killed" 1 137 kill_rank 2
    blames 1 23
    for host in n1 n2; do
        end_by "the cable is pulled out of $host" $((timeout_s + 1)) 1 unplug "$host"
        blames 1 23
        blames 2 01
        ip -n "d$id-$host" link set cable up
    done
}

tests_of_doctor() {
    both doctor --tp 2 --pp 2 --json
    ended "$job1" 60 0 "doctor, first machine"
    ended "$job2" 10 0 "doctor, second machine"
    ranks_met "$scratch/ranks.1" 4 "doctor on two machines"
    local of_a_machine host
    of_a_machine=$(grep -o '"shares_memory":true' "$scratch/ranks.1" | wc -l)
    if ((of_a_machine != 2)); then fail "$of_a_machine pairs share memory, instead of one a machine"; fi
    for host in n1 n2; do
        grep -q "\"host\":\"$host\"" "$scratch/ranks.1" || fail "doctor does not know of machine $host"
    done
}

make_hosts 2>"$scratch/log/netns" || skip "network namespaces are not allowed: $(tail -n 1 "$scratch/log/netns")"
head -c 32 /dev/urandom | base64 >"$scratch/secret"
one_rank >"$scratch/one"
tests_by_hand
test_under_torchrun
tests_of_doctor
tests_of_ends
echo "two machines: all as it should be"
