"""A base that is nothing but a config.json, and planners for it."""

import json
from pathlib import Path
from typing import Any

from goat_ds.plan import Planner
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.inputs import read_inputs
from goat_ds.train.preflight import planner_of
from tests.launching import REPOSITORY
from tests.models import CAUSAL_LMS


def config_only(folder: Path, name: str = "llama", **changes: Any) -> str:
    """Write the config of a tiny architecture, and nothing else."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps({**CAUSAL_LMS[name].to_dict(), "dtype": "bfloat16", **changes}))
    return str(base)


def settings(
    folder: Path, *flags: str, base: str | None = None, ds_config: dict[str, Any] | None = None
) -> TrainConfig:
    """Return the settings of a run of a tiny base; the base's own positions are 64."""
    path = REPOSITORY / "ds_configs" / "zero3.json"
    if ds_config is not None:
        path = folder / "ds_config.json"
        path.write_text(json.dumps(ds_config))
    model = base or config_only(folder)
    return parse(["--model", model, "--ds_config", str(path), "--max_length", "32", "--r", "8", *flags])


def planner(folder: Path, *flags: str, world_size: int = 2, **others: Any) -> Planner:
    return planner_of(read_inputs(settings(folder, *flags, **others), world_size=world_size))
