#!/usr/bin/env bash
# Trains on several nodes of any cluster: run the same line on every node.
#
#   launch/torchrun.sh --nnodes 2 --host node0 run.dir=/shared/runs/first experiment=tiny_cpu
#
#   --nnodes N          number of nodes                                            or NNODES
#   --host ADDRESS      of the node where the ranks meet; all nodes reach it       or MASTER_ADDR
#   --port PORT         there; 29400 unless set                                    or MASTER_PORT
#   --node-rank R       0 on the node where the ranks meet, others elsewhere;      or NODE_RANK
#                       needed only where it cannot tell by its own addresses
#   --local-addr ADDR   by which the others reach this node; needed only where     or LOCAL_ADDR
#                       it is not the one that packets to --host leave from
#
# What follows are overrides as for `moedist train`; run.dir must be one that all nodes share. Over ssh:
#
#   for node in node0 node1; do ssh "$node" "cd $PWD && launch/torchrun.sh --nnodes 2 --host node0 run.dir=..." & done; wait
#
# or: pdsh -w node0,node1 "cd $PWD && launch/torchrun.sh --nnodes 2 --host node0 run.dir=..."
# The ranks run below torchrun, and `moedist train` watches it. Exit codes are those of `moedist train`.
set -euo pipefail

refuse() {
    printf 'torchrun.sh: %s\n' "$1" >&2
    exit 2
}

nnodes="${NNODES:-}" host="${MASTER_ADDR:-}" port="${MASTER_PORT:-29400}"
node_rank="${NODE_RANK:-}" local_addr="${LOCAL_ADDR:-}"
while [[ ${1:-} == --* ]]; do
    [[ $# -ge 2 || $1 == --help ]] || refuse "$1 needs a value."
    case $1 in
    --nnodes) nnodes="$2" ;;
    --host) host="$2" ;;
    --port) port="$2" ;;
    --node-rank) node_rank="$2" ;;
    --local-addr) local_addr="$2" ;;
    --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) refuse "unknown option $1. See launch/torchrun.sh --help." ;;
    esac
    shift 2
done

[[ $nnodes =~ ^[1-9][0-9]*$ ]] || refuse "the number of nodes is ${nnodes:-not set}. Set --nnodes, or NNODES."
[[ -n $host ]] ||
    refuse "no host where the ranks meet. Set --host, or MASTER_ADDR, to the first node's address that all nodes reach."
[[ $port =~ ^[1-9][0-9]*$ ]] || refuse "the port is $port. Set --port, or MASTER_PORT, to a free port of $host."
[[ -z $node_rank || $node_rank =~ ^[0-9]+$ ]] || refuse "the node's rank is $node_rank. Set --node-rank, or NODE_RANK."
command -v moedist >/dev/null || refuse "no moedist on PATH. Activate the environment that has it, the same on every node."
[[ " $* " == *" run.dir="* ]] || refuse "no run folder. Set run.dir=... to one that all nodes share."
[[ $host != *:* ]] || host="[$host]" # IPv6

set -- "launch.nnodes=$nnodes" "launch.rendezvous='$host:$port'" "$@"
[[ -z $local_addr ]] || set -- "$@" "launch.local_addr='$local_addr'"
if [[ -n $node_rank ]]; then
    [[ $node_rank != 0 ]] && holds=false || holds=true
    set -- "$@" "launch.holds_rendezvous=$holds"
fi
exec moedist train "$@"
