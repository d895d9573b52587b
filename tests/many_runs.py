"""Runs in one process group, one after the other, as ``launch/train.py`` would run them.

    python many_runs.py RUNS.json        a list of command lines; started once per rank

Importing torch and DeepSpeed takes longer than a tiny run, so tests share one start of the ranks.
"""

import json
import sys
from pathlib import Path

import torch

from goat_ds.errors import raise_if_any
from goat_ds.train.config import parse, ranks_from_environment
from goat_ds.train.loop import train
from goat_ds.train.resume import look
from goat_ds.train.signals import Signals
from goat_ds.zero import ranks


def main() -> None:
    torch.set_num_threads(1)
    command_lines = json.loads(Path(sys.argv[1]).read_text())
    configs = [parse(command_line) for command_line in command_lines]
    processes = ranks_from_environment(configs[0])
    ranks.join(processes, timeout_minutes=5)
    for config in configs:
        config.folder.mkdir(parents=True, exist_ok=True)
        resumption = look(config, processes)
        raise_if_any(resumption.problems)
        train(resumption, processes, Signals())
    ranks.leave()


if __name__ == "__main__":
    main()
