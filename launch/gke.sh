#!/usr/bin/env bash
# GKE: jobset.yaml through Kueue. Needs JobSet 0.10 or newer on the cluster.
#
#     TOPOLOGY=v6e:4x4 BUCKET=gs://b IMAGE=… launch/gke.sh [--dry-run] mythos_1b --data.path gs://b/data/web
#
# QUEUE     Kueue's LocalQueue (default multislice-queue)
# SPOT      1: on spot nodes (default 0)
# PRIORITY  the name of a PriorityClass
# ACCOUNT   a Kubernetes service account. It is what may read and write BUCKET through Workload Identity, which pods in
#           the host's network cannot use; without it, they have the access of the node pool (service account and scopes)
# HOST_NETWORK  1: pods are in the host's network, which is faster between slices (default: 1, but 0 with ACCOUNT)
#
# The other settings are in common.sh. --dry-run prints the JobSet without applying it, --status and --logs show those
# of the job. The config is read inside the image, at the same path.
# shellcheck source=launch/common.sh disable=SC2034
source "$(dirname "$0")/common.sh"

read_arguments "$@"
# The first process of the first slice, which is the one that logs.
LABEL=jobset.sigs.k8s.io/jobset-name=$NAME
case $ACTION in
status)
    run kubectl get jobset "$NAME"
    run kubectl get pods -l "$LABEL" -o wide
    exit 0
    ;;
logs)
    FIRST=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
    run kubectl logs -f --tail 100 -l "$LABEL,$FIRST" -c mythos
    exit 0
    ;;
esac
require TOPOLOGY IMAGE
read_topology
shared_storage
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME: got '$NAME', allowed: at most 40 lower case letters, digits and hyphens"
QUEUE=${QUEUE:-multislice-queue}
ARGS=$(json_list train "$CONFIG" --workdir "$RUN" "${OVERRIDES[@]}")
pod_fields
ACCOUNT_FIELD=${ACCOUNT:+serviceAccountName: \"$ACCOUNT\"}
HOST_NETWORK=${HOST_NETWORK:-$([ -n "${ACCOUNT:-}" ] && echo 0 || echo 1)}
case $HOST_NETWORK in
0) HOST_NETWORK=false DNS=ClusterFirst ;;
1) HOST_NETWORK=true DNS=ClusterFirstWithHostNet ;;
*) fail "HOST_NETWORK: got '$HOST_NETWORK', allowed: 0 or 1" ;;
esac

jobset() {
    rendered "$(dirname "$0")/jobset.yaml" NAME QUEUE RESTARTS SLICES HOSTS GRACE ACCELERATOR SHAPE IMAGE ARGS CACHE \
        HOST_CHIPS PRIORITY_FIELD ACCOUNT_FIELD SPOT_NODES TOLERATIONS HOST_NETWORK DNS
}

if [ "$DRY_RUN" = 1 ]; then
    preflight | sed 's/^/# /'
    jobset
else
    needs kubectl
    preflight
    jobset | kubectl apply -f -
fi
