# shellcheck shell=bash disable=SC2034
# Sourced by the launchers: shared settings, the preflight, dry runs.
#
# TOPOLOGY   the TPU slice, named as for `mythos compile`, for example v6e:4x4
# SLICES     number of slices, connected by the data centre network (default 1)
# BUCKET     gs://… : where runs and compiled programs are stored
# NAME       name of the job and of its run directory (default: that of the config)
# IMAGE      the image built from launch/Dockerfile.tpu or Dockerfile.gpu and pushed
# RESTARTS   maximum restarts after exit code 42 or a killed process (default 20)
# GRACE      seconds between SIGTERM and SIGKILL, for the last save (default 180)
# MYTHOS     the command that runs the preflight (default: mythos)
# PREFLIGHT  0: skip it

set -euo pipefail

SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-20} GRACE=${GRACE:-180} MYTHOS=${MYTHOS:-mythos} PREFLIGHT=${PREFLIGHT:-1}
ALLOWED=${ALLOWED:-[--dry-run] CONFIG [--section.field value …]}
DRY_RUN=0

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# Reads [--dry-run] CONFIG [--section.field value …] into DRY_RUN, CONFIG, OVERRIDES and NAME.
read_arguments() {
    if [ "${1:-}" = --dry-run ]; then
        DRY_RUN=1
        shift
    fi
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
        "$@"
    fi
}

# Stops the launch if the train step does not fit (exit code 1) or the input is wrong (2).
preflight() {
    [ "$PREFLIGHT" = 1 ] || return 0
    run "$MYTHOS" compile "$CONFIG" --topology "$TOPOLOGY" --slices "$SLICES" "${OVERRIDES[@]}"
}

# GENERATION, SHAPE, CHIPS and HOSTS of one slice, four chips per host, and what GKE calls it, ACCELERATOR.
read_topology() {
    GENERATION=${TOPOLOGY%%:*} SHAPE=${TOPOLOGY#*:}
    [[ $TOPOLOGY =~ ^(v5e|v5p|v6e):[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY: got '$TOPOLOGY', allowed: v5e:AxB, v6e:AxB or v5p:AxBxC"
    CHIPS=$((${SHAPE//x/*}))
    HOSTS=$(((CHIPS + 3) / 4))
    case $GENERATION in
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
    esac
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
