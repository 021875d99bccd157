#!/usr/bin/env bash
# Train on several GPUs, or on several CPU processes where there is no GPU:
#   tools/dist_train.sh CONFIG GPUS [arguments of train.py]
# With MAX_RESTARTS=3 and --resume, a worker's death costs the steps since the last checkpoint.
set -eu
CONFIG=${1:?usage: tools/dist_train.sh CONFIG GPUS [arguments of train.py]}
GPUS=${2:?usage: tools/dist_train.sh CONFIG GPUS [arguments of train.py]}
MASTER="${MASTER_ADDR:-127.0.0.1}:${PORT:-29500}"
RENDEZVOUS=(--node_rank="${NODE_RANK:-0}" --master_addr="${MASTER%:*}" --master_port="${MASTER##*:}")
if [ "${MAX_RESTARTS:-0}" != 0 ]; then
    # Workers that are started again meet anew: addresses of those before them lead nowhere.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    RENDEZVOUS=(--rdzv_backend=c10d --rdzv_endpoint="$MASTER" --max_restarts="$MAX_RESTARTS")
fi
PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}" \
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    "${RENDEZVOUS[@]}" \
    --nproc_per_node="$GPUS" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"
