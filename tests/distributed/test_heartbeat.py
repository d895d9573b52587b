"""A rank that no longer goes on ends all of them in time, by its name; one that works or leaves ends nobody."""

import json
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from goat_ds.distributed import heartbeat
from goat_ds.distributed.heartbeat import Beat, Observer, Verdict, judge
from tests.forked_ranks import Run
from tests.launching import run_ranks, start_ranks

LONG, SHORT = 1790.0, 10.0


def beat(world: int = 5, *, step: int = 7, has_left: bool = False, **groups: int) -> Beat:
    return Beat(1, "here", step, {"world": world} | groups, has_left)


def told(*beats: Beat, silent_s: tuple[float, ...] = (0, 0, 0), stood_s: tuple[float, ...] = (LONG, LONG, LONG)) -> str:
    times = {"silent_s": dict(enumerate(silent_s)), "stood_s": dict(enumerate(stood_s))}
    found = judge(dict(enumerate(beats)), **times, timeout_s=1800)
    return found.sentence if found else ""


BEHIND, AHEAD = beat(5), beat(6)


def test_a_beat_and_a_verdict_survive_the_store() -> None:
    verdict = Verdict("rank 1 is late", [1])
    assert Beat(*json.loads(json.dumps(AHEAD))) == AHEAD and Verdict(*json.loads(json.dumps(verdict))) == verdict


@pytest.mark.parametrize(
    ("beats", "stood_s"),
    [
        # All work, or all are in one collective, which has a timeout of its own.
        ((AHEAD, AHEAD, AHEAD), (LONG, LONG, SHORT)),
        ((BEHIND, AHEAD, AHEAD), (LONG, SHORT, SHORT)),
        ((AHEAD._replace(has_left=True), BEHIND, BEHIND), (LONG, SHORT, SHORT)),
        # Of a group that a rank is not in, it has started nothing.
        ((beat(small=9), beat(small=9), beat()), (LONG, LONG, LONG)),
    ],
)
def test_long_work_that_nobody_waits_long_for_is_no_standstill(
    beats: tuple[Beat, ...], stood_s: tuple[float, ...]
) -> None:
    assert not told(*beats, stood_s=stood_s)


def test_a_silent_rank_is_named_and_not_those_that_wait_for_it() -> None:
    for silent_s in (LONG, LONG - 100):
        sentence = told(AHEAD, BEHIND, AHEAD, silent_s=(0, silent_s, 0))
        assert sentence.startswith("rank 1 (host here) has not answered for ")
        assert sentence.endswith(" minutes (timeout_minutes 30), last seen after step 7; ending the run")


def test_the_rank_that_is_waited_for_is_named_whether_it_stands_moves_or_has_left() -> None:
    sentence = told(AHEAD, BEHIND, AHEAD)
    assert sentence == (
        "rank 1 (host here) has not entered the collective that others have waited in for 29.8 minutes "
        "(timeout_minutes 30), after step 7; ending the run"
    )
    # It goes on in another group.
    assert told(beat(6, small=3), beat(5, small=3), AHEAD, stood_s=(LONG, SHORT, SHORT)) == sentence
    left = told(AHEAD, BEHIND._replace(has_left=True), AHEAD)
    assert left == sentence.replace("(host here)", "(host here, at its end)")


def test_a_rank_that_is_behind_because_it_waits_in_a_smaller_group_is_innocent() -> None:
    first = told(beat(6, left=4), beat(6, left=4), beat(5, right=4), beat(5, right=3), **four_ranks())
    assert first.startswith("rank 3 (host here) has not entered the collective")
    both = told(beat(6, left=4), beat(6, left=4), beat(5, right=3), beat(5, right=3), **four_ranks())
    assert both.startswith("rank 2 (host here), rank 3 (host here) have not entered the collective")


def four_ranks() -> dict[str, tuple[float, ...]]:
    return {"silent_s": (0, 0, 0, 0), "stood_s": (LONG, LONG, SHORT, SHORT)}


def test_many_silent_ranks_are_counted() -> None:
    everyone = dict.fromkeys(range(9), beat(step=0))
    long = dict.fromkeys(range(9), LONG)
    found = judge(everyone, silent_s=long, stood_s=long, timeout_s=1800)
    assert found is not None
    assert "rank 3 (host here) and 5 more have not answered" in found.sentence
    assert "last seen before the first step" in found.sentence
    # These print their stacks.
    assert found.named == [0, 1, 2, 3]


def test_a_rank_stands_until_it_starts_a_collective_and_is_silent_until_it_beats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = Clock(monkeypatch)
    seen = Observer([0], period_s=5)
    for number, world, passed in [(1, 5, 5.0), (2, 5, 5.0), (2, 5, 4.0), (3, 5, 5.0), (3, 6, 5.0)]:
        now.seconds += passed
        seen.look({0: beat(world)._replace(number=number)})
        now.seen.append((seen.silent_s[0], seen.stood_s[0]))
    assert now.seen == [(0, 0), (0, 5), (4, 9), (0, 14), (5, 0)]


def test_a_pause_of_the_process_that_judges_counts_less(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    seen = Observer([0], period_s=5)
    for passed in (5, 5, 3600):
        now.seconds += passed
        seen.look({0: AHEAD})
    assert (seen.silent_s[0], seen.stood_s[0]) == (15, 15)


def test_a_goodbye_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock(monkeypatch)
    seen = Observer([0], period_s=5)
    for _ in range(3):
        now.seconds += 5
        seen.look({0: AHEAD._replace(has_left=True)})
    assert seen.silent_s[0] == 0


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.seen = 0.0, list[tuple[float, float]]()
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.seconds)


def test_a_group_whose_backend_does_not_count_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        def __init__(self, name: str, count: int | None) -> None:
            self.group_name, self._count = name, count

        def _get_sequence_number_for_group(self) -> int:
            if self._count is None:
                raise RuntimeError("ProcessGroup custom does not yet support sequence numbers.")
            return self._count

    monkeypatch.setattr(heartbeat, "_world", SimpleNamespace(pg_map={Group("0", 7): None, Group("1", None): None}))
    assert heartbeat.collectives_started() == {"0": 7}


# -- on ranks

SCRIPT = "tests/distributed/heartbeat_on_ranks.py"
MINUTES = 0.2
SECONDS = 60 * MINUTES


@pytest.mark.slow
def test_torch_counts_every_kind_of_collective_in_its_own_group(tmp_path: Path) -> None:
    first, second = (
        json.loads(text.splitlines()[-1]) for text in run_ranks([SCRIPT, "2", "count", str(tmp_path)], world_size=2)
    )
    (world,), (twin,) = first["all_reduce"], first["of another group"]
    for raised in (first, second):
        (alone,) = raised.pop("of its own group")
        assert raised.pop("of another group") == {twin: 1}
        assert {name for kind in raised.values() for name in kind} == {world}
        assert alone not in (world, twin)
    # Objects are sent as their size and their bytes.
    assert first == second == {kind: {world: 2 if "object" in kind else 1} for kind in first}


@contextmanager
def started(behaviour: str, folder: Path, *, world_size: int) -> Iterator[Run]:
    """Start ranks and wait until all are watched; none is left behind."""
    run = start_ranks([SCRIPT, str(MINUTES), behaviour, str(folder)], world_size=world_size, folder=folder)
    try:
        files = [folder / f"{rank}.watched" for rank in range(world_size)]
        run.wait_until(lambda: all(file.exists() for file in files), seconds=120)
        yield run
    finally:
        run.kill_all()


def wait_for(words: str, run: Run, *, seconds: float) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := re.search(words, run.output()):
            return found.group()
        time.sleep(0.1)
    raise AssertionError(run.output())


def wait_for_codes(run: Run, expected: list[int | None], *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while run.codes() != expected:
        assert time.monotonic() < until, f"{run.codes()}\n{run.output()}"
        time.sleep(0.05)


STACKS = "is here, in each of its threads:"


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_is_stopped_is_named_in_time_and_ends_the_others(tmp_path: Path, silent: int) -> None:
    with started("meet", tmp_path, world_size=3) as run:
        time.sleep(1)
        run.kill(silent, signal.SIGSTOP)
        sentence = wait_for(r"(?m)^rank.*; ending the run$", run, seconds=SECONDS)
        words = (
            rf"rank {silent} \(host \S+\) has not answered for 0.2 minutes \(timeout_minutes 0.2\), "
            r"last seen after step \d+; ending the run"
        )
        assert re.fullmatch(words, sentence)
        wait_for_codes(run, [None if rank == silent else 1 for rank in range(3)], seconds=5)
        assert run.output().count("ending the run") == run.output().count(STACKS) == 1


@pytest.mark.slow
def test_a_rank_that_spins_outside_of_collectives_is_named_and_shows_where_it_is(tmp_path: Path) -> None:
    with started("spin", tmp_path, world_size=3) as run:
        words = (
            r"(?m)^rank 2 \(host \S+\) has not entered the collective that others have waited in for 0\.2 minutes "
            r"\(timeout_minutes 0\.2\), after step 3; ending the run$"
        )
        wait_for(words, run, seconds=SECONDS)
        wait_for_codes(run, [1, 1, 1], seconds=5)
        first, second, third = run.outputs()
        # Each node's first rank and the named one: the stacks of thousands would hide those.
        assert f"rank 0 {STACKS}" in first and "in meet" in first
        assert STACKS not in second
        assert f"rank 2 {STACKS}" in third and "in spin\n" in third


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", ["work alone", "leave late"])
def test_long_work_and_ends_at_different_times_raise_no_alarm(tmp_path: Path, behaviour: str) -> None:
    for text in run_ranks([SCRIPT, str(MINUTES), behaviour, str(tmp_path)], world_size=2, timeout=120):
        assert "ending the run" not in text
        assert "does not answer" not in text
        assert text.splitlines()[-1] == "left"
