"""The nodes of a run: how many ranks each has, and whether all of them see the same folder."""

import os
import tempfile
from pathlib import Path

from goat_ds.distributed import ranks
from goat_ds.distributed.ranks import agree, max_over_ranks, union_over_ranks


def ranks_per_node() -> list[int]:
    """Count the ranks of every node, in the order of the ranks. A collective."""
    places = union_over_ranks({ranks.get_rank(): ranks.get_local_rank()})
    firsts = [rank for rank in range(ranks.get_world_size()) if places[rank] == 0]
    return [until - first for first, until in zip(firsts, [*firsts[1:], ranks.get_world_size()], strict=True)]


def is_shared(folder: Path) -> bool:
    """Whether the ``folder`` that the first rank has is the one that every node has under this name. A collective.

    The first rank leaves an empty file in it for a moment, and the first rank of every node looks for that. Its name
    is random, so that no network file system can have remembered that it is not there.

    Raises:
        TrainingError: the first rank cannot write into the folder, or some rank cannot look into it.
    """
    probe = agree(lambda: _leave_probe(folder) if ranks.is_first() else None)
    try:
        name = union_over_ranks({} if probe is None else {"name": probe.name})["name"]
        misses = agree(lambda: ranks.is_first_on_node() and not (folder / name).exists())
        return not max_over_ranks(misses)
    finally:
        agree(lambda: probe.unlink() if probe else None)


def _leave_probe(folder: Path) -> Path:
    descriptor, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
    os.close(descriptor)
    return Path(path)
