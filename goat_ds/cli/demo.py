"""The whole way in one command: question the embedded base, train it on two ranks, export it, question the export."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from goat_ds import demo
from goat_ds.arguments import flag, parse
from goat_ds.cli.program import logger, program


@dataclass(frozen=True, kw_only=True)
class DemoFlags:
    """Settings of the demo."""

    output: Path | None = flag(None, "a new folder; runs/make-demo-<n> by default")


@program
def main(arguments: Sequence[str]) -> int:
    """Run the steps that a user would type; return the exit code of the first that fails, or 0."""
    flags = parse(DemoFlags, arguments, program="goat-ds demo", description=__doc__)
    output = flags.output or unused(Path("runs", "make-demo"))
    began = time.monotonic()
    for step in steps(output):
        if code := run(step):
            return code
    logger.info(f"\n{time.monotonic() - began:.0f} s; the model is in {output / 'exact'}")
    return 0


def steps(output: Path) -> list[list[str]]:
    """Return the commands, one after the other."""
    exam = [sys.executable, str(demo.exam_path()), "--data", str(demo.heldout_data()), "--model"]
    train = ["deepspeed", "--num_gpus", "2", "--module", "goat_ds.cli.train", "--ds_config", "zero3"]
    export = [sys.executable, "-m", "goat_ds.cli.export", "--mode", "exact", "--checkpoint", str(output / "run")]
    return [
        [*exam, str(demo.base_path())],
        [*train, "--output_dir", str(output / "run")],
        [*export, "--output", str(output / "exact")],
        [*exam, str(output / "exact")],
    ]


def run(command: Sequence[str]) -> int:
    """Run one step, showing its command; return its exit code."""
    logger.info(f"\n$ {' '.join(command)}")
    # deepspeed stands beside this python, also where its environment is not active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.run(command, env=os.environ | {"PATH": path}, check=False).returncode


def unused(stem: Path) -> Path:
    """Return the first of ``stem-1``, ``stem-2`` … that does not exist."""
    return next(path for n in count(1) if not (path := stem.with_name(f"{stem.name}-{n}")).exists())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
