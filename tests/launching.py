"""Start the ranks of a run on this machine, and read what a run left."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def cpu_environment(**more: str) -> dict[str, str]:
    """Give the environment of a child process: CPU, one thread, no hub, this checkout importable."""
    fixed = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TOKENIZERS_PARALLELISM": "false",
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return inherited | fixed | more


def start_ranks(arguments: list[str], *, outputs: list[Path]) -> list[subprocess.Popen[str]]:
    """Start ``python arguments`` on as many ranks as there are files for what they print."""
    port = str(free_port())
    running = []
    for rank, output in enumerate(outputs):
        environment = cpu_environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(len(outputs)),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        # Files and not pipes: a rank that has filled its pipe would wait for the test, which waits for another rank.
        with output.open("w") as file:
            command = [sys.executable, *arguments]
            running.append(
                subprocess.Popen(
                    command, env=environment, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, text=True
                )
            )
    return running


def run_ranks(arguments: list[str], *, world_size: int, timeout: float = 600) -> list[str]:
    """Run ``python arguments`` on every rank to the end; give what each printed. Any failure fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(world_size)]
        running = start_ranks(arguments, outputs=outputs)
        try:
            for process in running:
                process.wait(timeout)
        finally:
            for process in running:
                process.kill()
        printed = [output.read_text() for output in outputs]
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text
    return printed


def run_many(command_lines: list[list[str]], *, world_size: int, folder: Path) -> list[str]:
    """Train with each command line in turn, in one process group; give what each rank printed."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / f"runs-{world_size}.json"
    listed.write_text(json.dumps(command_lines))
    return run_ranks(["tests/many_runs.py", str(listed)], world_size=world_size)


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(output_dir: Path) -> list[float]:
    """Read the training losses of a run, step by step."""
    return [line["loss"] for line in metrics_of(output_dir) if "loss" in line]
