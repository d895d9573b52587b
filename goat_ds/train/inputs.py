"""What the settings of a run point at, read once and carried: no file of the user's is read again hours later.

--ds_config ──► the first rank reads it ──► every rank has the same value ──► filled in, checked, kept in the folder
--model ──────► base.inspect ──► what the base is
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from goat_ds.base.inspect import Base, inspect
from goat_ds.data import load_tokenizer
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, first_line
from goat_ds.train.config import TrainConfig
from goat_ds.zero import ds_config
from goat_ds.zero.adapters import config_from
from goat_ds.zero.ds_config import EngineSettings

DS_CONFIG_NAME = "ds_config.json"
"""In the folder of a run: its DeepSpeed config with every "auto" filled in."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The settings of a run with what they point at."""

    config: TrainConfig
    world_size: int
    """Ranks of the run."""
    found_ds_config: dict[str, Any] | None
    """As the file has it; None where none is named, or it cannot be read."""
    adapter: PeftConfig | None
    """What is put on the base; None: every weight is trained, unless ``wrong_adapter``."""
    wrong_adapter: bool
    """Whether the settings of the adapter have problems, which are reported elsewhere."""
    found_base: Base | None
    """None where no model is named, or its config cannot be read."""
    unreadable: tuple[str, ...]
    """What could not be read, one line each."""

    @property
    def raw_ds_config(self) -> dict[str, Any]:
        """The DeepSpeed config as the file has it; ``unreadable`` must be empty."""
        assert self.found_ds_config is not None
        return self.found_ds_config

    @property
    def base(self) -> Base:
        """What is trained on; ``unreadable`` must be empty."""
        assert self.found_base is not None
        return self.found_base

    @property
    def is_4bit(self) -> bool:
        """Whether the base is, or will be, in 4 bits."""
        return self.config.load_in_4bit or (self.found_base is not None and self.found_base.is_4bit)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer.

        Raises:
            ConfigError: there is none, or it does not load.
        """
        return load_tokenizer(self.config.base_name)

    @property
    def engine_settings(self) -> EngineSettings:
        """What the flags say about the engine."""
        config = self.config
        return EngineSettings(
            world_size=self.world_size,
            micro_batch_size=config.micro_batch_size,
            grad_accum_steps=config.grad_accum_steps,
            precision=config.precision,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_betas=config.adam_betas,
            adam_eps=config.adam_eps,
            max_grad_norm=config.max_grad_norm,
            # DeepSpeed's fused Adam is for CUDA; with offload it takes its own CPU Adam.
            torch_adam=not ranks.has_cuda() and not ds_config.offloads_optimizer(self.raw_ds_config),
        )

    @cached_property
    def engine_config(self) -> dict[str, Any]:
        """The DeepSpeed config with every "auto" filled in; ``preflight`` must have found no problem."""
        return ds_config.fill(self.raw_ds_config, self.engine_settings)

    def keep_ds_config(self) -> None:
        """Write the filled DeepSpeed config into the folder of the run, on the first rank, unless it is there."""
        path, text = self.config.folder / DS_CONFIG_NAME, f"{json.dumps(self.engine_config, indent=4)}\n"
        if ranks.is_first() and not (path.is_file() and path.read_text(encoding="utf-8") == text):
            path.write_text(text, encoding="utf-8")


def read_inputs(config: TrainConfig, *, world_size: int | None = None) -> Inputs:
    """Return what the settings of a run point at, and what of it cannot be read. A collective.

    Args:
        config: Of the run, with the accumulation that it will have.
        world_size: Ranks of the run, where it is not the present one.
    """
    raw: dict[str, Any] | None = None
    unreadable: list[str] = []
    if config.ds_config is not None:
        path = config.ds_config
        # The file of one node counts, so that all ranks train by the same.
        raw, unreadable = ranks.agree_from_first(lambda: ds_config.read(path))
        raw = None if unreadable else raw
    adapter, problems = ranks.agree_from_first(lambda: _adapter(config))
    base, unreadable_base = ranks.first_on_node_then_others(lambda: _inspected(config))
    return Inputs(
        config=config,
        world_size=ranks.get_world_size() if world_size is None else world_size,
        found_ds_config=raw,
        adapter=adapter,
        wrong_adapter=problems is not None,
        found_base=base,
        unreadable=(*unreadable, *(problems or ()), *unreadable_base),
    )


def _adapter(config: TrainConfig) -> tuple[PeftConfig | None, list[str] | None]:
    """Return what is put on the base; or None and what is wrong with the file that says so."""
    path = config.peft_config
    try:
        if path is None:
            return config.adapter(), None
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            return None, [f"peft_config ({path}) holds no JSON object"]
        return config_from(values), None
    except ConfigError as error:
        # Of the flags, and so reported with their numbers already.
        return None, [] if path is None else list(error.problems)
    except (OSError, ValueError) as error:
        return None, [f"peft_config ({path}) cannot be read: {first_line(error)}"]


def _inspected(config: TrainConfig) -> tuple[Base | None, list[str]]:
    """Return what the base is, or why its config cannot be read; neither where no base is named."""
    if not (config.model or config.is_demo):
        return None, []
    try:
        return inspect(config.base_name), []
    except ConfigError as error:
        return None, list(error.problems)


def with_4bit(config: TrainConfig) -> TrainConfig:
    """Return the settings of the same run on a 4-bit base."""
    return dataclasses.replace(config, load_in_4bit=True)
