"""Ask four ranks, which say that they are two nodes, about folders: ``python nodes_on_ranks.py ROOT``; prints JSON."""

import json
import os
import sys
from pathlib import Path

from goat_ds.distributed import nodes, ranks
from goat_ds.errors import TrainingError
from goat_ds.train.config import TrainConfig
from goat_ds.train.environment import join_ranks

NODES = [[0, 1, 2], [3]]


def main() -> None:
    root = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    node, place = next((n, ids.index(rank)) for n, ids in enumerate(NODES) if rank in ids)
    os.environ["LOCAL_RANK"] = str(place)
    join_ranks(TrainConfig(), timeout_minutes=2)
    told = {
        "sizes": nodes.ranks_per_node(),
        "same": nodes.is_shared(root / "same"),
        "own": nodes.is_shared(root / f"disk-{node}"),
        "absent": nodes.is_shared(root / ("same" if node == 0 else "nowhere")),
    }
    try:
        nodes.is_shared(root / "nowhere")
    except TrainingError as error:
        told["error"] = str(error)
    print(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main()
