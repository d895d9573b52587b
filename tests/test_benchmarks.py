"""Every benchmark runs to its table; what it measures on tiny shapes means nothing."""

import subprocess
import sys

import pytest

from tests.launching import REPOSITORY, cpu_environment

SMALLEST = {
    "layer.py": ["--tokens", "32", "--repetitions", "2", "--shape", "LLaMA-3.2-1B k"],
    "startup.py": ["--layers", "1", "--repeats", "1"],
    "export.py": [
        "--layers",
        "1",
        "--hidden",
        "128",
        "--intermediate",
        "256",
        "--vocabulary",
        "64",
        "--repetitions",
        "2",
    ],
    "base_4bit_memory.py": ["--ranks", "1", "2", "--layers", "1", "--hidden", "128", "--intermediate", "256"],
    "base_4bit_step.py": ["--shapes", "gemma-3-270m", "--tokens", "16", "--repetitions", "2"],
    "checkpoint.py": ["--layers", "1", "--tokens", "16", "--repetitions", "2"],
}


def test_every_benchmark_is_tried() -> None:
    assert SMALLEST.keys() == {path.name for path in (REPOSITORY / "benchmarks").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_prints_its_table(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}", *SMALLEST[name]]
    done = subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
    assert len(done.stdout.splitlines()) > 3
