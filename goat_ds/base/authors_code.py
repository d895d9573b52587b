"""Models that bring code of their author: ``auto_map`` in their config names it."""

from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig


def config_as_stored(model: str, *, revision: str = "main") -> dict[str, Any]:
    """Return a model's config.json without looking for the class it belongs to.

    Raises:
        OSError: there is none.
    """
    content, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    return content


def authors_code(config: dict[str, Any]) -> str | None:
    """Name the code without which a model would not be the one its author means; None: transformers has it.

    Args:
        config: As stored. Where transformers has taken over an architecture, ``auto_map`` is a left-over.
    """
    auto_map = config.get("auto_map") or {}
    named = auto_map.get("AutoModelForCausalLM") or auto_map.get("AutoConfig")
    known_type = config.get("model_type") in CONFIG_MAPPING
    known_class = all(hasattr(transformers, name) for name in config.get("architectures") or ())
    return None if named is None or (known_type and known_class) else f"auto_map: {named}"
