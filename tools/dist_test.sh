#!/usr/bin/env bash
# Evaluate on several GPUs, or on several CPU processes where there is no GPU:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]
set -eu
USAGE="usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]"
CONFIG=${1:?$USAGE}
CHECKPOINT=${2:?$USAGE}
GPUS=${3:?$USAGE}
PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}" \
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$GPUS" \
    "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
