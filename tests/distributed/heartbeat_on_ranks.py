"""Ranks that are watched while they meet, a step a moment, until one of them is told to misbehave.

    python heartbeat_on_ranks.py TIMEOUT_MINUTES BEHAVIOUR FOLDER

Each rank leaves a file in the folder once it is watched.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed

from goat_ds.distributed import ranks
from goat_ds.distributed.heartbeat import Watch, collectives_started, watching
from goat_ds.train.cli import parse
from goat_ds.train.environment import first_rank_address, join_ranks


def main() -> None:
    timeout_minutes, behaviour, folder = float(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    join_ranks(parse([]), timeout_minutes=timeout_minutes)
    if behaviour == "count":
        print(json.dumps(count()))
        ranks.leave()
        return
    with watching(address=first_rank_address(), timeout_minutes=timeout_minutes) as watch:
        meet(watch, num_steps=3)
        (folder / f"{ranks.get_rank()}.watched").touch()
        if behaviour == "meet":
            meet(watch, num_steps=1_000_000)
        elif behaviour == "spin":
            spin_before_others_wait()
        elif behaviour == "work alone":
            # Longer than the timeout: nobody waits, and then one rank for the other, but never for so long.
            spin(seconds=70 * timeout_minutes)
            spin(seconds=25 * timeout_minutes * ranks.get_rank())
        meet(watch, num_steps=3)
        if behaviour == "leave late":
            time.sleep(3 * ranks.get_rank())
    ranks.leave()
    print("left")


def meet(watch: Watch, *, num_steps: int) -> None:
    for step in range(num_steps):
        distributed.all_reduce(torch.ones(1))
        watch.step_done(step + 1)
        time.sleep(0.01)


def spin_before_others_wait() -> None:
    """Let the last of three ranks spin, the second wait for it in a group of both, and the first for both."""
    both = distributed.new_group([1, 2])
    if ranks.get_rank() == 2:
        spin()
    if ranks.get_rank() == 1:
        distributed.all_reduce(torch.ones(1), group=both)


def spin(seconds: float = 1e9) -> None:
    until, turns = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        turns += 1
        if turns % 1000 == 0:
            time.sleep(0.001)


def count() -> dict[str, dict[str, int]]:
    """Return by how much each kind of collective raises the count of its group."""
    twin = distributed.new_group([0, 1])
    alone = [distributed.new_group([rank]) for rank in range(2)][ranks.get_rank()]
    one, two, first = torch.ones(1), torch.ones(2), ranks.is_first()
    kinds: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: distributed.all_reduce(one),
        "async all_reduce": lambda: distributed.all_reduce(one, async_op=True).wait(),  # type: ignore[union-attr]
        "broadcast": lambda: distributed.broadcast(one, src=1),
        "reduce": lambda: distributed.reduce(one, dst=1),
        "gather": lambda: distributed.gather(one, [torch.ones(1), torch.ones(1)] if first else None, dst=0),
        "all_gather": lambda: distributed.all_gather([torch.ones(1), torch.ones(1)], one),
        "all_gather_into_tensor": lambda: distributed.all_gather_into_tensor(two, one),
        "reduce_scatter_tensor": lambda: distributed.reduce_scatter_tensor(one, two),
        "all_gather_object": lambda: distributed.all_gather_object([None, None], "mine"),
        "broadcast_object_list": lambda: distributed.broadcast_object_list(["mine"]),
        "barrier": lambda: distributed.barrier(),
        "of another group": lambda: distributed.all_reduce(one, group=twin),
        "of its own group": lambda: distributed.all_reduce(one, group=alone),
    }
    raised = {}
    for kind, enter in kinds.items():
        before = collectives_started()
        enter()
        raised[kind] = {name: num - before[name] for name, num in collectives_started().items() if num > before[name]}
    return raised


if __name__ == "__main__":
    main()
