"""GOAT mixtures of low-rank experts for LLaMA-scale models.

Importing this package makes GOAT a PEFT method: ``peft.get_peft_model(model, goat_ds.GoatConfig(...))``.
"""

import logging

# PEFT imports bitsandbytes, which then advises, once a process, to install a CPU kernel for generation.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# As a library it shows nothing by itself; its programs do.
logging.getLogger(__name__).addHandler(logging.NullHandler())

from peft.mapping import (  # noqa: E402
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from goat_ds.errors import ConfigError, ExportError, GoatError, MergeError, TrainingError  # noqa: E402
from goat_ds.tuner.config import GoatConfig, GoatPeftType  # noqa: E402
from goat_ds.tuner.model import PREFIX, BaseMismatchWarning, GoatModel, with_balance_loss  # noqa: E402

# PEFT's registering function wants a member of its own enum, so the mappings are filled here.
PEFT_TYPE_TO_CONFIG_MAPPING[GoatPeftType.GOAT] = GoatConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[GoatPeftType.GOAT] = GoatModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[GoatPeftType.GOAT] = PREFIX  # type: ignore[index]

__all__ = [
    "BaseMismatchWarning",
    "ConfigError",
    "ExportError",
    "GoatConfig",
    "GoatError",
    "GoatModel",
    "MergeError",
    "TrainingError",
    "with_balance_loss",
]
