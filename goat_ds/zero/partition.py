"""The only place that asks whether a parameter is partitioned.

Every helper does nothing, rather than something else, on a parameter that is whole.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import deepspeed
import torch
import torch.distributed
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups
from torch import Tensor, nn

from goat_ds.distributed import ranks


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds this parameter in shards."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


@contextmanager
def partitioned_at_birth(ds_config: dict[str, object], *, stage: int) -> Iterator[None]:
    """Shard the parameters of every module built inside, at once, under ZeRO-3; nothing under lower stages."""
    with _init(ds_config) if stage == 3 else nullcontext():
        yield


def _init(ds_config: dict[str, object]) -> deepspeed.zero.Init:
    # With hpZ the first one makes the groups of ranks, and a second one that is not given them would fail.
    return deepspeed.zero.Init(
        # DeepSpeed keeps it and may change it, and others need it as it is.
        config_dict_or_path=copy.deepcopy(ds_config),
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
    )


Cut = Callable[[nn.Parameter, torch.dtype], None]
"""Shards a whole parameter that every rank has, in a dtype."""


def cutter(ds_config: dict[str, object], *, stage: int) -> Cut:
    """Return a function that shards a whole parameter that every rank has, in the dtype it is given.

    Each rank cuts its shard from its own, and nothing is sent. Below ZeRO-3 the parameter is given memory of its own,
    which that of a mapped file is not.
    """
    if stage != 3:
        return _own
    sharding = _init(ds_config)

    def cut(parameter: nn.Parameter, dtype: torch.dtype) -> None:
        sharding._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        # Only the shard is cast. What is gathered later comes to where the empty parameter is, in its dtype.
        shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        shard.data = shard.data.to(dtype)
        parameter.data = parameter.data.to(sharding.local_device, dtype)

    return cut


def _own(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    parameter.data = parameter.data.to(dtype, copy=True)


def release(parameter: nn.Parameter) -> None:
    """Free the memory of a parameter that is no longer used.

    What DeepSpeed attaches to a parameter refers back to it, so it would live until the garbage collector comes.
    """
    holder = parameter.ds_tensor if is_partitioned(parameter) else parameter  # type: ignore[attr-defined]
    holder.data = holder.data.new_empty(0)


def keep_sharded(engine: deepspeed.DeepSpeedEngine, parameters: Iterable[nn.Parameter]) -> None:
    """Keep parameters in shards between uses, also those so small that DeepSpeed would leave them whole."""
    sharded = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not sharded:
        return
    ids = {id(parameter) for parameter in sharded}
    persistent = engine.optimizer.persistent_parameters
    assert persistent is engine.optimizer.parameter_offload.persistent_parameters
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in ids]
    for parameter in sharded:
        parameter.ds_persist = False  # type: ignore[attr-defined]
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]


def end_without_backward(engine: deepspeed.DeepSpeedEngine) -> None:
    """End a forward that no backward follows. Nothing below ZeRO-3.

    DeepSpeed takes every forward for the first half of what it has seen before, and has fetched and kept parameters for
    the other half: one on its way can neither be read nor saved, and what is still here would not be fetched in time
    later. An order of modules that it has just learned from this forward has no other half, and is forgotten: what it
    concluded from that one it would not conclude anew.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    coordinator = offload.param_coordinator
    if coordinator.is_complete_trace():
        coordinator.reset_step()
    elif coordinator.is_record_trace():
        coordinator._invalidate_trace()
    for parameter in engine.module.parameters():
        if parameter.ds_status is ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
            parameter.partition()


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather parameters, to read. A collective: every rank must enter, in the same order."""
    with deepspeed.zero.GatheredParameters([p for p in parameters if is_partitioned(p)]):
        yield


@contextmanager
def written_by(world_rank: int, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather parameters; what ``world_rank`` wrote is what every rank has afterwards. A collective."""
    parameters = list(parameters)
    with deepspeed.zero.GatheredParameters([p for p in parameters if is_partitioned(p)], modifier_rank=world_rank):
        yield
    for parameter in parameters:
        if not is_partitioned(parameter):
            # A whole model may still wait on the host, where NCCL cannot reach it.
            written = parameter.detach().to(ranks.device())
            torch.distributed.broadcast(written, src=world_rank)
            with torch.no_grad():
                parameter.copy_(written)


@torch.no_grad()
def fill_from(world_rank: int, parameters: Sequence[nn.Parameter], values: Sequence[Tensor] | None) -> list[Tensor]:
    """Fill parameters of one dtype with the values that one rank has. A collective: one broadcast.

    Args:
        world_rank: Who has the values.
        parameters: What to fill, the same on every rank.
        values: Whole tensors in the parameters' order; None on the other ranks.

    Returns:
        The values, whole, on every rank.
    """
    sizes = [full_shape(parameter).numel() for parameter in parameters]
    flat = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=ranks.device())
    if values is not None:
        torch.cat([value.reshape(-1).to(flat) for value in values], out=flat)
    torch.distributed.broadcast(flat, src=world_rank)
    wholes = [part.view(full_shape(parameter)) for parameter, part in zip(parameters, flat.split(sizes), strict=True)]
    for parameter, whole in zip(parameters, wholes, strict=True):
        put(parameter, whole)
    return wholes


@torch.no_grad()
def put(parameter: nn.Parameter, whole: Tensor) -> None:
    """Write a value that every rank has whole into a parameter."""
    if not is_partitioned(parameter):
        parameter.copy_(whole.view_as(parameter))
    elif _is_shard_alone(parameter):
        # What DeepSpeed would do as well, with a great deal around it.
        parameter.ds_tensor.copy_(shard_of(parameter, whole))  # type: ignore[attr-defined]
    else:
        # What gathering would have made of it, without moving values that are about to be overwritten.
        parameter.data = whole.to(ranks.device(), parameter.dtype).view(full_shape(parameter))
        parameter.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
        parameter.partition(has_been_updated=True)  # type: ignore[attr-defined]


def _is_shard_alone(parameter: nn.Parameter) -> bool:
    """Whether the shard is all that is here of a partitioned parameter: no whole, and no second shard (hpZ)."""
    is_away = parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
    return is_away and parameter.ds_secondary_tensor is None  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return this rank's part of a partitioned parameter, out of a whole value; the last shards are padded with 0."""
    num_here, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
    mine = whole.reshape(-1)[rank * num_here : (rank + 1) * num_here]
    return nn.functional.pad(mine, (0, num_here - mine.numel()))


def resident_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes that this rank holds of a parameter: its shard, and the whole where that is here as well."""
    shard = parameter.ds_tensor if is_partitioned(parameter) else None  # type: ignore[attr-defined]
    tensors = {tensor.data_ptr(): tensor for tensor in (parameter.data, shard) if tensor is not None and tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def whole_on(world_rank: int, parameter: nn.Parameter) -> Tensor | None:
    """Return a copy of the whole parameter to one rank and None to the others, who hold no more than their shard.

    A collective. The shards travel straight to that rank; a gather on every rank would hold one weight too many.
    """
    here = torch.distributed.get_rank() == world_rank
    if not is_partitioned(parameter):
        return parameter.detach().to(ranks.device(), copy=True) if here else None
    shard = parameter.ds_tensor.to(ranks.device())  # type: ignore[attr-defined]
    if not here:
        torch.distributed.gather(shard, None, dst=world_rank)
        return None
    whole = torch.empty(shard.numel() * torch.distributed.get_world_size(), dtype=shard.dtype, device=shard.device)
    torch.distributed.gather(shard, list(whole.split(shard.numel())), dst=world_rank)
    shape = full_shape(parameter)
    # The last shards are padded.
    return whole[: shape.numel()].view(shape)
