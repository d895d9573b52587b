"""Who holds up a run is told from what the ranks say of themselves, and work that nobody waits for is left alone."""

import threading
import time

import pytest

from goat_ds.distributed.main_thread import MainThread
from goat_ds.distributed.verdict import Beat, Patience, verdict

PATIENCE = Patience(timeout_s=1800, period_s=5)
LONG, SHORT = 1790.0, 10.0


def beat(
    place: str = "data/a.py:1", *, waits: bool = False, stood_s: float = 0, step: int = 7, has_left: bool = False
) -> Beat:
    return Beat(1, "here", step, place, waits, stood_s, has_left)


def told(*beats: Beat, silent_s: tuple[float, ...] = (0, 0, 0)) -> str:
    return verdict(dict(enumerate(beats)), dict(enumerate(silent_s)), patience=PATIENCE)


WAITING = beat("zero/b.py:2", waits=True, stood_s=LONG)


def test_a_beat_survives_the_store() -> None:
    assert Beat.of(WAITING.text().encode()) == WAITING


@pytest.mark.parametrize(
    "beats",
    [
        (beat(stood_s=LONG), beat(stood_s=LONG), beat()),
        (beat(stood_s=LONG), beat(waits=True, stood_s=SHORT), beat(waits=True, stood_s=SHORT)),
        (WAITING._replace(has_left=True), beat(), beat()),
    ],
)
def test_long_work_that_nobody_waits_long_for_is_no_standstill(beats: tuple[Beat, ...]) -> None:
    assert not told(*beats)


def test_a_silent_rank_is_named_and_not_those_that_wait_for_it() -> None:
    for silent_s in (LONG, LONG - 100):
        sentence = told(WAITING, beat(), WAITING, silent_s=(0, silent_s, 0))
        assert sentence.startswith("rank 1 (host here) has not answered for ")
        assert sentence.endswith(" minutes (timeout_minutes 30), last seen after step 7; ending the run")


def test_the_rank_that_is_waited_for_is_named_with_its_place() -> None:
    sentence = told(WAITING, beat(stood_s=LONG), WAITING)
    assert sentence.startswith("rank 1 (host here) is at data/a.py:1, and the others have waited for 29.8 minutes")
    # On an accelerator any place may be one of waiting, and the rank that moves is the one that is waited for.
    assert told(WAITING, beat(waits=True, stood_s=SHORT), WAITING) == sentence
    assert told(WAITING, beat(has_left=True), WAITING).startswith("rank 1 (host here) is at its end, and the others")


def test_where_all_wait_the_place_of_the_fewest_comes_first() -> None:
    sentence = told(WAITING, WAITING, beat("zero/c.py:3", waits=True, stood_s=LONG, step=0))
    assert sentence == (
        "all ranks have waited for 29.8 minutes (timeout_minutes 30) after step 7: rank 2 (host here) is at "
        "zero/c.py:3; rank 0 (host here), rank 1 (host here) are at zero/b.py:2; ending the run"
    )


def test_many_silent_ranks_are_counted() -> None:
    everyone = dict.fromkeys(range(9), beat(step=0))
    sentence = verdict(everyone, dict.fromkeys(range(9), LONG), patience=PATIENCE)
    assert "rank 3 (host here) and 5 more have not answered" in sentence
    assert "last seen before the first step" in sentence


def test_a_main_thread_stands_in_one_call_and_moves_with_the_next_of_the_same_function() -> None:
    stood: list[float] = []
    looked = threading.Lock()
    looked.acquire()

    def look() -> None:
        main_thread = MainThread(period_s=1)
        for num_looks in (3, 1):
            time.sleep(0.2)
            for _ in range(num_looks):
                stood.append(main_thread.look().stood_s)
                time.sleep(0.01)
            looked.release()

    def wait() -> None:
        # A lock is waited for in C, so the innermost frame is the one of this call.
        looked.acquire()

    thread = threading.Thread(target=look)
    thread.start()
    wait()
    wait()
    thread.join()
    assert stood[0] == 0 and 0 < stood[1] < stood[2]
    assert stood[3] == 0
