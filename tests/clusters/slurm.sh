#!/usr/bin/env bash
# Ranks that a real Slurm of two nodes starts write what one rank writes, and end when one of them is killed or a node's
# cable is pulled. The nodes are network namespaces on a bridge, with names of their own; where namespaces are not
# allowed, two daemons on this machine's loopback address, and no cable.
#
#   tests/clusters/slurm.sh target/release/dist-cli
#
# Exit status 77: this machine cannot do it; the reason is the last line.
set -euo pipefail
binary=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

if ((EUID != 0)); then skip "Slurm's daemons are started as root"; fi
need slurm-wlm slurmctld
need munge munged
export SLURM_CONF=$scratch/slurm.conf
DIST_SECRET=$(head -c 32 /dev/urandom | base64)
export DIST_SECRET
chmod 755 "$scratch"

# A key and a socket of our own: another munged may be running.
start_munge() {
    local dir=$scratch/munge
    mkdir "$dir"
    head -c 128 /dev/urandom >"$dir/key"
    chmod 400 "$dir/key"
    chown -R munge: "$dir"
    chmod 755 "$dir"
    runuser -u munge -- "$(command -v munged)" --key-file="$dir/key" --socket="$dir/socket" --pid-file="$dir/pid" \
        --log-file="$dir/log" --seed-file="$dir/seed"
    at_end "stop $dir/pid"
}

# Hosts `ctl`, `n1` and `n2` on a bridge. Names of namespaces and links are this run's own.
make_hosts() {
    local host i=0
    ip netns add "d$id-sw" 2>"$scratch/log/netns" || return 1
    at_end "ip netns del d$id-sw"
    ip -n "d$id-sw" link add br0 type bridge || return 1
    ip -n "d$id-sw" link set br0 up
    for host in ctl n1 n2; do
        i=$((i + 1))
        ip netns add "d$id-$host"
        at_end "ip netns del d$id-$host"
        ip link add "v$id$host" netns "d$id-$host" type veth peer name "p-$host" netns "d$id-sw"
        ip -n "d$id-sw" link set "p-$host" master br0 up
        ip -n "d$id-$host" addr add "198.18.77.$i/24" dev "v$id$host"
        ip -n "d$id-$host" link set "v$id$host" up
        ip -n "d$id-$host" link set lo up
        echo "198.18.77.$i $host" >>"$scratch/hosts"
    done
}

write_conf() {
    local ctl=ctl addr="198.18.77.1" nodes
    nodes="NodeName=n1 NodeHostname=n1 NodeAddr=198.18.77.2 CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=n2 NodeAddr=198.18.77.3 CPUs=2 RealMemory=1000"
    if ((!has_hosts)); then
        ctl=$(hostname)
        addr=127.0.0.1
        nodes="NodeName=n1 NodeHostname=$ctl NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname=$ctl NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=1000"
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=dist
SlurmctldHost=$ctl($addr)
SlurmctldPort=17017
SlurmdPort=17018
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$scratch/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SlurmdTimeout=10
SlurmdParameters=config_overrides
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool.%n
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.%n.pid
SlurmctldLogFile=$scratch/log/slurmctld
SlurmdLogFile=$scratch/log/slurmd.%n
$nodes
PartitionName=all Nodes=n1,n2 Default=YES State=UP
CONF
}

start_slurm() {
    at_end end_steps
    in_host ctl slurmctld
    at_end "stop $scratch/slurmctld.pid"
    local node
    for node in n1 n2; do
        in_host "$node" slurmd -N "$node"
        at_end "stop $scratch/slurmd.$node.pid"
    done
    local until=$((SECONDS + 30))
    while [[ $(in_host ctl sinfo -h -o '%T' | sort -u) != idle ]]; do
        if ((SECONDS > until)); then fail "the nodes never came up: $(in_host ctl sinfo -h -o '%N %T')"; fi
        sleep 0.1
    done
}

# A step whose node was cut off outlives its job; all of ours have our configuration in their environment.
end_steps() {
    local pid
    for pid in $(pgrep -f '^slurmstepd'); do
        if tr '\0' '\n' <"/proc/$pid/environ" | grep -qx "SLURM_CONF=$SLURM_CONF"; then kill -9 "$pid"; fi
    done
}

srun_on() {
    in_host ctl srun -N2 -n4 --overcommit --mpi=none "$@"
}

# Four ranks on two nodes; a rank killed, seen by all others.
tests_of_ranks() {
    local split
    for split in "--tp 4" "--tp 2 --pp 2"; do
        # shellcheck disable=SC2086 # A split is several words.
        within 60 srun_on "$binary" infer $split "${where[@]}" "${request[@]}" >"$scratch/ranks" 2>"$scratch/said"
        same "$scratch/one" "$scratch/ranks" "srun -N2 -n4 … $split"
        said "$scratch/said" "Slurm"
    done

    within 60 srun_on "$binary" doctor "${where[@]}" --json >"$scratch/ranks" 2>"$scratch/said"
    ranks_met "$scratch/ranks" 4 "srun -N2 -n4 … doctor"

    srun_on -K1 "$binary" infer --tp 2 --pp 2 "${where[@]}" "${long_request[@]}" >"$scratch/ranks" 2>"$scratch/said" &
    local job=$! victim
    victim=$(rank_process SLURM_PROCID=2 "$binary") || fail "task 2 never came"
    wait_for_work 300
    kill -9 "$victim"
    ended_badly "$job" 20 "srun after rank 2 was killed"
    said "$scratch/said" "rank 2"
    nobody_left
}

# The cable of n2: both sides end within the deadline plus a second, and each names one of the other side.
test_of_the_cable() {
    srun_on --error="$scratch/said.%t" "$binary" infer --tp 2 --pp 2 --collective-timeout 3 "${where[@]}" \
        "${long_request[@]}" >"$scratch/ranks" 2>"$scratch/said" &
    local job=$! start
    rank_process SLURM_PROCID=3 "$binary" >/dev/null || fail "task 3 never came"
    wait_for_work 300
    ip -n "d$id-sw" link set p-n2 down
    start=$SECONDS
    nobody_left 10
    echo "a pulled cable: all ranks ended after $((SECONDS - start)) s"
    grep -qE "rank [23]" "$scratch/said.0" || fail "rank 0 blames nobody of the other node"
    grep -qE "rank [01]" "$scratch/said.2" || fail "rank 2 blames nobody of the other node"
    ip -n "d$id-sw" link set p-n2 up
    kill "$job" 2>/dev/null || true
    wait "$job" || true
}

make_hosts || has_hosts=0
# On one machine both nodes would be found at the same address, which their names do not say.
where=()
if ((!has_hosts)); then
    echo "network namespaces are not allowed here: two daemons on the loopback address, no cable to pull"
    where=(--master 127.0.0.1:17019)
fi
start_munge
write_conf
mkdir "$scratch/state"
start_slurm
one_rank >"$scratch/one"
tests_of_ranks
if ((has_hosts)); then test_of_the_cable; fi
echo "Slurm: all as it should be"
