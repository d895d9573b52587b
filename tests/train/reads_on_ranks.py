"""Train once and tell which files were opened how often: ``python reads_on_ranks.py FOLDER FLAGS …``; prints JSON.

Counted are opens for reading of files in FOLDER, before the first step and after it.
"""

import json
import os
import sys
from collections import Counter

from goat_ds.distributed import ranks
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.loop import train
from goat_ds.train.preflight import check
from goat_ds.train.resume import look
from goat_ds.train.signals import Signals


def main() -> None:
    folder, config = sys.argv[1], parse(sys.argv[2:])
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    counting = before

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if isinstance(path, str) and path.startswith(folder):
                counting[os.path.relpath(path, folder)] += 1

    sys.addaudithook(audit)
    join_ranks(config, timeout_minutes=5)
    config.folder.mkdir(parents=True, exist_ok=True)
    resumption = look(config)
    inputs = check(resumption)

    def step_done(_: int) -> None:
        nonlocal counting
        counting = after

    train(resumption, inputs, Signals(), step_done=step_done)
    print(json.dumps({"before": before, "after": after}))
    ranks.leave()


if __name__ == "__main__":
    main()
