# shellcheck shell=bash disable=SC2034
# Sourced by the launchers: shared settings, the preflight, dry runs.
#
# TOPOLOGY   the TPU slice, named as for `mythos compile`, for example v6e:4x4
# HOST_CHIPS chips per host (default 1 for 1x1, 8 for 2x4, else 4). GKE has node pools of both kinds for 2x4: 8 for
#            ct5lp-hightpu-8t and ct6e-standard-8t, 4 for ct5lp-hightpu-4t and ct6e-standard-4t
# SLICES     number of slices, connected by the data centre network (default 1)
# BUCKET     gs://… : where runs and compiled programs are stored
# NAME       name of the job and of its run directory (default: that of the config)
# IMAGE      the image built from launch/Dockerfile.tpu or Dockerfile.gpu and pushed
# RESTARTS   maximum restarts after exit code 42 or a killed process (default 20); on TPU VMs, SkyPilot and JobSet, a
#            preemption is not counted
# GRACE      seconds between SIGTERM and SIGKILL, for the last save (default 180)
# MYTHOS     the command that runs the preflight (default: mythos)
# PREFLIGHT  0: skip it

set -euo pipefail

SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-20} GRACE=${GRACE:-180} MYTHOS=${MYTHOS:-mythos} PREFLIGHT=${PREFLIGHT:-1}
ALLOWED=${ALLOWED:-[--dry-run | --status | --logs] CONFIG [--section.field value …]}
DRY_RUN=0 ACTION=launch

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

for name in SLICES RESTARTS GRACE; do
    [[ ${!name} =~ ^[0-9]{1,9}$ ]] || fail "$name: got '${!name}', allowed: an integer"
done

# Reads [--dry-run | --status | --logs] CONFIG [--section.field value …] into DRY_RUN, ACTION, CONFIG, OVERRIDES, NAME.
# --status and --logs are about the job that the same command launches without them.
read_arguments() {
    while :; do
        case ${1:-} in
        --dry-run) DRY_RUN=1 ;;
        --status | --logs) ACTION=${1#--} ;;
        *) break ;;
        esac
        shift
    done
    case ${1:-} in
    "" | -*) fail "got '${1:-}', allowed: $ALLOWED; settings are described at the top of the script" ;;
    *) CONFIG=$1 ;;
    esac
    shift
    OVERRIDES=("$@")
    NAME=${NAME:-$(basename "${CONFIG%.*}" | tr '_.' '--')}
}

require() {
    for name in "$@"; do
        [ -n "${!name:-}" ] || fail "$name is not set; see the top of the script"
    done
}

shared_storage() {
    case ${BUCKET:-} in
    gs://*) ;;
    *) fail "BUCKET: got '${BUCKET:-}', allowed: gs://…, which all hosts can reach" ;;
    esac
    BUCKET=${BUCKET%/}
    export RUN=$BUCKET/runs/$NAME CACHE=$BUCKET/compiled
}

# Runs a command, or with --dry-run prints it.
run() {
    if [ "$DRY_RUN" = 1 ]; then
        printf '%s\n' "${*@Q}"
    else
        needs "$1"
        "$@"
    fi
}

# Under Slurm: --status and --logs, which end the script.
slurm_job() {
    case $ACTION in
    status) run squeue --me --name "$NAME" ;;
    logs)
        local logs
        logs=$(find . -maxdepth 1 -name "$NAME-*.log" -printf '%T@ %p\n' | sort -n | tail -n 1)
        [ -n "$logs" ] || fail "got no $NAME-*.log in $PWD, allowed: the folder that the job was launched from"
        run tail -n 100 -F "${logs#* }"
        ;;
    *) return 0 ;;
    esac
    exit 0
}

# Stops if a command is not installed.
needs() {
    command -v "$1" >/dev/null || fail "$1: not found; allowed: a machine on which it is installed"
}

# Stops the launch if the train step does not fit (exit code 1) or the input is wrong (2).
preflight() {
    [ "$PREFLIGHT" = 1 ] || return 0
    run "$MYTHOS" compile "$CONFIG" --topology "$TOPOLOGY" --slices "$SLICES" "${OVERRIDES[@]}"
}

# GENERATION, SHAPE, CHIPS, HOST_CHIPS and HOSTS of one slice, and what GKE calls its chips, ACCELERATOR.
read_topology() {
    GENERATION=${TOPOLOGY%%:*} SHAPE=${TOPOLOGY#*:}
    [[ $TOPOLOGY =~ ^((v5e|v6e):[0-9]+x[0-9]+|v5p:[0-9]+x[0-9]+x[0-9]+)$ ]] ||
        fail "TOPOLOGY: got '$TOPOLOGY', allowed: v5e:AxB, v6e:AxB or v5p:AxBxC"
    CHIPS=$((${SHAPE//x/*}))
    case $SHAPE in
    1x1) HOST_CHIPS=${HOST_CHIPS:-1} ;;
    2x4) HOST_CHIPS=${HOST_CHIPS:-8} ;;
    *) HOST_CHIPS=${HOST_CHIPS:-4} ;;
    esac
    case $SHAPE:$HOST_CHIPS in
    1x1:1 | 2x4:8 | 2x4:4) ;;
    1x1:* | *:1 | *:8) fail "HOST_CHIPS: got '$HOST_CHIPS', allowed for $TOPOLOGY: what the top of common.sh lists" ;;
    *:4) ;;
    *) fail "HOST_CHIPS: got '$HOST_CHIPS', allowed: 1, 4 or 8" ;;
    esac
    [ $((CHIPS % HOST_CHIPS)) = 0 ] ||
        fail "TOPOLOGY: got '$TOPOLOGY', allowed: a slice of whole hosts of $HOST_CHIPS chips"
    HOSTS=$((CHIPS / HOST_CHIPS))
    case $GENERATION in
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
    esac
}

# Whether SPOT asks for spot capacity; its default is the argument.
wants_spot() {
    case ${SPOT:-$1} in
    0) return 1 ;;
    1) return 0 ;;
    *) fail "SPOT: got '$SPOT', allowed: 0 or 1" ;;
    esac
}

# YAML for the pods: PRIORITY_FIELD, and with SPOT=1 what selects spot nodes, SPOT_NODES, and tolerates the taint that
# some of their pools have, TOLERATIONS.
pod_fields() {
    PRIORITY_FIELD=${PRIORITY:+priorityClassName: \"$PRIORITY\"} SPOT_NODES='' TOLERATIONS='[]'
    if wants_spot 0; then
        SPOT_NODES='cloud.google.com/gke-spot: "true"'
        TOLERATIONS='[{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]'
    fi
}

# The file without its comments at the start of a line, with ${NAME} replaced by the variable for each name.
rendered() {
    local text name
    text=$(grep -v '^#' "$1")
    shift
    for name in "$@"; do
        text=${text//"\${$name}"/"${!name}"}
    done
    printf '%s\n' "$text"
}

# A JSON list of words.
json_list() {
    local out='' word
    for word in "$@"; do
        word=${word//\\/\\\\}
        out+=", \"${word//\"/\\\"}\""
    done
    printf '[%s]' "${out#, }"
}
