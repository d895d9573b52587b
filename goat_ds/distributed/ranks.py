"""Who this process is among the ranks of a run, and what all of them agree on.

Every function also works in a process that has joined no process group: it is then the only rank. CPU with gloo and GPU
with NCCL differ in the backend that whoever joins names, nowhere here.
"""

import resource
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from goat_ds.errors import ConfigError, TrainingError

K = TypeVar("K")
T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process has joined a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank() -> int:
    """Return this process's place among all."""
    return torch.distributed.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def get_local_rank() -> int:
    """Return this process's place among those of its node, as the launcher has set it for torch."""
    return torch.distributed.get_node_local_rank(fallback_rank=0)


def is_first() -> bool:
    """Whether this process writes what is written once a run."""
    return get_rank() == 0


def is_first_on_node() -> bool:
    """Whether this process does what is done once a node."""
    return get_local_rank() == 0


def leave() -> None:
    """Leave the process group; without this a CPU process ends with -6."""
    if is_distributed():
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """Return the device that this process's models and collectives are on: its accelerator, or the CPU."""
    if is_distributed() and torch.distributed.get_backend() == "gloo":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def has_cuda() -> bool:
    """Whether this process works on a CUDA device."""
    return device().type == "cuda"


def peak_memory_gib() -> float:
    """Return the most memory this process has held: of its device, or resident on a CPU."""
    here = device()
    if here.type == "cpu":
        # The kernel keeps the true peak, in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return float(torch.accelerator.max_memory_allocated(here)) / 2**30


def share_of(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's part of what all have, dealt like cards."""
    return items[get_rank() :: get_world_size()]


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks in place, in its own dtype, and return it. A collective."""
    if get_world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def sum_on_(owner: int, tensor: Tensor) -> None:
    """Add a tensor up over all ranks in place on one of them; the others' mean nothing afterwards. A collective."""
    if get_world_size() > 1:
        torch.distributed.reduce(tensor, dst=owner)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, exactly in float64. A collective."""
    return sum_over_ranks_(values.detach().to(device(), torch.float64, copy=True))


def max_over_ranks(value: float) -> float:
    """Return the largest value any rank has. A collective."""
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    if get_world_size() > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)


def send_from(source: int, tensor: Tensor) -> Tensor:
    """Overwrite a tensor on every rank by that of one, and return it. A collective."""
    if get_world_size() > 1:
        torch.distributed.broadcast(tensor, src=source)
    return tensor


def gather_objects(mine: T) -> list[T]:
    """Return what every rank has, in the order of the ranks. A collective."""
    if not is_distributed():
        return [mine]
    found: list[Any] = [None] * get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found


def object_from(source: int, value: T) -> T:
    """Return on every rank the value that one has. A collective."""
    if not is_distributed():
        return value
    sent: list[Any] = [value]
    torch.distributed.broadcast_object_list(sent, src=source)
    result: T = sent[0]
    return result


def union_over_ranks(mine: dict[K, T]) -> dict[K, T]:
    """Return on every rank what each has under keys of its own. A collective."""
    return {key: value for part in gather_objects(mine) for key, value in part.items()}


def is_same_everywhere(value: str) -> bool:
    """Whether every rank has the same value. A collective."""
    return len(set(gather_objects(value))) == 1


def agree(work: Callable[[], T]) -> T:
    """Return what some work gives, which may fail on some ranks; if it does, fail on all of them. A collective.

    Raises:
        ConfigError: some rank raised one; all ranks raise the same.
        TrainingError: some rank raised anything else; the others name it.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    # One number says that all is well; only what went wrong is sent in words, which take ten times as long.
    if not max_over_ranks(error is not None):
        return result  # type: ignore[return-value]
    for rank, problem in enumerate(gather_objects(_portable(error))):
        if isinstance(problem, ConfigError):
            problem.raised_everywhere = True
            raise problem from error
        if problem is not None:
            raise TrainingError(f"rank {rank} failed: {problem}") from error
    raise AssertionError("some rank failed")


def _portable(error: Exception | None) -> ConfigError | str | None:
    if error is None or isinstance(error, ConfigError):
        return error
    return f"{type(error).__name__}: {error}"


def agree_from(source: int, work: Callable[[], T]) -> T:
    """Return to all ranks what one rank's work gives, or raise on all of them what it raised. A collective.

    Raises:
        ConfigError: it raised one.
        TrainingError: it raised anything else.
    """
    return object_from(source, agree(lambda: work() if get_rank() == source else None))  # type: ignore[return-value]


def agree_from_first(work: Callable[[], T]) -> T:
    """Return to all ranks what the first rank's work gives, or raise on all of them what it raised. A collective."""
    return agree_from(0, work)


def first_on_node_then_others(work: Callable[[], T]) -> T:
    """Let the first process of each node do something (and leave it in a cache), then the others. A collective.

    Raises:
        ConfigError: some rank raised one.
        TrainingError: some rank raised anything else.
    """
    first = agree(lambda: work() if is_first_on_node() else None)
    then = agree(lambda: None if is_first_on_node() else work())
    return first if is_first_on_node() else then  # type: ignore[return-value]
