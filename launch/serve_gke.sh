#!/usr/bin/env bash
# GKE: a server that stays up (serve.yaml), reachable inside the cluster.
#
#     kubectl create secret generic mythos-serve --from-file api-key=FILE
#     TOPOLOGY=v6e:2x2 IMAGE=… launch/serve_gke.sh [--dry-run] gs://b/runs/NAME --places 64
#     GPU=nvidia-l4 IMAGE=… launch/serve_gke.sh [--dry-run] HuggingFaceTB/SmolLM2-135M-Instruct
#
# What follows are MODEL and the flags of `mythos serve`; the model is read inside the pod. --dry-run prints the
# Deployment and the Service without applying them.
#
# TOPOLOGY  a TPU slice of one host: v5e:1x1, v5e:2x2, v5e:2x4, the same of v6e, or v5p:2x2x1
# GPU       in place of it, the name that GKE has for a GPU: nvidia-l4, nvidia-h100-80gb; GPUS: how many (default 1)
# IMAGE     the image built from launch/Dockerfile.tpu or Dockerfile.gpu and pushed
# NAME      of the Deployment and the Service (default mythos-serve). REPLICAS: pods (default 1)
# SECRET    the Secret whose key `api-key` is what clients must send (default: NAME); `hf-token` in it is used for hub ids
# BUCKET    gs://… for compiled programs, so that the next pod starts sooner (default: none are kept)
# ACCOUNT   the Kubernetes service account that may read MODEL and write to BUCKET (default: default)
# GRACE     seconds in which requests under way are finished when a pod is to end (default 180)
# SURGE     1 (default): a new pod is ready before an old one ends, which needs one more node. 0: no more nodes
# SPOT      1: on spot nodes (default 0). PRIORITY: the name of a PriorityClass
# CPU, MEMORY  that each pod asks for (default 4 and 16Gi)
# shellcheck source=launch/common.sh disable=SC2034
NAME=${NAME:-mythos-serve} ALLOWED='[--dry-run | --status | --logs] MODEL [flags of mythos serve]'
source "$(dirname "$0")/common.sh"

read_arguments "$@"
case $ACTION in
status)
    run kubectl get deployments,pods -l "app=$NAME" -o wide
    exit 0
    ;;
logs)
    run kubectl logs -f --tail 100 -l "app=$NAME" --all-containers --prefix
    exit 0
    ;;
esac
require IMAGE
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || fail "NAME: got '$NAME', allowed: lower case letters, digits and hyphens"
REPLICAS=${REPLICAS:-1} SECRET=${SECRET:-$NAME} ACCOUNT=${ACCOUNT:-default} GPUS=${GPUS:-1} CPU=${CPU:-4} MEMORY=${MEMORY:-16Gi}
CACHE=/scratch/compiled
if [ -n "${BUCKET:-}" ]; then
    shared_storage
fi
ARGS=$(json_list serve "$CONFIG" --host 0.0.0.0 --port 8000 --api-key-file /secrets/api-key --drain-seconds "$GRACE" "${OVERRIDES[@]}")
case ${SURGE:-1} in
1) UPDATE='{maxSurge: 1, maxUnavailable: 0}' ;;
0) UPDATE='{maxSurge: 0, maxUnavailable: 1}' ;;
*) fail "SURGE: got '$SURGE', allowed: 0 or 1" ;;
esac

env_list() {
    local out='' pair
    for pair in "$@"; do
        out+=", {name: ${pair%%=*}, value: \"${pair#*=}\"}"
    done
    printf '[%s]' "${out#, }"
}
variables=(HOME=/scratch "JAX_COMPILATION_CACHE_DIR=$CACHE" HF_TOKEN_PATH=/secrets/hf-token MYTHOS_DATA_CACHE=/scratch/data)

if [ -n "${GPU:-}" ]; then
    [ -z "${TOPOLOGY:-}" ] || fail "TOPOLOGY and GPU: got both, allowed: one of them"
    NODES="cloud.google.com/gke-accelerator: $GPU"
    LIMITS="{nvidia.com/gpu: $GPUS, memory: $MEMORY}"
    POD_SECURITY='{runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, seccompProfile: {type: RuntimeDefault}}'
    SECURITY='{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}'
    # Where GKE mounts the driver's libraries.
    variables+=(LD_LIBRARY_PATH=/usr/local/nvidia/lib64)
else
    require TOPOLOGY
    read_topology
    [ "$HOSTS" = 1 ] || fail "TOPOLOGY: got '$TOPOLOGY', allowed: a slice of one host, v5e or v6e with 1x1, 2x2 or 2x4, or v5p:2x2x1"
    NODES="cloud.google.com/gke-tpu-accelerator: $ACCELERATOR, cloud.google.com/gke-tpu-topology: $SHAPE"
    LIMITS="{google.com/tpu: $CHIPS, memory: $MEMORY}"
    # The device files of TPUs belong to root, so the process does too; it is not privileged.
    POD_SECURITY='{seccompProfile: {type: RuntimeDefault}}'
    SECURITY='{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true}'
fi
pod_fields
NODES="{$NODES${SPOT_NODES:+, $SPOT_NODES}}"
ENV=$(env_list "${variables[@]}")
# The pod's time to end includes the ten seconds in which load balancers learn of it.
GRACE=$((GRACE + 20))

manifest() {
    rendered "$(dirname "$0")/serve.yaml" NAME REPLICAS UPDATE ACCOUNT GRACE POD_SECURITY NODES IMAGE ARGS ENV CPU MEMORY \
        LIMITS SECURITY SECRET PRIORITY_FIELD TOLERATIONS
}

if [ "$DRY_RUN" = 1 ]; then
    manifest
else
    needs kubectl
    manifest | kubectl apply -f -
fi
