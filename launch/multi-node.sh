#!/usr/bin/env bash
# Train on several hosts: give this command on the first one; the others are reached by pdsh over ssh.
#   HOSTFILE=hosts launch/multi-node.sh CONFIG [key=value ...]
# HOSTFILE     one `HOST slots=RANKS` a line, ranks counted in that order (default: launch/hostfile beside this script)
# MASTER_ADDR  address of the first host as the others see it (default: the first that `hostname -I` shows there)
# MASTER_PORT  a free TCP port on it (default: 29500)
# Set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface between the hosts; docs/multi-node.md says when.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: [HOSTFILE=FILE] [MASTER_ADDR=ADDRESS] [MASTER_PORT=PORT] $0 CONFIG [key=value ...]" >&2
    exit 2
fi
HOSTFILE=${HOSTFILE:-$(dirname "$0")/hostfile}

# What the ranks on the other hosts need from this environment. A .deepspeed_env of your own is taken as it is.
variables=${XDG_CACHE_HOME:-$HOME/.cache}/toolkit/deepspeed_env
# An argument in which the other hosts' shells would read something travels as base64, and the rank unpacks it.
packed=$(python -m toolkit.cluster.launch --hostfile "$HOSTFILE" --env-file "$variables" --master-addr "${MASTER_ADDR:-}" -- "$@")
mapfile -t words <<<"$packed"
if [ -z "${DS_ENV_FILE:-}" ] && [ ! -e .deepspeed_env ] && [ ! -e "$HOME/.deepspeed_env" ]; then
    export DS_ENV_FILE=$variables
fi

# DeepSpeed's launcher would put these on command lines, which all users of a host can read.
for name in $(compgen -e | grep -E '^(MLFLOW|MV2|NCCL|PYTHON|UCX).*(TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL)' || true); do
    unset "$name"
done

master=(--master_port "${MASTER_PORT:-29500}")
if [ -n "${MASTER_ADDR:-}" ]; then
    master+=(--master_addr "$MASTER_ADDR")
fi

# exec, so that a scheduler's signal reaches the launcher, which passes it to the ranks of every host
exec deepspeed --hostfile "$HOSTFILE" "${master[@]}" --no_local_rank --module toolkit.train "${words[@]}"
