"""The processes of a run: who this one is, and what all of them agree on.

CPU with gloo and GPU with NCCL differ in what DeepSpeed's accelerator picks, nowhere here.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from tqdm import tqdm

from goat_ds.errors import ConfigError, TrainingError

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is, as the launcher says."""

    world_rank: int
    """Place among all processes."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Place among the processes of this node."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once a run."""
        return self.world_rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """Whether this process does what is done once a node."""
        return self.local_rank == 0


def join(ranks: Ranks, *, timeout_minutes: float) -> None:
    """Join the process group of a run. A collective: returns when every rank has entered.

    Args:
        ranks: Who this process is; the launcher's MASTER_ADDR and MASTER_PORT say where the others are.
        timeout_minutes: Within which a rank that stops answering shall end the run; a collective waits a little longer,
            for what ``zero.watch`` has to say.
    """
    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(ranks.local_rank)
    deepspeed.init_distributed(
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=1.1 * timeout_minutes + 0.2),
        rank=ranks.world_rank,
        world_size=ranks.world_size,
        verbose=False,
    )


def leave() -> None:
    """Leave the process group; without this a CPU process ends with -6."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """Give the device that collectives of this process work on."""
    return torch.device(get_accelerator().current_device_name())


def has_cuda() -> bool:
    """Whether the accelerator of this process is a CUDA device."""
    return get_accelerator().device_name() == "cuda"


def supports_fp16() -> bool:
    """Whether the accelerator computes in fp16."""
    return bool(get_accelerator().is_fp16_supported())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, exactly in float64. A collective."""
    total = values.detach().to(device(), torch.float64)
    torch.distributed.all_reduce(total)
    return total


def max_over_ranks(value: float) -> float:
    """Give the largest value any rank has. A collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)


def peak_memory_gib() -> float:
    """Give the most memory this process has held: of its device, or resident on a CPU."""
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed's CPU accelerator looks only when it is asked; the kernel keeps the true peak, in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(get_accelerator().max_memory_allocated()) / 2**30


def union_over_ranks(mine: dict[K, T]) -> dict[K, T]:
    """Give every rank what each has under keys of its own. A collective."""
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, mine)
    return {key: value for part in told for key, value in part.items()}


def same_everywhere(value: str) -> bool:
    """Whether every rank has the same value. A collective."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return len(set(values)) == 1


def from_first(value: T) -> T:
    """Give every rank what the first one has. A collective."""
    told: list[Any] = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    result: T = told[0]
    return result


def together_from(world_rank: int, work: Callable[[], T]) -> T:
    """Let one rank do something and give its result, or what it raised, to all. A collective.

    Raises:
        ConfigError: it raised one.
        TrainingError: it raised anything else.
    """
    here = torch.distributed.get_rank() == world_rank
    told: list[Any] = [together(lambda: work() if here else None)]
    torch.distributed.broadcast_object_list(told, src=world_rank)
    result: T = told[0]
    return result


def together(work: Callable[[], T]) -> T:
    """Do something that may fail on some ranks; if it does, fail on all of them. A collective.

    Raises:
        ConfigError: some rank raised one; all ranks raise the same.
        TrainingError: some rank raised anything else; the others name it.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    # One number says that all is well; only what went wrong is told in words, which take ten times as long.
    if not max_over_ranks(error is not None):
        return result  # type: ignore[return-value]
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, _portable(error))
    for rank, problem in enumerate(told):
        if isinstance(problem, ConfigError):
            problem.told_everywhere = True
            raise problem from error
        if problem is not None:
            raise TrainingError(f"rank {rank} failed: {problem}") from error
    raise AssertionError("some rank failed")


def _portable(error: Exception | None) -> ConfigError | str | None:
    if error is None or isinstance(error, ConfigError):
        return error
    return f"{type(error).__name__}: {error}"


def first_on_node_then_others(ranks: Ranks, work: Callable[[], T]) -> T:
    """Let the first process of each node do something (and leave it in a cache), then the others. A collective.

    Raises:
        ConfigError: some rank raised one.
        TrainingError: some rank raised anything else.
    """
    first = together(lambda: work() if ranks.is_first_on_node else None)
    then = together(lambda: None if ranks.is_first_on_node else work())
    return first if ranks.is_first_on_node else then  # type: ignore[return-value]


def say(processes: Ranks, *lines: str) -> None:
    """Print on the first rank, beside its progress bars."""
    if processes.is_first:
        for line in lines:
            tqdm.write(line)
