#!/usr/bin/env bash
# GKE: jobset.yaml through Kueue.
#
#     TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/gke.sh [--dry-run] mythos_1b --data.path gs://b/data/web
#
# QUEUE: Kueue's LocalQueue (default multislice-queue). The other settings are in common.sh. --dry-run prints the
# JobSet without applying it. The config is read inside the image, at the same path.
# shellcheck source=launch/common.sh disable=SC2034
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require TOPOLOGY IMAGE
read_topology
shared_storage
QUEUE=${QUEUE:-multislice-queue}
ARGS=$(json_list train "$CONFIG" --workdir "$RUN" "${OVERRIDES[@]}")

jobset() {
    rendered "$(dirname "$0")/jobset.yaml" NAME QUEUE RESTARTS SLICES HOSTS GRACE ACCELERATOR SHAPE IMAGE ARGS CACHE
}

if [ "$DRY_RUN" = 1 ]; then
    preflight | sed 's/^/# /'
    jobset
else
    preflight
    jobset | kubectl apply -f -
fi
