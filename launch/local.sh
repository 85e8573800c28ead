#!/usr/bin/env bash
# Train on this machine.
#   launch/local.sh CONFIG [key=value ...]
# NUM_PROCS: processes to start (default: one per GPU, or 1). SIGTERM and Ctrl-C end the run after the step it is in.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: [NUM_PROCS=N] $0 CONFIG [key=value ...]" >&2
    exit 2
fi
NUM_PROCS=${NUM_PROCS:-$(python -c 'import sys; from toolkit.cluster.environment import gpu_count; sys.stdout.write(str(max(1, gpu_count())))')}

# exec, so that a scheduler's signal reaches the toolkit and not this shell
exec toolkit train "$@" --num-procs "$NUM_PROCS"
