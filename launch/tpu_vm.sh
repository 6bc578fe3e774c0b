#!/usr/bin/env bash
# TPU VMs without Kubernetes: requests spot slices, runs on all their workers, requests new ones after a preemption.
#
#     ZONE=us-east5-b TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/tpu_vm.sh [--dry-run] CONFIG …
#
# The other settings are in common.sh; PROJECT defaults to gcloud's; SPOT=0 requests on-demand capacity; RUNTIME is the
# VM image (default: the one for the generation). Keep this script running (tmux): it does the restarts. The queued
# resource is deleted when the run is done or has failed for good, unless KEEP=1.
# Flags: cloud.google.com/sdk/gcloud/reference/compute/tpus (queued-resources create, tpu-vm ssh).
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require ZONE TOPOLOGY IMAGE
read_topology
shared_storage
case $GENERATION in
v5e) TYPE=v5litepod-$CHIPS RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
v5p) TYPE=v5p-$((2 * CHIPS)) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;; # counted in TensorCores
v6e) TYPE=v6e-$CHIPS RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
esac
WHERE=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
if [ "$SLICES" = 1 ]; then
    NODES=("$NAME") SHAPE_FLAGS=(--node-id "$NAME")
else
    mapfile -t NODES < <(seq -f "$NAME-%g" 0 $((SLICES - 1)))
    SHAPE_FLAGS=(--node-count "$SLICES" --node-prefix "$NAME")
fi
[ "${SPOT:-1}" = 1 ] && SHAPE_FLAGS+=(--spot)

state() {
    gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format 'value(state.state)' 2>/dev/null || echo NONE
}

create() {
    run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "${SHAPE_FLAGS[@]}" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME"
}

delete() {
    run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

# The container gets SIGTERM when the machine shuts down; its exit code is stored for `exit_code`.
remote=$(printf '%s ' sudo docker run --rm --name mythos --privileged --net host --stop-timeout "$GRACE" \
    -v /var/lib/mythos:/data -e MYTHOS_DATA_CACHE=/data -e "JAX_COMPILATION_CACHE_DIR=$CACHE" "${IMAGE@Q}" \
    train "${CONFIG@Q}" --workdir "${RUN@Q}" "${OVERRIDES[@]@Q}")
remote="sudo docker rm -f mythos >/dev/null 2>&1; $remote; echo \$? > /tmp/mythos.code"

on_all_workers() {
    local node pids=()
    for node in "${NODES[@]}"; do
        run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker all --command "$1" &
        pids+=($!)
    done
    wait "${pids[@]}"
}

exit_code() {
    gcloud compute tpus tpu-vm ssh "${NODES[0]}" "${WHERE[@]}" --worker 0 --command 'cat /tmp/mythos.code' 2>/dev/null || echo lost
}

preflight
if [ "$DRY_RUN" = 1 ]; then
    create
    on_all_workers "$remote"
    delete
    echo "# again after exit code 42 or a lost slice, at most $RESTARTS times"
    exit 0
fi

code=lost
for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
    while now=$(state) && [ "$now" != ACTIVE ]; do
        case $now in
        NONE) create ;;
        FAILED | SUSPENDED) delete ;; # preempted or never granted: request it again
        esac
        sleep 60
    done
    on_all_workers 'rm -f /tmp/mythos.code' || true
    on_all_workers "$remote" || true
    code=$(exit_code)
    echo "tpu_vm.sh: attempt $attempt ended with $code" >&2
    case $code in
    0 | 1 | 2 | 130) break ;;
    esac
done
[ "${KEEP:-0}" = 1 ] || delete
[ "$code" = lost ] && code=42
exit "$code"
