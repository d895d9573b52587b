"""What a child process of the tests is started in."""

import os
import socket
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def cpu_environment(**more: str) -> dict[str, str]:
    """Return the environment of a child process: CPU, one thread, no hub, this checkout importable, no launcher."""
    fixed = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER} | fixed | more


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """Return the environment of each rank as a launcher would set it."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(world_size)]
