"""Every benchmark runs to its table; what it measures on tiny shapes means nothing, but for what was planned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import RESULTS, TABLE, Row, with_table
from tests.launching import REPOSITORY, cpu_environment

SMALLEST = {
    "decomposition.py": ["--shape", "Gemma-3-270M up (2048 x 640)", "--repetitions", "2"],
    "layer.py": ["--tokens", "32", "--repetitions", "2", "--shape", "LLaMA-3-8B k", "Gemma-3-270M up"],
    "step.py": ["--layers", "1", "--tokens", "64", "--vocabulary", "256", "--repetitions", "2"],
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
    "loss.py": ["--tokens", "32", "--vocabulary", "128", "--repetitions", "2"],
    "base_4bit_memory.py": ["--layers", "1", "--hidden", "128", "--intermediate", "256"],
    "base_4bit_step.py": ["--shapes", "gemma-3-270m", "--tokens", "16", "--repetitions", "2"],
    "communication.py": ["--hidden", "512", "--intermediate", "1024", "--tokens", "16", "--steps", "2"],
    "checkpoint.py": ["--layers", "1", "--tokens", "16", "--repetitions", "2"],
    "plan.py": [],  # starting eight ranks takes longer than what they compute
}


SMOKE = "loss.py"
"""The one that every run of the tests tries."""
BENCHMARKS = REPOSITORY / "benchmarks"


def test_every_benchmark_is_tried_and_run_by_make_bench() -> None:
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - {"results.py", "live_tensors.py", "setting.py"}
    assert SMALLEST.keys() == scripts
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(f"python benchmarks/{name}\n" in makefile for name in scripts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] if name != SMOKE else []) for name in SMALLEST]
)
def test_a_benchmark_prints_its_table_and_appends_it(name: str, tmp_path: Path) -> None:
    table_before, results = TABLE.read_text(), tmp_path / "results.jsonl"
    command = [sys.executable, f"benchmarks/{name}", *SMALLEST[name], "--results", str(results)]
    done = subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert found
    for line in found:
        assert line["script"] == name and line["flags"] and line["question"] in done.stdout
        assert len(line["ours"]) == len(line["rival"]) > 0
        if line["at_least"] is not None:
            # What was foretold, against what was: bytes, which are the same on every machine.
            assert line["at_least"] <= line["ours"][0] / line["rival"][0] <= line["at_most"], line["question"]
    assert TABLE.read_text() == table_before


def test_the_page_shows_the_newest_rows() -> None:
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert with_table(TABLE.read_text(), found) == TABLE.read_text()


def test_a_ratio_is_the_median_over_pairs_and_is_held_to_its_target() -> None:
    row = Row(question="a, against b", ours=(1.0, 4.0, 3.0), rival=(2.0, 4.0, 1.0), unit="s", at_most=0.9)
    assert row.ratio == 1.0
    assert row.quartiles == (0.75, 2.0)
    assert row.cells()[-1] == "≤ 0.9: **missed**"
    within = Row(question="planned", ours=(95.0,), rival=(100.0,), unit="MiB", at_least=0.9, at_most=1.1)
    assert within.cells() == ["planned", "95 MiB", "100 MiB", "0.950", "", "≥ 0.9, ≤ 1.1: met"]


def test_the_table_shows_the_newest_run_without_flags() -> None:
    about = {"script": "a.py", "commit": "c0ffee", "at_most": 1.0, "at_least": None, "rival": [1.0], "unit": "s"}
    lines = [
        {**about, "date": f"2026-01-0{day}T00:00:00+00:00", "flags": flags, "question": question, "ours": [ours]}
        for day, flags, question, ours in (
            (1, [], "a, against b", 3.0),
            (1, [], "a question of before", 3.0),
            (2, [], "a, against b", 2.0),
            (3, ["--layers 1"], "a, against b", 1.0),
        )
    ]
    page = with_table("above <!-- table: begin --> old <!-- table: end --> below", lines)
    assert page.startswith("above ") and page.endswith(" below") and "old" not in page and "before" not in page
    assert page.count("a, against b") == 1
    assert "| a, against b | 2 s | 1 s | 2.000 |  | ≤ 1: **missed** | `a.py`, 2026-01-02, c0ffee |" in page
