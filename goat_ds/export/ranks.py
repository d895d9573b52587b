"""The processes of an export: one, or several that share the calibration tokens under torchrun. No DeepSpeed.

Every function does nothing, rather than something else, on one process.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")


def world_rank() -> int:
    """Give this process's place among all."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Give the number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes."""
    return world_rank() == 0


def share_of(items: Sequence[T]) -> Sequence[T]:
    """Give this rank's part of what all have, dealt like cards."""
    return items[world_rank() :: world_size()]


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks in place, and give it. A collective."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def send_from(source: int, tensor: Tensor) -> Tensor:
    """Give every rank what one has, in place. A collective."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, src=source)
    return tensor


def device() -> torch.device:
    """Give the device that models run on: this process's accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
