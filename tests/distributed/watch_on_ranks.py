"""Ranks that are watched while they meet, a step a moment, until one of them is told to misbehave.

    python watch_on_ranks.py TIMEOUT_MINUTES BEHAVIOUR FOLDER

Each rank leaves its process id in the folder once it is watched.
"""

import os
import sys
import time
from pathlib import Path

import torch

from goat_ds.distributed import ranks
from goat_ds.distributed.watch import Watch, watching
from goat_ds.train.cli import parse
from goat_ds.train.environment import first_rank_address, join_ranks


def main() -> None:
    timeout_minutes, behaviour, folder = float(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    join_ranks(parse([]), timeout_minutes=timeout_minutes)
    with watching(address=first_rank_address(), timeout_minutes=timeout_minutes) as watch:
        meet(watch, num_steps=3)
        (folder / f"{ranks.get_rank()}.part").write_text(str(os.getpid()))
        (folder / f"{ranks.get_rank()}.part").rename(folder / f"{ranks.get_rank()}.pid")
        if behaviour == "meet":
            meet(watch, num_steps=1_000_000)
        elif behaviour == "spin" and ranks.get_rank() == 1:
            spin()
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
        torch.distributed.all_reduce(torch.ones(1))
        watch.step_done(step + 1)
        time.sleep(0.01)


def spin(seconds: float = 1e9) -> None:
    until, turns = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        turns += 1
        if turns % 1000 == 0:
            time.sleep(0.001)


if __name__ == "__main__":
    main()
