#!/usr/bin/env bash
# Slurm: a server on one node, for as long as its job runs; submits serve.sbatch.
#
#     KEY_FILE=~/mythos.key GPUS=1 launch/serve_slurm.sh [--dry-run] runs/NAME --places 64
#
# What follows are MODEL and the flags of `mythos serve`. Everyone on the cluster can reach a node's ports, so clients
# must send a key.
# KEY_FILE  a file that holds it, readable by you alone
# GPUS      default 1; 0: none. PORT: default 8000. CACHE: a folder for compiled programs (default ./compiled)
# NAME      of the job (default mythos-serve). GRACE: seconds to finish requests in, before the time limit (default 180)
# SBATCH_*  are sbatch's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT …
# shellcheck source=launch/common.sh disable=SC2034
NAME=${NAME:-mythos-serve} ALLOWED='[--dry-run | --status | --logs] MODEL [flags of mythos serve]'
source "$(dirname "$0")/common.sh"

read_arguments "$@"
slurm_job
require KEY_FILE
[ -s "$KEY_FILE" ] || fail "KEY_FILE: got '$KEY_FILE', allowed: a file that holds the key"
GPUS=${GPUS:-1}
export PORT=${PORT:-8000} CACHE=${CACHE:-$PWD/compiled} KEY_FILE MYTHOS GRACE
gpus=()
[ "$GPUS" = 0 ] || gpus=(--gpus "$GPUS")
# B: the batch script, which has become mythos. Its last answers and its end have 20 seconds after GRACE.
run sbatch --job-name "$NAME" "${gpus[@]}" --signal "B:TERM@$((GRACE + 20))" "$(dirname "$0")/serve.sbatch" "$CONFIG" "${OVERRIDES[@]}"
