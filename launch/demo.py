"""The whole way in one command: question the embedded base, train it on two ranks, export it, question the export.

python launch/demo.py [--output DIR]
"""

import argparse
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
DEMO = REPOSITORY / "goat_ds" / "demo"


def run(*command: str) -> None:
    """Run one step, showing its command; end with its exit code if it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    code = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
    if code:
        sys.exit(code)


def unused(stem: Path) -> Path:
    """Return the first of ``stem-1``, ``stem-2`` … that does not exist."""
    return next(path for n in count(1) if not (path := stem.with_name(f"{stem.name}-{n}")).exists())


def main() -> None:
    """Run the steps that a user would type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a new folder; runs/make-demo-<n> by default")
    output = parser.parse_args().output or unused(REPOSITORY / "runs" / "make-demo")
    began = time.monotonic()
    exam = [sys.executable, str(DEMO / "exam.py"), "--data", str(DEMO / "data" / "heldout.jsonl"), "--model"]
    run(*exam, str(DEMO / "base"))
    run(
        *("deepspeed", "--num_gpus", "2", "launch/train.py"),
        *("--ds_config", "ds_configs/zero3.json", "--output_dir", str(output / "run")),
    )
    run(
        *(sys.executable, "launch/export.py", "--mode", "exact"),
        *("--checkpoint", str(output / "run"), "--output", str(output / "exact")),
    )
    run(*exam, str(output / "exact"))
    print(f"\n{time.monotonic() - began:.0f} s; the model is in {output / 'exact'}")


if __name__ == "__main__":
    main()
