"""Train as ``launch/train.py`` would, and note how ZeRO-3 fetched parameters in every step; started once per rank.

python trace_on_ranks.py RUNS.json OUTPUT        RUNS.json: name -> command line; writes what the first rank saw as JSON
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

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
    runs, told = json.loads(Path(sys.argv[1]).read_text()), {}
    configs = {name: parse(line) for name, line in runs.items()}
    join_ranks(next(iter(configs.values())), timeout_minutes=5)
    for name, config in configs.items():
        config.folder.mkdir(parents=True, exist_ok=True)
        resumption = look(config)
        raise_if_any(resumption.problems)
        watch = Watch()
        with watch.on():
            train(resumption, read_inputs(resumption.config), Signals(), step_done=watch.step_done)
        told[name] = watch.steps
    if ranks.is_first():
        Path(sys.argv[2]).write_text(json.dumps(told))
    ranks.leave()


class Watch:
    """What was fetched in each step, evaluations and a dense finish after it included."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self._now = self._none()

    def _none(self) -> dict[str, int]:
        return {"modules": 0, "modules that waited": 0, "fetched": 0, "traces given up": 0}

    def step_done(self, step: int) -> None:
        """Begin a new step."""
        assert step == len(self.steps) + 1
        self.steps.append(self._now)
        self._now = self._none()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Listen to every coordinator."""
        kind: Any = PartitionedParameterCoordinator
        fetch, give_up = kind.fetch_sub_module, kind._invalidate_trace

        def entered(coordinator: Any, module: torch.nn.Module, *, forward: bool) -> None:
            parameters: list[Any] = list(module.parameters(recurse=False))
            missing = [p for p in parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
            self._now["modules"] += bool(parameters)
            self._now["modules that waited"] += bool(missing)
            fetch(coordinator, module, forward=forward)

        def gave_up(coordinator: Any) -> None:
            self._now["traces given up"] += 1
            give_up(coordinator)

        gather = kind._PartitionedParameterCoordinator__all_gather_params_

        def gathered(coordinator: Any, parameters: Any, *args: Any, **kwargs: Any) -> None:
            parameters = list(parameters)
            self._now["fetched"] += sum(p.ds_numel for p in parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE)
            gather(coordinator, parameters, *args, **kwargs)

        with (
            patch.object(kind, "fetch_sub_module", entered),
            patch.object(kind, "_invalidate_trace", gave_up),
            patch.object(kind, "_PartitionedParameterCoordinator__all_gather_params_", gathered),
        ):
            yield


if __name__ == "__main__":
    main()
