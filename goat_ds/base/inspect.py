"""Return what a base model is, by its config and the names of its files: asked once, carried from there.

Nothing here reads a weight, and nothing runs code that comes with a model unless the caller says so.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.peft_utils import find_adapter_config_file

from goat_ds.base.authors_code import authors_code, config_as_stored
from goat_ds.errors import ConfigError, LeftoverError, first_line


@dataclass(frozen=True)
class Base:
    """A base model as its config describes it."""

    name: str
    """Folder or hub name."""
    config: Any
    """As transformers reads it. It is shared: whoever changes one makes a copy first."""
    revision: str = "main"
    """Of the model on the hub."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    @property
    def architecture(self) -> str:
        """Name of the architecture, as transformers has it."""
        return str(self.config.model_type)

    @property
    def stored_quantization(self) -> dict[str, Any] | None:
        """How the weights are quantised in the files; None: not at all."""
        values = getattr(self.config, "quantization_config", None)
        return values if values is None or isinstance(values, dict) else values.to_dict()

    @property
    def foreign_quantization(self) -> str | None:
        """What the weights are quantised with, if that is not bitsandbytes in 4 bits."""
        values = self.stored_quantization
        if values is None:
            return None
        method = str(values.get("quant_method", "an unknown method"))
        if method != "bitsandbytes":
            return method
        return None if values.get("load_in_4bit") else "bitsandbytes in 8 bits"

    @property
    def is_4bit(self) -> bool:
        """Whether the files hold bitsandbytes' 4 bits."""
        return self.stored_quantization is not None and self.foreign_quantization is None

    @property
    def is_exact_export(self) -> bool:
        """Whether it is a routed model that goat_ds has exported, and so no base."""
        return hasattr(self.config, "goat")

    @property
    def num_positions(self) -> int | None:
        """Tokens the model has positions for, where its config says so."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def skeleton(self, *, unquantized: bool = False, **how: Any) -> PreTrainedModel:
        """Build the model without weights, on the meta device.

        Args:
            unquantized: Leave out what the config says of a stored quantisation.
            how: Further arguments of transformers' ``from_config``, such as ``dtype``.

        Raises:
            ConfigError: transformers has no causal language model for it.
        """
        # What an engine of this process told transformers must not shard what has no memory.
        unset_hf_deepspeed_config()
        config = copy.deepcopy(self.config)
        if unquantized and hasattr(config, "quantization_config"):
            del config.quantization_config
        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **how)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model ({self.name}) cannot be loaded: {first_line(error)}") from error
        return model

    def misfits(self, *, max_length: int, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
        """Yield what of the base cannot hold what it will be given, one line each.

        Args:
            max_length: Tokens of a row.
            tokenizer: Whose tokens the embedding must have rows for; None: it is not known.
        """
        if method := self.foreign_quantization:
            yield (
                f"model ({self.name}) is quantised ({method}), which experts cannot start from; use the unquantised "
                "base, or one that bitsandbytes has quantised to 4 bits"
            )
        if self.num_positions is not None and max_length > self.num_positions:
            yield (
                f"max_length ({max_length}) is above the model's max_position_embeddings ({self.num_positions}); "
                "lower it"
            )
        num_rows = getattr(self.config.get_text_config(), "vocab_size", None)
        if tokenizer is None or num_rows is None:
            return
        token, highest = max(_tokens_in_use(tokenizer), key=lambda item: item[1], default=("", -1))
        if highest >= num_rows:
            yield (
                f"model ({self.name}): its tokenizer's highest token id ({highest}, {token!r}) has no row in the "
                f"embedding (vocab_size {num_rows}); use the tokenizer the base came with, or resize the base's "
                "embedding"
            )


NO_OWN_CODE = "goat_ds runs no code that comes with a model; use a base whose architecture transformers has itself"


def inspect(
    model: str,
    *,
    named: str | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
    exact: bool = False,
    without_own_code: str = NO_OWN_CODE,
) -> Base:
    """Return what a base is; reads its config once.

    Args:
        model: Folder or hub name.
        named: What messages call it; the setting ``model`` and its value by default.
        revision: Of the model on the hub.
        trust_remote_code: Whether code that comes with it may run.
        exact: Whether an exact export will do too, of which only the config is wanted.
        without_own_code: What to do about a model that needs code of its author.

    Raises:
        LeftoverError: files of an adapter lie beside it.
        ConfigError: there is no config that transformers knows, or it needs code of its author.
    """
    named = named or f"model ({model})"
    try:
        stored = config_as_stored(model, revision=revision)
        code = None if trust_remote_code or (exact and "goat" in stored) else authors_code(stored)
        leftover = None if code else find_adapter_config_file(model, revision=revision)
        if not code and not leftover:
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named} cannot be loaded: {first_line(error)}") from error
    if code:
        raise ConfigError(f"{named} needs code of its author ({code}), and {without_own_code}")
    if leftover:
        raise LeftoverError(
            f"{named} is not only a base: {leftover} lies beside it, and transformers would load that adapter "
            "with it; move the adapter's files out of the folder, or merge the adapter into the base first"
        )
    return Base(model, config, revision, trust_remote_code)


def _tokens_in_use(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    """Yield the tokens that ordinary text, the template or the ends of a record can bring."""
    added = set(tokenizer.get_added_vocab())
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for token, row in tokenizer.get_vocab().items():
        # Text-only Gemma 3 ships with the token of an image, one past its last row; nothing but its own name brings it.
        if token not in added or token in ends or token in template:
            yield token, row
