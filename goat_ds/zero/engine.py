"""From a base model on disk to a DeepSpeed engine that trains GOAT experts on it."""

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import deepspeed
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.utils.import_utils import is_flash_attn_2_available

from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.tuner.config import GoatConfig
from goat_ds.zero import ds_config, partition, ranks
from goat_ds.zero.ds_config import Precision

ADAPTER_NAME = "default"
DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


class Attention(StrEnum):
    """Which attention code the model uses; ``auto`` is FlashAttention-2 where it is installed and a GPU is there."""

    AUTO = "auto"
    FLASH_ATTENTION_2 = "flash_attention_2"
    SDPA = "sdpa"
    EAGER = "eager"


class Checkpointing(StrEnum):
    """Whether activations are recomputed in backward, and by which of torch's two ways."""

    NONE = "none"
    REENTRANT = "reentrant"
    NON_REENTRANT = "non_reentrant"


def choose_attention(wanted: Attention, *, precision: Precision) -> Attention:
    """Settle ``auto``.

    Raises:
        ConfigError: FlashAttention-2 was asked for and is not there, or does not compute in ``precision``.
    """
    if wanted is Attention.FLASH_ATTENTION_2 and precision is Precision.FP32:
        raise ConfigError("attn (flash_attention_2) has no precision fp32; use precision bf16 or fp16, or attn sdpa")
    available = ranks.has_cuda() and is_flash_attn_2_available()
    if wanted is Attention.FLASH_ATTENTION_2 and not available:
        raise ConfigError(
            "attn (flash_attention_2) needs a CUDA device and the flash-attn package (pip install 'goat_ds[gpu]'); "
            "use attn auto or sdpa"
        )
    if wanted is Attention.AUTO:
        return Attention.FLASH_ATTENTION_2 if available and precision is not Precision.FP32 else Attention.SDPA
    return wanted


def check_base(model: str, *, max_length: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """See whether the base can hold what it will be given, by its config alone.

    Raises:
        ConfigError: the base is quantised, its positions end before ``max_length``, or its embedding has no row for a
            token; all of it, or that the config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model ({model}) cannot be loaded: {str(error).splitlines()[0]}") from error
    raise_if_any(_misfits_of_base(model, config, max_length=max_length, tokenizer=tokenizer))


def _misfits_of_base(
    model: str, config: Any, *, max_length: int, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    if quantisation := getattr(config, "quantization_config", None):
        method = quantisation.get("quant_method", "unknown method") if isinstance(quantisation, dict) else quantisation
        yield f"model ({model}) is quantised ({method}), which experts cannot start from; use the unquantised base"
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        yield f"max_length ({max_length}) is above the model's max_position_embeddings ({positions}); lower it"
    num_rows = getattr(text, "vocab_size", None)
    if tokenizer is None or num_rows is None:
        return
    token, highest = max(_tokens_in_use(tokenizer), key=lambda item: item[1], default=("", -1))
    if highest >= num_rows:
        yield (
            f"model ({model}): its tokenizer's highest token id ({highest}, {token!r}) has no row in the embedding "
            f"(vocab_size {num_rows}); use the tokenizer the base came with, or resize the base's embedding"
        )


def _tokens_in_use(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, int]]:
    """Walk over the tokens that ordinary text, the template or the ends of a record can bring."""
    added = set(tokenizer.get_added_vocab())
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for token, row in tokenizer.get_vocab().items():
        # Text-only Gemma 3 ships with the token of an image, one past its last row; nothing but its own name brings it.
        if token not in added or token in ends or token in template:
            yield token, row


def rehearse(model: str, goat: GoatConfig) -> None:
    """Put the adapter on a model without weights, to see whether it fits.

    Raises:
        ConfigError: the model's config cannot be read, no layer matches, or layers are too small.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model ({model}) cannot be loaded: {str(error).splitlines()[0]}") from error
    get_peft_model(skeleton, _deferred(goat), adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)


def load_base(model: str, *, precision: Precision, attention: Attention, engine_config: dict[str, Any]) -> Any:
    """Load the base, under ZeRO-3 in shards from the first byte on. A collective.

    Args:
        model: Folder or hub name.
        precision: Dtype of the weights.
        attention: Settled attention code.
        engine_config: The filled DeepSpeed config.
    """
    # What an earlier engine of this process told transformers must not shard this base.
    unset_hf_deepspeed_config()
    # transformers finds it through a weak reference, so it must live as long as the model.
    sharding = HfDeepSpeedConfig(engine_config) if ds_config.stage(engine_config) == 3 else None
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[precision], attn_implementation=str(attention))
    base.goat_sharding = sharding
    base.config.use_cache = False
    # from_pretrained gives a model in eval mode, in which transformers neither recomputes activations nor drops out.
    base.train()
    return base


def attach_experts(base: Any, goat: GoatConfig, *, engine_config: dict[str, Any]) -> PeftModel:
    """Put empty experts on the base, sharded at birth under ZeRO-3; ``zero.decompose.start_adapter`` fills them."""
    with partition.partitioned_at_birth(engine_config, stage=ds_config.stage(engine_config)):
        # Experts in fp32 on a bf16 base would be gathered into one buffer of the wrong dtype; masters are fp32 anyway.
        return get_peft_model(base, _deferred(goat), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def _deferred(goat: GoatConfig) -> GoatConfig:
    return GoatConfig(**{**goat.to_dict(), "deferred": True})


def enable_checkpointing(model: PeftModel, kind: Checkpointing) -> None:
    """Recompute activations in backward."""
    if kind is Checkpointing.NONE:
        return
    base: Any = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": kind is Checkpointing.REENTRANT})
    # The embedding is frozen: without this nothing inside a reentrant checkpoint would need a gradient.
    base.enable_input_require_grads()


def build_engine(
    model: PeftModel,
    *,
    engine_config: dict[str, Any],
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
) -> deepspeed.DeepSpeedEngine:
    """Give the model to DeepSpeed: one parameter group with everything that trains. A collective."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=engine_config, lr_scheduler=schedule, dist_init_required=False
    )
    return engine


def destroy(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free the engine; a second one in the same process needs the first one gone."""
    engine.destroy()


def peft_model(engine: deepspeed.DeepSpeedEngine) -> PeftModel:
    """Give the PEFT model inside an engine."""
    module: nn.Module = engine.module
    assert isinstance(module, PeftModel)
    return module
