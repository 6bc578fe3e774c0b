#!/usr/bin/env bash
# Cluster Toolkit, the successor of xpk: it writes and applies a JobSet much like jobset.yaml itself.
#
#     CLUSTER=c LOCATION=us-east5 TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/gcluster.sh [--dry-run] CONFIG …
#
# The other settings are in common.sh; PROJECT and PRIORITY (low, medium, high) are passed on if set. It restarts
# after every failure, so wrong input is retried RESTARTS times. Flags: docs.cloud.google.com/cluster-toolkit
# (reference, gcluster job submit) and its guide from xpk.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require CLUSTER LOCATION TOPOLOGY IMAGE
read_topology
shared_storage
[ ${#NAME} -le 28 ] || fail "NAME: got '$NAME', allowed: at most 28 characters"
case $GENERATION in
v5e) TYPE=v5litepod-$CHIPS ;;
v5p) TYPE=v5p-$((2 * CHIPS)) ;; # counted in TensorCores
v6e) TYPE=v6e-$CHIPS ;;
esac
command="exec mythos train ${CONFIG@Q} --workdir ${RUN@Q} ${OVERRIDES[*]@Q}"

preflight
run gcluster job submit --name "$NAME" --cluster "$CLUSTER" --location "$LOCATION" ${PROJECT:+--project "$PROJECT"} \
    ${PRIORITY:+--priority "$PRIORITY"} --image "$IMAGE" --compute-type "$TYPE" --num-slices "$SLICES" \
    --restarts "$RESTARTS" --grace-period "$GRACE" --env "JAX_COMPILATION_CACHE_DIR=$CACHE" --command "$command"
