#!/usr/bin/env bash
# One node of a torchrun run; start the same line on every node:
#
#   FIRST_NODE=node-1 NODES=2 launch/torchrun_node.sh --ds_config ds_configs/zero3.json --output_dir runs/first ...
#
# FIRST_NODE    name or address of the node where all meet; it must stay, the others may go and come
# NODES         how many take part: 2, or 1:2 to go on with one when the other is lost
# RANKS         ranks of this node; one a GPU by default
# RESTARTS      how often ranks that failed are started again (3)
# PORT          port on FIRST_NODE (29500)
# RUN           name of the run, the same on every node (goat); another one for another run at the same port
# SAVE_SECONDS  how long a save may take between SIGTERM and SIGKILL (300)
set -euo pipefail
cd "$(dirname "$0")/.."

# Ranks that are started again meet at a store of their own. At the one that torchrun keeps for all starts they may find
# the addresses of the ranks before them.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The "--" before the script: torchrun takes --r for an abbreviation of its own flags.
# Without --signals-to-handle, SIGUSR1 would end torchrun and leave its ranks behind.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${RANKS:-gpu}" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${FIRST_NODE:-localhost}:${PORT:-29500}" \
    --rdzv-id "${RUN:-goat}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout "${SAVE_SECONDS:-300}" \
    -- launch/train.py --resume auto "$@"
