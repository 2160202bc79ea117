#!/usr/bin/env bash
# A GKE node pool for the engine: one GPU per node, from none to MAX nodes.
#
#   CLUSTER=my-cluster LOCATION=europe-west4 kuberay/gpu-node-pool.sh          # prints the command
#   CLUSTER=my-cluster LOCATION=europe-west4 kuberay/gpu-node-pool.sh --run    # runs it
#
# Also from the environment: PROJECT, POOL, ACCELERATOR, MACHINE_TYPE, MAX, ZONES (comma-separated),
# SERVICE_ACCOUNT (the nodes'), and SPOT=1 for spot nodes, which go with `summarizer.gpu.spot: true` in
# the chart's values. gcp/bootstrap calls it, too.
set -euo pipefail

: "${CLUSTER:?CLUSTER: name of the GKE cluster}" "${LOCATION:?LOCATION: its region or zone}"
POOL=${POOL:-t5-l4}
ACCELERATOR=${ACCELERATOR:-nvidia-l4}
MACHINE_TYPE=${MACHINE_TYPE:-g2-standard-4}
MAX=${MAX:-8}

command=(
    gcloud container node-pools create "$POOL"
    --cluster "$CLUSTER" --location "$LOCATION"
    --machine-type "$MACHINE_TYPE"
    --accelerator "type=$ACCELERATOR,count=1,gpu-driver-version=latest"
    --enable-autoscaling --num-nodes 0 --total-min-nodes 0 --total-max-nodes "$MAX"
    --location-policy ANY                 # where there are GPUs, not evenly
    --enable-image-streaming              # pods start before the whole image is there
    --disk-type pd-ssd --disk-size 100
    --workload-metadata GKE_METADATA
    --max-surge-upgrade 1 --max-unavailable-upgrade 0
)
# GKE itself taints GPU nodes with nvidia.com/gpu:NoSchedule. Spot nodes get a taint of ours, so that
# nothing lands there that does not say it can be taken away.
if [ "${SPOT:-0}" = 1 ]; then
    command+=(--spot --node-taints "cloud.google.com/gke-spot=true:NoSchedule")
fi
if [ -n "${ZONES:-}" ]; then
    command+=(--node-locations "$ZONES")
fi
if [ -n "${SERVICE_ACCOUNT:-}" ]; then
    command+=(--service-account "$SERVICE_ACCOUNT")
fi
if [ -n "${PROJECT:-}" ]; then
    command+=(--project "$PROJECT")
fi

if [ "${1:-}" = --run ]; then
    exec "${command[@]}"
fi
printf '%q ' "${command[@]}"
echo
