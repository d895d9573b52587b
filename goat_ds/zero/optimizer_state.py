"""Read and write what training knows of one tensor: its fp32 value, Adam's moments and Adam's count of steps.

The same under every ZeRO stage, precision and offload, so that a state can be carried to another engine, of another
number of ranks too. DeepSpeed's own setters leave out the copy that the next forward computes with and Adam's count,
and know no moments before the first step; a run that goes on without these drifts from its first step.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed
from deepspeed import DeepSpeedEngine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from goat_ds.distributed import ranks
from goat_ds.zero import partition

MOMENTS = ("exp_avg", "exp_avg_sq")


class TensorState(NamedTuple):
    """What training knows of one tensor: whole, in fp32."""

    master: Tensor
    """Its value, before rounding to the dtype of the model."""
    exp_avg: Tensor
    """Adam's first moment; 0 before the first step."""
    exp_avg_sq: Tensor
    """Adam's second moment; 0 before the first step."""
    num_steps: int
    """Steps that Adam has made."""


class _Place(NamedTuple):
    """Where ZeRO-0 keeps a tensor: from ``start`` on in an fp32 tensor that Adam works on."""

    flat: Tensor
    start: int


def read_state(engine: DeepSpeedEngine, parameter: nn.Parameter) -> TensorState:
    """Return on every rank the state of a trained parameter. A collective.

    Args:
        engine: The engine that trains it; between two steps.
        parameter: Whole or sharded.
    """
    _begin(engine)
    if partition.is_partitioned(parameter) or hasattr(parameter, "_hp_mapping"):
        master = safe_get_full_fp32_param(parameter)
        first, second = (safe_get_full_optimizer_state(parameter, key) for key in MOMENTS)
    else:
        master, first, second = (view.clone() for view in _views(engine, parameter).values())
    return TensorState(master, first, second, _num_steps(engine))


@torch.no_grad()
def write_state(engine: DeepSpeedEngine, parameter: nn.Parameter, state: TensorState | None, *, owner: int) -> None:
    """Write the state that one rank has into a trained parameter, and its value into the model's copy. A collective.

    Args:
        engine: The engine that trains it; between two steps.
        parameter: Whole or sharded.
        state: On any device; None on the other ranks.
        owner: Who has it. Adam counts steps for all tensors together, so all states must agree in ``num_steps``.
    """
    _begin(engine)
    state = _on_all_ranks(partition.full_shape(parameter), state, owner=owner)
    if partition.is_partitioned(parameter):
        safe_set_local_fp32_param(parameter, partition.shard_of(parameter, state.master))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, partition.shard_of(parameter, getattr(state, key)), key)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, state.master)
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, getattr(state, key), key)
    else:
        for key, view in _views(engine, parameter).items():
            view.copy_(getattr(state, key))
    partition.put(parameter, state.master)
    for flat in _adam_tensors(engine):
        adam_state = engine.basic_optimizer.state[flat]
        # torch's AdamW counts in a tensor, DeepSpeed's in a number.
        kind = torch.tensor if isinstance(adam_state["step"], Tensor) else int
        adam_state["step"] = kind(state.num_steps)


def _on_all_ranks(shape: torch.Size, state: TensorState | None, *, owner: int) -> TensorState:
    values = torch.empty(3, *shape, dtype=torch.float32, device=ranks.device())
    count = torch.zeros((), dtype=torch.int64, device=ranks.device())
    if state is not None:
        torch.stack([state.master.to(values), state.exp_avg.to(values), state.exp_avg_sq.to(values)], out=values)
        count.fill_(state.num_steps)
    torch.distributed.broadcast(values, src=owner)
    torch.distributed.broadcast(count, src=owner)
    master, first, second = values
    return TensorState(master, first, second, int(count))


def _adam_tensors(engine: DeepSpeedEngine) -> list[Tensor]:
    """List the fp32 tensors that Adam works on; but for ZeRO-0 each holds this rank's share of many parameters."""
    optimizer: Any = engine.optimizer
    # ZeRO-3 hands its own to Adam for the moment of a step only.
    sharded: list[Tensor] | None = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    if sharded is not None:
        return sharded
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


def _begin(engine: DeepSpeedEngine) -> None:
    """Make the state of Adam that its first step would make."""
    is_torch = isinstance(engine.basic_optimizer, torch.optim.Adam)
    for flat in _adam_tensors(engine):
        adam_state = engine.basic_optimizer.state[flat]
        if not adam_state:
            adam_state["step"] = torch.tensor(0.0) if is_torch else 0
            adam_state |= {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
    # Below ZeRO-3 DeepSpeed cuts the moments into parameters after the first step.
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _num_steps(engine: DeepSpeedEngine) -> int:
    return int(engine.basic_optimizer.state[_adam_tensors(engine)[0]]["step"])


def _views(engine: DeepSpeedEngine, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return a parameter's part of what ZeRO-0 keeps, by the field of ``TensorState``, to read or to write."""
    flat, start = _place(engine, parameter)
    tensors = {"master": flat} | {key: engine.basic_optimizer.state[flat][key] for key in MOMENTS}
    end = start + parameter.numel()
    return {key: tensor.detach().view(-1)[start:end].view_as(parameter) for key, tensor in tensors.items()}


def _place(engine: DeepSpeedEngine, parameter: nn.Parameter) -> _Place:
    optimizer: Any = engine.optimizer
    if optimizer is engine.basic_optimizer:
        return _Place(parameter, 0)
    for parameters, group in zip(optimizer.fp16_groups, engine.basic_optimizer.param_groups, strict=True):
        numbers = {id(other): number for number, other in enumerate(parameters)}
        if id(parameter) in numbers:
            number = numbers[id(parameter)]
            if len(group["params"]) == len(parameters):
                return _Place(group["params"][number], 0)
            # A fused Adam works on all parameters of a group as one.
            return _Place(group["params"][0], sum(other.numel() for other in parameters[:number]))
    raise AssertionError("the engine does not train this parameter")
