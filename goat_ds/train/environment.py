"""What launchers and users say in the environment of a run."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.train.config import TrainConfig
from goat_ds.zero import engine


def join_ranks(config: TrainConfig, *, timeout_minutes: float | None = None) -> None:
    """Join the other processes of a run, as ``deepspeed`` and ``torchrun`` name them, or alone under plain ``python``.

    A collective: it returns when every rank has entered.

    Args:
        config: Of the run.
        timeout_minutes: In place of the run's own.

    Raises:
        ConfigError: another launcher has started several processes, each of which would train alone.
    """
    settle_ranks(config)
    engine.join(timeout_minutes=timeout_minutes or config.timeout_minutes)


def settle_ranks(config: TrainConfig) -> None:
    """Complete what the environment says of this process: alone under plain ``python``, and where on its node.

    Raises:
        ConfigError: another launcher has started several processes, each of which would train alone.
    """
    if "RANK" not in os.environ:
        raise_if_any(_signs_of_others(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)
    if "LOCAL_RANK" not in os.environ:
        if config.local_rank is None:
            raise ConfigError(
                "local_rank is not given: neither --local_rank nor LOCAL_RANK; start with deepspeed or torchrun"
            )
        # Where torch and the distributed room look for it.
        os.environ["LOCAL_RANK"] = str(config.local_rank)


def first_rank_address() -> str:
    """Return where the first rank is, as the launcher, or before it ``join_ranks``, has said."""
    return os.environ["MASTER_ADDR"]


def world_rank_from_environment() -> int:
    """Return this process's place in the run before settings are read; 0 where no launcher has set it."""
    return int(os.environ.get("RANK", "0"))


def build_locks() -> list[Path]:
    """List the files that say that an operator of DeepSpeed's is being compiled, or that such a process was killed.

    torch waits for ever until such a file is gone.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(path for depth in ("*/lock", "*/*/lock") for path in root.glob(depth))


def _signs_of_others(config: TrainConfig) -> Iterator[str]:
    """Yield what shows that this process, which has no RANK, is not the only one."""
    way_out = "RANK is not set, so each process would train alone; start with deepspeed or torchrun"
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            yield f"{name} ({value}) says that there are several processes, and {way_out}"
    if (config.local_rank or 0) > 0:
        yield f"local_rank ({config.local_rank}) says that there are several processes, and {way_out}"
