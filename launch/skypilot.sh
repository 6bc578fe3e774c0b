#!/usr/bin/env bash
# SkyPilot: a managed job that moves to other nodes when its own are preempted.
#
#     BUCKET=gs://b launch/skypilot.sh [--dry-run] CONFIG …
#
# NODES and GPUS (H100:8) override those in skypilot.yaml. The preflight is `mythos info` (is the config valid?), or
# `mythos compile` if TOPOLOGY names a TPU slice to compare with. The other settings are in common.sh. The grace period
# is the cloud's preemption notice, which SkyPilot cannot change, so choose training.checkpoint_every accordingly.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
case $ACTION in
status)
    run sky jobs queue --all
    exit 0
    ;;
logs)
    run sky jobs logs --name "$NAME"
    exit 0
    ;;
esac
shared_storage
[ -f constraints.txt ] && [ -d mythos_jax ] ||
    fail "got the folder $PWD, allowed: a checkout of mythos_jax, which is copied to the nodes"
spot=--no-use-spot
wants_spot 1 && spot=--use-spot
for word in "${OVERRIDES[@]}"; do
    [[ $word != *[][:space:]\"\'\$*?[]* ]] || fail "got '$word', allowed here: overrides without spaces, quotes, * ? [ ]"
done

if [ -n "${TOPOLOGY:-}" ]; then
    preflight
elif [ "$PREFLIGHT" = 1 ]; then
    run "$MYTHOS" info "$CONFIG" "${OVERRIDES[@]}"
fi
run sky jobs launch --yes --detach-run --name "$NAME" "$spot" ${NODES:+--num-nodes "$NODES"} ${GPUS:+--gpus "$GPUS"} \
    --env "CONFIG=$CONFIG" --env "OVERRIDES=${OVERRIDES[*]}" --env "RUN=$RUN" --env "JAX_COMPILATION_CACHE_DIR=$CACHE" \
    --env "RESTARTS=$RESTARTS" \
    "$(dirname "$0")/skypilot.yaml"
