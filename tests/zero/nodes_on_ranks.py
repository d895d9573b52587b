"""Ask four ranks, which say that they are two nodes, about folders: ``python nodes_on_ranks.py ROOT``; prints JSON."""

import json
import sys
from pathlib import Path

from goat_ds.errors import TrainingError
from goat_ds.train.config import TrainConfig, ranks_from_environment
from goat_ds.zero import nodes, ranks
from goat_ds.zero.ranks import Ranks

NODES = [[0, 1, 2], [3]]


def main() -> None:
    root = Path(sys.argv[1])
    started = ranks_from_environment(TrainConfig())
    ranks.join(started, timeout_minutes=2)
    node, place = next((n, ids.index(started.world_rank)) for n, ids in enumerate(NODES) if started.world_rank in ids)
    here = Ranks(world_rank=started.world_rank, world_size=4, local_rank=place)
    told = {
        "sizes": nodes.ranks_per_node(here),
        "same": nodes.is_shared(root / "same", here),
        "own": nodes.is_shared(root / f"disk-{node}", here),
        "absent": nodes.is_shared(root / ("same" if node == 0 else "nowhere"), here),
    }
    try:
        nodes.is_shared(root / "nowhere", here)
    except TrainingError as error:
        told["error"] = str(error)
    print(json.dumps(told))
    ranks.leave()


if __name__ == "__main__":
    main()
