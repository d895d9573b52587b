"""Run programs and ranks to their end, and read what a run left."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.child_environment import REPOSITORY, cpu_environment, rank_environments
from tests.forked_ranks import Run, start

FEW_HELDOUT = REPOSITORY / "tests" / "few_heldout.jsonl"
"""Held-out records of the demo to evaluate on in a moment; all that it has make 74 packs."""


class Done(NamedTuple):
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


def run_program(*command: str, timeout: float = 300) -> Done:
    """Run a script as plain ``python`` would, in a fork that has its imports already."""
    with tempfile.TemporaryDirectory() as folder:
        run = start(command, folder=Path(folder), environments=[cpu_environment()], errors_apart=True)
        (code,) = run.wait(seconds=timeout)
        return Done(code, *(Path(run.folder, f"{kind}0.txt").read_text() for kind in ("rank", "errors")))


def run_cold(*command: str, timeout: float = 300) -> Done:
    """Run ``python command`` in a new process, which takes seconds to import what a fork has imported already."""
    done = subprocess.run(
        [sys.executable, *command],
        env=cpu_environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start_ranks(command: list[str], *, world_size: int, folder: Path) -> Run:
    """Start a script on so many ranks; what they print is kept in the folder."""
    return start(command, folder=folder, environments=rank_environments(world_size))


def run_ranks(command: list[str], *, world_size: int, timeout: float = 600) -> list[str]:
    """Run a script on every rank to the end; return what each printed. Any failure fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        run = start_ranks(command, world_size=world_size, folder=Path(folder))
        codes = run.wait(seconds=timeout)
        assert codes == [0] * world_size, run.output()
        return run.outputs()


def run_many(command_lines: list[list[str]], *, world_size: int, folder: Path) -> list[str]:
    """Train with each command line in turn, in one process group; return what each rank printed."""
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
