"""What a filled ds_config makes DeepSpeed hold beside the model, by DeepSpeed's own reading of it and its defaults."""

from typing import Any, NamedTuple

import torch
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from pydantic import ValidationError

from goat_ds.errors import ConfigError


class ZeroSizes(NamedTuple):
    """The settings of ZeRO that decide over memory; counts are of values, whatever their dtype."""

    stage: int
    reduce_bucket: int
    """Values whose gradients are reduced at once."""
    prefetch_bucket: int
    """Values that are gathered ahead of their use."""
    persistence_threshold: int
    """A parameter of at most so many values is held whole by every rank, beside its shards."""
    most_persistent: int
    """Values that may be held so in all."""
    max_live: int
    """Values that may be whole before gathering ahead stops."""
    max_reuse_distance: int
    """A parameter stays whole that is used again before so many values have passed."""
    second_copy_ranks: int
    """Ranks that together hold a second copy of all parameters (hpZ); 1: there is none."""
    overlaps: bool
    """Whether gradients are reduced while others are computed."""
    has_buckets: bool
    """Whether gradients are copied into a bucket as they are produced."""
    scatters: bool
    """Whether gradients are reduced to their owners only."""
    offloads_parameters: bool
    offloads_optimizer: bool
    gradient_dtype: torch.dtype
    """Dtype that gradients are accumulated in."""
    parameter_pins: bool
    """Whether what is offloaded of the parameters lies in memory that the system cannot move."""


def read(engine_config: dict[str, Any], *, model_dtype: torch.dtype) -> ZeroSizes:
    """Read a filled DeepSpeed config.

    Raises:
        ConfigError: DeepSpeed refuses the values of zero_optimization, one line each; or the dtype of data_types.
    """
    try:
        zero = DeepSpeedZeroConfig(**engine_config.get("zero_optimization", {}))
    except ValidationError as error:
        raise ConfigError(*(_line(problem) for problem in error.errors())) from error
    return ZeroSizes(
        stage=int(zero.stage),
        reduce_bucket=int(zero.reduce_bucket_size),
        prefetch_bucket=int(zero.prefetch_bucket_size),
        persistence_threshold=int(zero.param_persistence_threshold),
        most_persistent=int(zero.model_persistence_threshold),
        max_live=int(zero.max_live_parameters),
        max_reuse_distance=int(zero.max_reuse_distance),
        second_copy_ranks=max(1, int(zero.zero_hpz_partition_size)),
        overlaps=bool(zero.overlap_comm),
        has_buckets=bool(zero.contiguous_gradients),
        scatters=bool(zero.reduce_scatter),
        offloads_parameters=_is_used(zero.offload_param),
        offloads_optimizer=_is_used(zero.offload_optimizer),
        gradient_dtype=_gradient_dtype(engine_config, model_dtype),
        parameter_pins=bool(zero.offload_param and zero.offload_param.pin_memory),
    )


def _gradient_dtype(engine_config: dict[str, Any], model_dtype: torch.dtype) -> torch.dtype:
    name = engine_config.get("data_types", {}).get("grad_accum_dtype")
    if name is None:
        return model_dtype
    try:
        dtype: torch.dtype = DtypeEnum(name).value
    except ValueError as error:
        raise ConfigError(
            f"ds_config: data_types.grad_accum_dtype ({name}) must be fp32, bf16 or fp16; or leave it out"
        ) from error
    return dtype


def _is_used(block: Any) -> bool:
    return block is not None and block.device != OffloadDeviceEnum.none


def _line(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    return f"ds_config: zero_optimization.{place} ({problem['input']}): {problem['msg']}; mend it, or leave it out"
