"""A rank that no longer goes on ends all of them in time, by its name; one that works or leaves ends nobody."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launching import run_ranks, start_ranks

SCRIPT = "tests/distributed/watch_on_ranks.py"
MINUTES = 0.2
SECONDS = 60 * MINUTES


class Started:
    """Ranks that run."""

    def __init__(self, running: list[subprocess.Popen[str]], outputs: list[Path], pids: list[int]) -> None:
        self.running, self.outputs, self.pids = running, outputs, pids

    def said(self) -> str:
        """Give what they have printed so far."""
        return "".join(output.read_text() for output in self.outputs)


@contextmanager
def started(behaviour: str, folder: Path, *, world_size: int = 2) -> Iterator[Started]:
    """Start ranks and wait until all are watched; none is left behind."""
    outputs = [folder / f"{rank}.out" for rank in range(world_size)]
    running = start_ranks([SCRIPT, str(MINUTES), behaviour, str(folder)], outputs=outputs)
    try:
        files = [folder / f"{rank}.pid" for rank in range(world_size)]
        until = time.monotonic() + 120
        while not all(file.exists() for file in files):
            assert time.monotonic() < until and all(process.poll() is None for process in running)
            time.sleep(0.05)
        yield Started(running, outputs, [int(file.read_text()) for file in files])
    finally:
        for process in running:
            process.kill()
            process.wait()


def wait_for(words: str, ranks: Started, *, seconds: float) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := re.search(words, ranks.said()):
            return found.group()
        time.sleep(0.1)
    raise AssertionError(ranks.said())


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_is_stopped_is_named_in_time_and_ends_the_others(tmp_path: Path, silent: int) -> None:
    with started("meet", tmp_path, world_size=3) as ranks:
        time.sleep(1)
        os.kill(ranks.pids[silent], signal.SIGSTOP)
        sentence = wait_for(r"(?m)^rank.*; ending the run$", ranks, seconds=SECONDS)
        words = (
            rf"rank {silent} \(host \S+\) has not answered for 0.2 minutes \(timeout_minutes 0.2\), "
            r"last seen after step \d+; ending the run"
        )
        assert re.fullmatch(words, sentence)
        for rank, process in enumerate(ranks.running):
            if rank != silent:
                assert process.wait(timeout=5) == 1
        assert ranks.said().count("ending the run") == 1


@pytest.mark.slow
def test_a_rank_that_spins_outside_of_collectives_is_named_with_its_place(tmp_path: Path) -> None:
    with started("spin", tmp_path) as ranks:
        words = (
            r"(?m)^rank 1 \(host \S+\) is at zero/watch_on_ranks\.py:\d+, and the others have waited for 0\.2 minutes "
            r"\(timeout_minutes 0\.2\) after step 3; ending the run$"
        )
        wait_for(words, ranks, seconds=SECONDS)
        assert [process.wait(timeout=5) for process in ranks.running] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["work alone", "leave late"])
def test_long_work_and_ends_at_different_times_raise_no_alarm(tmp_path: Path, behaviour: str) -> None:
    for text in run_ranks([SCRIPT, str(MINUTES), behaviour, str(tmp_path)], world_size=2, timeout=120):
        assert "ending the run" not in text
        assert "does not answer" not in text
        assert text.splitlines()[-1] == "left"
