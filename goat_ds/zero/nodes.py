"""The nodes of a run: how many ranks each has, and whether all of them see the same folder."""

import os
import tempfile
from pathlib import Path

from goat_ds.zero.ranks import Ranks, max_over_ranks, together, union_over_ranks


def ranks_per_node(processes: Ranks) -> list[int]:
    """Count the ranks of every node, in the order of the ranks. A collective."""
    places = union_over_ranks({processes.world_rank: processes.local_rank})
    firsts = [rank for rank in range(processes.world_size) if places[rank] == 0]
    return [until - first for first, until in zip(firsts, [*firsts[1:], processes.world_size], strict=True)]


def is_shared(folder: Path, processes: Ranks) -> bool:
    """Whether the ``folder`` that the first rank has is the one that every node has under this name. A collective.

    The first rank leaves an empty file in it for a moment, and the first rank of every node looks for that. Its name
    is random, so that no network file system can have remembered that it is not there.

    Raises:
        TrainingError: the first rank cannot write into the folder, or some rank cannot look into it.
    """
    probe = together(lambda: _leave_probe(folder) if processes.is_first else None)
    try:
        name = union_over_ranks({} if probe is None else {"name": probe.name})["name"]
        misses = together(lambda: processes.is_first_on_node and not (folder / name).exists())
        return not max_over_ranks(misses)
    finally:
        together(lambda: probe.unlink() if probe else None)


def _leave_probe(folder: Path) -> Path:
    descriptor, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
    os.close(descriptor)
    return Path(path)
