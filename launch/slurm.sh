#!/usr/bin/env bash
# Slurm: submits slurm.sbatch.
#
#     NODES=4 TASKS=1 GPUS=8 SHARED=/scratch/me launch/slurm.sh [--dry-run] CONFIG …
#
# NODES     default 1. TASKS: processes per node (default 1, which uses all its GPUs). GPUS: per node (default 8; 0: none).
# SHARED    a folder that all nodes can reach (default: the current one); the run goes to SHARED/runs/NAME, compiled
#           programs to SHARED/compiled. Or BUCKET=gs://… for both.
# SBATCH_*  are sbatch's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT …
# The preflight is `mythos info` (is the config valid?), or `mythos compile` if TOPOLOGY names a TPU slice to compare
# with. --status and --logs show those of the job; its log is in the folder that it was launched from. RESTARTS, GRACE, NAME, MYTHOS and PREFLIGHT as in common.sh.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
slurm_job
NODES=${NODES:-1} TASKS=${TASKS:-1} GPUS=${GPUS:-8}
if [ -n "${BUCKET:-}" ]; then
    shared_storage
else
    SHARED=${SHARED:-$PWD}
    export RUN=$SHARED/runs/$NAME CACHE=$SHARED/compiled
fi
export MYTHOS RESTARTS

if [ -n "${TOPOLOGY:-}" ]; then
    preflight
elif [ "$PREFLIGHT" = 1 ]; then
    run "$MYTHOS" info "$CONFIG" "${OVERRIDES[@]}"
fi
gpus=()
[ "$GPUS" = 0 ] || gpus=(--gpus-per-node "$GPUS")
run sbatch --job-name "$NAME" --nodes "$NODES" --ntasks-per-node "$TASKS" "${gpus[@]}" --signal "TERM@$GRACE" \
    "$(dirname "$0")/slurm.sbatch" "$CONFIG" "${OVERRIDES[@]}"
