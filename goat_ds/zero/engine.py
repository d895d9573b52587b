"""From a base model on disk to a DeepSpeed engine that trains GOAT experts on it."""

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import StrEnum
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.utils.import_utils import is_flash_attn_2_available

from goat_ds.base.inspect import Base
from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.precision import Precision
from goat_ds.tuner.base_quantization import BaseQuantization
from goat_ds.tuner.config import GoatConfig, Residual
from goat_ds.tuner.model import ADAPTER_NAME, named_experts
from goat_ds.tuner.quantized import QuantizedLinear, check_backend
from goat_ds.zero import adapters, ds_config, partition, quantize, recompute
from goat_ds.zero.adapters import Rates


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


def join(*, timeout_minutes: float) -> None:
    """Join the process group of a run on DeepSpeed's accelerator. A collective: returns when every rank has entered.

    The launcher's environment says who this process is and where the others are.

    Args:
        timeout_minutes: Within which a rank that stops answering shall end the run; a collective waits a little longer,
            for what ``distributed.heartbeat`` has to say.
    """
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(ranks.get_local_rank())
    deepspeed.init_distributed(
        auto_mpi_discovery=False, timeout=timedelta(minutes=1.1 * timeout_minutes + 0.2), verbose=False
    )


def supports_fp16() -> bool:
    """Whether the accelerator computes in fp16."""
    return bool(get_accelerator().is_fp16_supported())


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


def four_bit_problems(
    base: Base, *, quantization: BaseQuantization | None, adapter: PeftConfig | None
) -> Iterator[str]:
    """Yield why a 4-bit base cannot be made or taken over here, one line each.

    Args:
        base: What it is.
        quantization: What was asked for; None: nothing.
        adapter: What is trained; None: every weight.
    """
    folds = isinstance(adapter, GoatConfig) and adapter.residual is Residual.FOLD
    if base.is_4bit and quantization is not None:
        yield f"load_in_4bit: model ({base.name}) is quantised already; leave load_in_4bit out"
    if base.is_4bit and folds:
        yield (
            f"residual (fold) cannot be subtracted from model ({base.name}), which is 4-bit already; use residual "
            "lowrank"
        )
    if base.is_4bit or quantization is not None:
        try:
            check_backend(ranks.device())
        except ConfigError as error:
            yield from error.problems


def rehearse(
    base: Base, adapter: PeftConfig | None, *, quantization: BaseQuantization | None
) -> dict[str, tuple[int, ...]]:
    """Put the adapter on a model without weights, to see whether it fits, and whether the model can become 4-bit.

    Returns:
        The shapes of the adapter's tensors, by their names in its file; of the model's own without an adapter.

    Raises:
        ConfigError: transformers cannot build the model, no layer matches, layers are too small or have a size that
            blocks of 4-bit values do not divide.
    """
    skeleton = base.skeleton()
    unfit = [] if quantization is None else list(quantize.misfits(skeleton, quantization))
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        if adapter is None:
            shapes = {name: tuple(tensor.shape) for name, tensor in adapters.trained_tensors(skeleton)}
        elif isinstance(adapter, GoatConfig):
            fitted = get_peft_model(skeleton, _deferred(adapter), adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
            for item in named_experts(fitted, ADAPTER_NAME):
                shapes |= {f"{item.path}.goat_{name}": tuple(p.shape) for name, p in item.experts.named_parameters()}
        else:
            shapes = adapters.rehearse(skeleton, adapter)
    except ConfigError as error:
        unfit.extend(error.problems)
    raise_if_any(unfit)
    return shapes


def load_base(
    base: Base,
    *,
    precision: Precision,
    attention: Attention,
    engine_config: dict[str, Any],
    quantization: BaseQuantization | None = None,
    compute_precision: Precision | None = None,
) -> Any:
    """Load the base, under ZeRO-3 in shards from the first byte on. A collective.

    Args:
        base: What it is; may be quantised by bitsandbytes in 4 bits.
        precision: Dtype of the weights.
        attention: Settled attention code.
        engine_config: The filled DeepSpeed config.
        quantization: How ``zero.decompose.init_adapter`` will make it 4-bit; None: not at all.
        compute_precision: Dtype that stored 4-bit weights are multiplied in; ``precision`` by default.
    """
    # What an earlier engine of this process told transformers must not shard this base.
    unset_hf_deepspeed_config()
    stage, dtype = ds_config.stage(engine_config), precision.torch_dtype
    four_bit = quantization is not None or base.is_4bit
    if four_bit and quantize.can_be_mapped(base, dtype=dtype):
        model = quantize.load_mapped(
            base,
            quantization=quantization,
            dtype=dtype,
            compute_dtype=(compute_precision or precision).torch_dtype,
            attention=str(attention),
            engine_config=engine_config,
        )
        sharding = HfDeepSpeedConfig(engine_config) if stage == 3 else None
    else:
        # transformers finds it through a weak reference, so it must live as long as the model.
        sharding = HfDeepSpeedConfig(engine_config) if stage == 3 else None
        model = AutoModelForCausalLM.from_pretrained(
            base.name,
            config=copy.deepcopy(base.config),
            dtype=dtype,
            attn_implementation=str(attention),
            trust_remote_code=False,
        )
    model.goat_sharding = sharding
    # A whole model that is saved says again what its base said.
    model.goat_use_cache = model.config.use_cache
    model.config.use_cache = False
    # from_pretrained gives a model in eval mode, in which transformers neither recomputes activations nor drops out.
    model.train()
    return model


def attach_experts(model: Any, goat: GoatConfig, *, engine_config: dict[str, Any]) -> PeftModel:
    """Put empty experts on the base, sharded at birth under ZeRO-3; ``zero.decompose.init_adapter`` fills them."""
    with partition.partitioned_at_birth(engine_config, stage=ds_config.stage(engine_config)):
        # Experts in fp32 on a bf16 base would be gathered into one buffer of the wrong dtype; masters are fp32 anyway.
        return get_peft_model(model, _deferred(goat), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def _deferred(goat: GoatConfig) -> GoatConfig:
    return GoatConfig(**{**goat.to_dict(), "deferred": True})


def enable_checkpointing(model: nn.Module, kind: Checkpointing) -> None:
    """Recompute activations in backward."""
    if kind is Checkpointing.NONE:
        return
    base = adapters.base_of(model)
    base.activation_checkpointing_enable({"use_reentrant": kind is Checkpointing.REENTRANT})
    # The embedding is frozen: without this nothing inside a reentrant checkpoint would need a gradient.
    base.enable_input_require_grads()


def build_engine(
    model: nn.Module,
    *,
    engine_config: dict[str, Any],
    rates: Rates | None = None,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
) -> deepspeed.DeepSpeedEngine:
    """Build the DeepSpeed engine of a model. A collective.

    Args:
        model: With or without an adapter.
        engine_config: The filled DeepSpeed config.
        schedule: Makes the learning-rate schedule of an optimizer.
        rates: The peak rates of the parts of what is trained; None: one for all, as the config has it.
    """
    trained: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained if rates is None else adapters.parameter_groups(model, rates),
        # DeepSpeed keeps it and may change it, and the engine of a dense finish needs it as it is.
        config=copy.deepcopy(engine_config),
        lr_scheduler=schedule,
        dist_init_required=False,
    )
    recompute.keep_until_a_blocks_backward_is_done(model)
    partition.keep_sharded(engine, [module.weight for module in model.modules() if isinstance(module, QuantizedLinear)])
    return engine


def without_monitors(engine_config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a second engine of a run, whose first one has opened the monitors."""
    return {key: value for key, value in engine_config.items() if key not in ds_config.MONITORS}


def resume_schedule(engine: deepspeed.DeepSpeedEngine, num_steps: int) -> None:
    """Put an engine's learning rates where its schedule has them after so many steps."""
    schedule = engine.lr_scheduler
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    schedule.last_epoch = num_steps
    for group, rate, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(num_steps)


def destroy(engine: deepspeed.DeepSpeedEngine) -> None:
    """Free the engine and what its optimizer holds; its model stays, sharded as it is, and can be given to another.

    A second engine in the same process needs the first one gone.
    """
    if hasattr(engine.optimizer, "empty_partition_cache"):
        engine.empty_partition_cache()
    engine.destroy()
    # These two are left behind, and would run this engine's code in the forward of the next one.
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for module in engine.module.modules():
        # ZeRO-3 makes them once a module, and they would gather for its backward as this engine does.
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)
    for parameter in engine.module.parameters():
        # The optimizer lives as long as a parameter refers to it.
        parameter.__dict__.pop("_z3_optimizer", None)
    engine.optimizer = engine.basic_optimizer = engine.lr_scheduler = None


def peft_model(engine: deepspeed.DeepSpeedEngine) -> PeftModel:
    """Return the PEFT model inside an engine."""
    module: nn.Module = engine.module
    assert isinstance(module, PeftModel)
    return module
