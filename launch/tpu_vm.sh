#!/usr/bin/env bash
# TPU VMs without Kubernetes: asks for spot slices, runs on all their workers, asks again when they are taken away.
#
#     ZONE=us-east5-b TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/tpu_vm.sh [--dry-run] CONFIG.yaml …
#
# The other settings stand in common.sh; PROJECT is gcloud's own unless set; SPOT=0 asks for on-demand capacity;
# RUNTIME is the VM's image (default: the generation's). It must go on running here (tmux): it is the one that starts
# again. The queued resource is deleted when the run is done or has failed for good; KEEP=1 leaves it.
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

# The container is stopped with SIGTERM when the machine shuts down; its exit code is left for us to read.
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
        FAILED | SUSPENDED) delete ;; # taken away, or never to be had; ask again
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
