"""A trial is one run of a comparison: what it is called, its flags, and what makes it the same run as another."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from goat_ds.compare.compare_file import CompareSettings, Point
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.resume import settings_of
from goat_ds.zero import ds_config

FINAL = "final"
PLACES = frozenset(
    {
        "config", "output_dir", "resume", "allow_changed", "dry_run", "local_rank", "timeout_minutes",
        "svd_cache", "token_cache", "log_steps", "router_log_steps",
        "save_steps", "save_total_limit", "on_save_error", "calibration_sample_tokens",
    }
)  # fmt: skip
"""Settings that do not change a run's losses."""
BY_CONTENT = ("model", "data", "eval_data", "ds_config", "peft_config")
"""Settings that name something: what it contains counts, not its name."""
WHOLE_BYTES = 2**20
"""Files of a folder up to so many bytes count by content, larger ones (weights) by name and size."""


class Trial(NamedTuple):
    """A run that a comparison asks for."""

    method: str
    point: Point
    stage: str
    """``rung 0``, ``rung 1`` … or ``final``."""
    steps: int
    seed: int


def flags_of(
    settings: CompareSettings, method: str, grid: Sequence[tuple[str, Any]], *, r: int | None
) -> dict[str, Any]:
    """Return the flags that the runs of a method share for some values of its grid.

    Args:
        settings: Of the comparison.
        method: Its name.
        grid: Flags and values.
        r: That makes its trained parameters as many as the reference's; None: its own.
    """
    # Whole checkpoints with a sample of the data would fill a disk with runs that nobody exports.
    few = {"calibration_sample_tokens": 0, "save_total_limit": 1}
    return few | settings.train | settings.method(method).flags | dict(grid) | ({} if r is None else {"r": r})


def trial_flags(settings: CompareSettings, trial: Trial, *, r: int | None, folder: Path) -> dict[str, Any]:
    """Return all flags of a trial that trains in a folder."""
    judged = settings.final.eval_data if trial.stage == FINAL else None
    own = {
        "learning_rate": trial.point.rate,
        "max_steps": trial.steps,
        "seed": trial.seed,
        "output_dir": str(folder),
        "resume": "auto",
    }
    flags = flags_of(settings, trial.method, trial.point.grid, r=r)
    return flags | ({} if judged is None else {"eval_data": judged}) | own


def config_of(flags: dict[str, Any]) -> TrainConfig:
    """Return the settings that flags make, the embedded demo's among them.

    Raises:
        ConfigError: they do not.
    """
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parse(words)


def key_of(config: TrainConfig) -> str:
    """Return what is the same for two runs only if they train and judge the same."""
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    settings = counted(settings_of(config))
    # A setting that a later version adds, at its default, does not make old runs other runs; ``results`` checks that
    # the defaults themselves are still what they were.
    chosen = {name: value for name, value in settings.items() if value != defaults.get(name)}
    text = json.dumps([chosen, contents_of(config)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def counted(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of a run's settings that change its losses, without what is known by content."""
    return {name: value for name, value in settings.items() if name not in PLACES and name not in BY_CONTENT}


def contents_of(config: TrainConfig) -> dict[str, Any]:
    """Return the content of everything that a run's settings name, as hashes."""
    raw = ds_config.read(config.ds_config)[0] if config.ds_config else None
    return {
        "model": identity(config.base_name),
        "data": [identity(source) for source in config.train_sources],
        "eval_data": [identity(source) for source in config.eval_sources],
        "ds_config": raw,
        "peft_config": config.peft_config and identity(config.peft_config),
    }


def identity(name: str) -> str:
    """Return a file's or a folder's content as a hash; of a hub name, the name."""
    path = Path(name)
    if path.is_file():
        return _of_file(path, _stamp(path))
    if not path.is_dir():
        return name
    files = sorted(each for each in path.rglob("*") if each.is_file())
    lines = []
    for each in files:
        size = each.stat().st_size
        content = _of_file(each, _stamp(each)) if size <= WHOLE_BYTES else str(size)
        lines.append(f"{each.relative_to(path).as_posix()} {content}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@cache
def _of_file(path: Path, stamp: tuple[int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def id_of(trial: Trial, key: str) -> str:
    """Return the name of a trial's folder, which a person can read."""
    grid = "".join(f"-{name}{value}" for name, value in trial.point.grid)
    readable = "".join(c if c.isalnum() or c in "._+-" else "_" for c in f"{trial.method}-lr{trial.point.rate:g}{grid}")
    return f"{readable[:80]}-{trial.steps}steps-seed{trial.seed}-{key}"
