"""Runs are killed, interrupted and started again by the same command line: the end is that of a run left alone."""

import random
import signal
import time
from pathlib import Path

import pytest

from goat_ds.train.signals import ECHO_S
from tests.forked_ranks import CrashPlan
from tests.launching import REPOSITORY
from tests.train.faults import (
    FAULTS,
    KILL_ALL,
    KILL_IN_RESUME,
    KILL_IN_SAVE,
    KILL_ONE,
    SECOND_SIGTERM,
    SIGNALS,
    Fault,
    Laboratory,
    assert_same_end,
    copy_of,
    steps_logged,
    steps_saved,
)

SAVE_STEPS = 2
LAST = 8
SEED = 0


class Uninterrupted:
    """A run that was left alone; what it takes."""

    def __init__(self, laboratory: Laboratory) -> None:
        # The first run fills the caches.
        laboratory.finish(laboratory.folder())
        self.folder = laboratory.folder()
        began = time.monotonic()
        run = laboratory.start(self.folder, crash=CrashPlan(at=0))
        assert run.wait() == [0, 0], run.output()
        self.seconds = time.monotonic() - began
        self.events = run.touches()
        saves = len(steps_saved(self.folder))
        self.touches = len(run.touches()) // saves
        assert saves == LAST // SAVE_STEPS and self.touches * saves == len(run.touches())


@pytest.fixture(scope="module")
def uninterrupted(laboratory: Laboratory) -> Uninterrupted:
    return Uninterrupted(laboratory)


@pytest.mark.slow
def test_every_file_of_a_checkpoint_is_on_the_disk_before_its_folder_gets_its_name(
    uninterrupted: Uninterrupted,
) -> None:
    for step in steps_saved(uninterrupted.folder):
        folder = uninterrupted.folder / f"checkpoint-{step}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        before = uninterrupted.events[: uninterrupted.events.index(f"os.rename {temporary}")]
        written = {temporary, *(temporary / path.relative_to(folder) for path in folder.rglob("*"))}
        assert {f"os.fsync {path}" for path in written} <= set(before)


@pytest.mark.slow
def test_a_writer_killed_anywhere_inside_a_save_loses_the_steps_since_the_last_one(
    laboratory: Laboratory, uninterrupted: Uninterrupted
) -> None:
    folder = laboratory.folder()
    # The last instant is the touch after which the folder has its name.
    instants = random.Random(SEED).sample(range(2, uninterrupted.touches), KILL_IN_SAVE.times - 2)
    for number, instant in enumerate([1, *instants, uninterrupted.touches]):
        before = steps_saved(folder)
        # Now in its first save, of which nothing is left, now in its second, so that the run gets on.
        gets_on = number % 7 == 6
        plan = CrashPlan(at=instant + uninterrupted.touches * gets_on)
        run = laboratory.start(folder, crash=plan)
        assert -signal.SIGKILL in run.wait(), run.output()
        assert len(run.touches()) == plan.at
        after = (before[-1] if before else 0) + SAVE_STEPS
        assert steps_saved(folder) == before + [after] * gets_on
    laboratory.finish(folder)
    assert_same_end(folder, uninterrupted.folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [KILL_ONE, KILL_ALL], ids=["one rank", "all ranks"])
def test_ranks_killed_at_any_time_leave_a_run_that_ends_as_if_left_alone(
    fault: Fault, laboratory: Laboratory, uninterrupted: Uninterrupted
) -> None:
    chance, folder, kills = random.Random(SEED), laboratory.folder(), 0
    while kills < fault.times:
        before = steps_saved(folder)
        run = laboratory.start(folder)
        time.sleep(chance.uniform(0, uninterrupted.seconds))
        victim = chance.randrange(2)
        run.kill_all() if fault is KILL_ALL else run.kill(victim)
        codes = run.wait()
        kills += -signal.SIGKILL in codes
        assert steps_saved(folder)[: len(before)] == before
        if steps_saved(folder)[-1:] == [LAST]:
            laboratory.finish(folder)
            assert_same_end(folder, uninterrupted.folder)
            folder = laboratory.folder()
    laboratory.finish(folder)
    assert_same_end(folder, uninterrupted.folder)


@pytest.mark.slow
def test_a_rank_killed_while_it_reads_a_checkpoint_leaves_the_checkpoint_whole(
    laboratory: Laboratory, uninterrupted: Uninterrupted
) -> None:
    folder = laboratory.folder()
    laboratory.start(folder, crash=CrashPlan(at=uninterrupted.touches + 1)).wait()
    assert steps_saved(folder) == [SAVE_STEPS]
    for number in range(KILL_IN_RESUME.times):
        plan = CrashPlan(at=1 + 2 * number, rank=0, prefix="checkpoint-")
        run = laboratory.start(folder, crash=plan)
        assert -signal.SIGKILL in run.wait(), run.output()
        assert len(run.touches()) == plan.at
        assert steps_saved(folder) == [SAVE_STEPS]
    laboratory.finish(folder)
    assert_same_end(folder, uninterrupted.folder)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_running_step_and_the_run_goes_on_from_it(
    number: signal.Signals, to_all: bool, laboratory: Laboratory, uninterrupted: Uninterrupted
) -> None:
    folder = laboratory.folder()
    run = laboratory.start(folder)
    run.wait_until(lambda: steps_logged(folder) >= 3)
    run.kill_all(number) if to_all else run.kill(1, number)
    assert run.wait() == [75, 75], run.output()
    assert f"{number.name}: stopped after step {steps_logged(folder)} and saved" in run.output()
    assert steps_saved(folder)[-1] == steps_logged(folder) < LAST
    laboratory.finish(folder)
    assert_same_end(folder, uninterrupted.folder)


def test_as_many_signals_are_sent_as_the_readme_says() -> None:
    assert SIGNALS.times == 2 * 2 and SECOND_SIGTERM.times == 1


@pytest.mark.slow
def test_a_second_sigterm_ends_a_slow_save_at_once_and_every_checkpoint_is_whole(
    laboratory: Laboratory, uninterrupted: Uninterrupted
) -> None:
    folder = laboratory.folder()
    run = laboratory.start(folder, crash=CrashPlan(at=uninterrupted.touches + 5, signal=None, pause=60))
    run.wait_until(lambda: len(run.touches()) == uninterrupted.touches + 5)
    run.kill_all(signal.SIGTERM)
    time.sleep(0.2)
    # A launcher passes on what the cluster has sent to every process.
    run.kill_all(signal.SIGTERM)
    time.sleep(ECHO_S)
    assert run.codes() == [None, None]
    run.kill_all(signal.SIGTERM)
    assert run.wait(seconds=10) == [143, 143], run.output()
    assert steps_saved(folder) == [SAVE_STEPS]
    laboratory.finish(folder)
    assert_same_end(folder, uninterrupted.folder)


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(laboratory: Laboratory, uninterrupted: Uninterrupted) -> None:
    folder = copy_of(uninterrupted.folder, laboratory)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = laboratory.finish(folder)
    assert f"all {LAST} steps are done" in run.output()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_page_on_reliability_lists_every_fault_and_no_other() -> None:
    page = Path(REPOSITORY / "docs" / "reliability.md").read_text()
    table = page[page.index("| fault | times | what is lost |") :].split("\n\n")[0]
    assert table.splitlines()[2:] == [fault.row() for fault in FAULTS]
