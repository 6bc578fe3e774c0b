#!/usr/bin/env bash
# Cluster Toolkit 1.95 or newer, the successor of xpk: it writes and applies a JobSet much like jobset.yaml itself.
#
#     CLUSTER=c LOCATION=us-east5 TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/gcluster.sh [--dry-run] CONFIG …
#
# PROJECT, PRIORITY (low, medium, high, or a PriorityClass) and ACCOUNT (a Kubernetes service account) are passed on if
# set; SPOT=1 asks for spot nodes. The other settings are in common.sh. --status and --logs show those of the job. Flags:
# docs.cloud.google.com/cluster-toolkit (reference, gcluster job submit), and its source, cmd/job/submit.go.
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require CLUSTER LOCATION
WHERE=(--cluster "$CLUSTER" --location "$LOCATION" ${PROJECT:+--project "$PROJECT"})
case $ACTION in
status)
    run gcluster job list --name-contains "$NAME" "${WHERE[@]}"
    exit 0
    ;;
logs)
    run gcluster job logs "$NAME" --follow "${WHERE[@]}"
    exit 0
    ;;
esac
require TOPOLOGY IMAGE
read_topology
shared_storage
[ ${#NAME} -le 28 ] || fail "NAME: got '$NAME', allowed: at most 28 characters"
case $GENERATION in
v5e) TYPE=v5litepod-$CHIPS ;;
*) TYPE=$GENERATION-$CHIPS ;; # chips for v5p, too, where other commands of Google count TensorCores
esac
spot=()
wants_spot 0 && spot=(--node-constraint cloud.google.com/gke-spot=true)
# In the command, because --env is newer than 1.95.
command="exec env JAX_COMPILATION_CACHE_DIR=${CACHE@Q} mythos train ${CONFIG@Q} --workdir ${RUN@Q} ${OVERRIDES[*]@Q}"

preflight
# Any other exit code than these ends the job: 1, 2 and 130 would recur. Above 128: killed by a signal.
run gcluster job submit --name "$NAME" "${WHERE[@]}" ${PRIORITY:+--priority "$PRIORITY"} \
    ${ACCOUNT:+--service-account "$ACCOUNT"} "${spot[@]}" --image "$IMAGE" --compute-type "$TYPE" --topology "$SHAPE" \
    --num-slices "$SLICES" --restarts "$RESTARTS" --restart-on-exit-codes 42,134,135,136,137,139,143 \
    --grace-period "$GRACE" --command "$command"
