"""Comparisons of a few lines, and runs that are only looked up."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from goat_ds.compare.compare_file import CompareSettings, read_settings
from goat_ds.compare.preparation import Size, Sizes
from goat_ds.compare.search import Outcome
from goat_ds.compare.trials import Trial
from tests.launching import FEW_HELDOUT

TINY: dict[str, Any] = {
    "train": {
        "ds_config": "ds_configs/zero1.json",
        "max_length": 64,
        "r": 8,
        "precision": "fp32",
        "eval_data": [str(FEW_HELDOUT)],
    },
    "methods": {
        "lora": {"method": "lora", "lora_alpha": 64},
        "goat": {"num_experts": 4},
    },
    "learning_rates": [0.001, 0.002],
    "screen": {"steps": 2, "seeds": [0], "halvings": 0},
    "final": {"steps": 4, "seeds": [1, 2, 3]},
    "extend_edges": False,
}
"""A comparison on the embedded demo, whose runs take a moment."""


def write(folder: Path, **changes: Any) -> Path:
    """Write the tiny comparison with some keys changed, None: without them; return its path."""
    content = copy.deepcopy(TINY) | {"output_dir": str(folder / "out")} | changes
    path = folder / "compare.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def read(folder: Path, **changes: Any) -> CompareSettings:
    return read_settings(write(folder, **changes))


def sizes_of(settings: CompareSettings, num_trained: int = 100) -> Sizes:
    return {(method.name, grid): Size(None, num_trained) for method in settings.methods for grid in method.grids}


def outcome(trial: Trial, loss: float, **more: Any) -> Outcome:
    """Return how a run with a held-out loss would have ended."""
    row = {
        "id": f"{trial.method}-{trial.point.rate:g}-{trial.steps}-{trial.seed}",
        "status": "finished",
        "device": "none",
        "versions": {"goat_ds": "0"},
        "settings": {"model": None, "data": None},
        "curve": [[trial.steps // 2 or 1, loss + 1], [trial.steps, loss]],
        "train_curve": [[1, loss + 2], [trial.steps, loss]],
        "error": None,
    }
    return Outcome(loss, row | more)


class Recorder:
    """Runs trials by a formula, and remembers what it was asked for."""

    def __init__(self, loss: Callable[[Trial], float]) -> None:
        self._loss = loss
        self.asked: list[list[Trial]] = []

    def __call__(self, trials: Sequence[Trial]) -> Mapping[Trial, Outcome]:
        """Run trials."""
        self.asked.append(list(trials))
        return {trial: outcome(trial, self._loss(trial)) for trial in trials}
