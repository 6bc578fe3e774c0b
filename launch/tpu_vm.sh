#!/usr/bin/env bash
# TPU VMs without Kubernetes: requests spot slices, runs on all their workers, requests new ones after a preemption.
#
#     ZONE=us-east5-b TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/tpu_vm.sh [--dry-run] CONFIG …
#
# The other settings are in common.sh; PROJECT defaults to gcloud's; SPOT=0 requests on-demand capacity; RUNTIME is the
# VM image (default: the one for the generation). Keep this script running (tmux): it does the restarts. The run itself
# does not need it: containers go on without a connection, and the script, started again, joins a run that is there.
# --status and --logs show those of the job. The queued resource is deleted when the run is done or has failed for good,
# unless KEEP=1. POLL: seconds between two looks at what is not there (default 60).
# Flags: cloud.google.com/sdk/gcloud/reference/compute/tpus (queued-resources create, tpu-vm ssh).
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

read_arguments "$@"
require ZONE TOPOLOGY
[ "$ACTION" != launch ] || require IMAGE
read_topology
POLL=${POLL:-60}
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
wants_spot 1 && SHAPE_FLAGS+=(--spot)

# Runs a command on worker 0 of the first slice, which is process 0 of the run and logs.
on_first_worker() {
    run gcloud compute tpus tpu-vm ssh "${NODES[0]}" "${WHERE[@]}" --worker 0 --command "$1"
}

case $ACTION in
status)
    run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format 'value(state.state)'
    on_first_worker "sudo docker ps --all --filter name=mythos"
    exit 0
    ;;
logs)
    on_first_worker "sudo docker logs --follow --tail 100 mythos 2>&1"
    exit 0
    ;;
esac
shared_storage

# That of the queued resource; NONE if there is none, UNKNOWN if Google cannot be asked now.
state() {
    local answer
    answer=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format 'value(state.state)' 2>&1) ||
        case $answer in
        *NOT_FOUND*) answer=NONE ;;
        *) answer=UNKNOWN ;;
        esac
    echo "${answer##*$'\n'}"
}

create() {
    run gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" "${SHAPE_FLAGS[@]}" \
        --accelerator-type "$TYPE" --runtime-version "$RUNTIME"
}

delete() {
    run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

# Runs a command on all workers at once; fails if one of them fails.
on_all_workers() {
    local node pid pids=() failed=0
    for node in "${NODES[@]}"; do
        run gcloud compute tpus tpu-vm ssh "$node" "${WHERE[@]}" --worker all --command "$1" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=1
    done
    return "$failed"
}

# The container belongs to Docker, not to the ssh session that starts it; one that runs already is left alone. It gets
# SIGTERM when the machine shuts down.
cache=JAX_COMPILATION_CACHE_DIR=$CACHE
start=$(printf '%s ' sudo docker run --detach --name mythos --privileged --net host --stop-timeout "$GRACE" \
    -v /var/lib/mythos:/data -e MYTHOS_DATA_CACHE=/data -e "${cache@Q}" "${IMAGE@Q}" \
    train "${CONFIG@Q}" --workdir "${RUN@Q}" "${OVERRIDES[@]@Q}")
running="sudo docker inspect --format {{.State.Running}} mythos 2>/dev/null | grep --quiet true"
start="if $running; then echo 'a run is there, which this script joins'
else sudo docker rm mythos >/dev/null 2>&1; $start; fi"
# Shows the log until the container has ended, then prints its exit code; "gone" if there is no such container.
follow='sudo docker logs --follow --tail 20 mythos >&2; sudo docker wait mythos 2>/dev/null || echo gone'
# Process 0 has ended. The others may still save, or wait for it.
clear="sudo timeout $((GRACE + 60)) docker wait mythos >/dev/null 2>&1
sudo docker rm --force mythos >/dev/null 2>&1 || true"

say() {
    echo "tpu_vm.sh: $*" >&2
}

# Until the slices are there.
acquire() {
    local now before=''
    while now=$(state) && [ "$now" != ACTIVE ]; do
        [ "$now" = "$before" ] || say "queued resource $NAME: $now"
        before=$now
        case $now in
        NONE) create ;;
        FAILED | SUSPENDED) delete ;; # preempted or never granted: request it again
        esac
        sleep "$POLL"
    done
}

# Prints how the run ended: the exit code of process 0, "gone" if its container is not there, "preempted" if its slice
# is not. A connection that is lost is made again; the run does not notice.
follow_to_the_end() {
    local answer
    while true; do
        answer=$(on_first_worker "$follow" | tail -n 1) || true
        case $answer in
        gone | [0-9] | [0-9][0-9] | [0-9][0-9][0-9])
            echo "$answer"
            return
            ;;
        esac
        case $(state) in
        ACTIVE | UNKNOWN)
            say "no connection to ${NODES[0]}, where the run goes on; trying again"
            sleep "$POLL"
            ;;
        *)
            echo preempted
            return
            ;;
        esac
    done
}

preflight
if [ "$DRY_RUN" = 1 ]; then
    create
    on_all_workers "$start"
    on_first_worker "$follow"
    delete
    echo "# again after exit code 42 or a kill, at most $RESTARTS times, and after each preemption"
    exit 0
fi
needs gcloud

restarts=0
say "the run goes on without this script. To stop it: gcloud compute tpus queued-resources delete $NAME ${WHERE[*]} --force"
while true; do
    acquire
    if on_all_workers "$start"; then
        code=$(follow_to_the_end)
    else
        code=gone # not on all workers
    fi
    say "the run ended with $code after $restarts restarts"
    case $code in
    0 | 1 | 2 | 130) break ;;
    esac
    [ "$(state)" = ACTIVE ] || continue # taken away, which is not counted
    [ "$restarts" -lt "$RESTARTS" ] || break
    restarts=$((restarts + 1))
    on_all_workers "$clear" || true
done
[ "${KEEP:-0}" = 1 ] || delete
[ "$code" = gone ] && code=42
exit "$code"
