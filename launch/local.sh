#!/usr/bin/env bash
# A run on this machine: PROCESSES (2) processes with DEVICES (4) CPU devices each, connected over gloo.
#
#     launch/local.sh [--dry-run] quickstart --training.steps 50
#
# --status shows the last line of the run's log, --logs goes on to show it. SHARED: where runs/NAME and compiled programs
# go (default: the current folder). With TOPOLOGY set, `mythos compile` runs first. RESTARTS, GRACE and NAME as in
# common.sh; PYTHON: the interpreter that has mythos_jax.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
SHARED=${SHARED:-$PWD}
METRICS=$SHARED/runs/$NAME/metrics.jsonl
case $ACTION in
status)
    run tail -n 1 "$METRICS"
    exit 0
    ;;
logs)
    run tail -n 20 -F "$METRICS"
    exit 0
    ;;
esac
dry=()
[ "$DRY_RUN" = 0 ] || dry=(--dry-run)
# Huge pages for what XLA's CPU programs allocate anew in each step (docs/speed.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$SHARED/compiled}

[ -z "${TOPOLOGY:-}" ] || preflight
exec "${PYTHON:-python3}" "$(dirname "$0")/local_processes.py" --processes "${PROCESSES:-2}" --devices "${DEVICES:-4}" \
    --restarts "$RESTARTS" --grace "$GRACE" "${dry[@]}" \
    train "$CONFIG" --workdir "$SHARED/runs/$NAME" "${OVERRIDES[@]}"
