"""Runs in one process group, one after the other, as ``launch/train.py`` would run them.

    python many_runs.py RUNS.json        a list of command lines; started once per rank

Importing torch and DeepSpeed takes longer than a tiny run, so tests share one start of the ranks.
"""

import json
import sys
from pathlib import Path

import torch

from goat_ds.distributed import ranks
from goat_ds.errors import raise_if_any
from goat_ds.train.cli import parse
from goat_ds.train.environment import join_ranks
from goat_ds.train.inputs import read_inputs
from goat_ds.train.loop import train
from goat_ds.train.resume import look
from goat_ds.train.signals import Signals


def main() -> None:
    torch.set_num_threads(1)
    command_lines = json.loads(Path(sys.argv[1]).read_text())
    configs = [parse(command_line) for command_line in command_lines]
    join_ranks(configs[0], timeout_minutes=5)
    for config in configs:
        config.folder.mkdir(parents=True, exist_ok=True)
        resumption = look(config)
        raise_if_any(resumption.problems)
        train(resumption, read_inputs(resumption.config), Signals())
    ranks.leave()


if __name__ == "__main__":
    main()
