"""End a run in which ranks would wait for one that no longer goes on, with a sentence that names it.

A collective's own timeout says that this rank waited, not for whom. Here a thread of every rank tells a store on the
first rank, every few seconds, that the rank is alive and where its main thread is. The first rank looks at all of them,
every other rank at the first. Whoever sees that the run is held up (``distributed.verdict``) says so, on one rank a node,
and every rank that still runs ends with exit code 1.
"""

import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from goat_ds.distributed import ranks
from goat_ds.distributed.main_thread import MainThread, RunningClock
from goat_ds.distributed.verdict import Beat, Patience, silence, verdict
from goat_ds.errors import TrainingError

LONGEST_PERIOD_S = 5.0
PERIODS = 30
"""Beats within a timeout that is short."""
CONNECT_S = 60.0
"""Seconds for a first connection to the store."""
GOODBYE_S = 5.0
"""Seconds the first rank waits for the goodbye of slower ones."""
VERDICT = "verdict"


class Watch:
    """What the main thread tells its watcher."""

    step = 0
    """Last step that is done."""

    def step_done(self, step: int) -> None:
        """Say which step is done, for the sentence that names it."""
        self.step = step


@contextmanager
def watching(*, address: str, timeout_minutes: float) -> Iterator[Watch]:
    """Watch the ranks of a process group until the block ends. A collective at its start.

    Args:
        address: Where the other ranks find the first one.
        timeout_minutes: Within which a rank that stops going on ends all of them.

    Raises:
        TrainingError: a rank cannot connect to the first one's store.
    """
    watch = Watch()
    if ranks.get_world_size() == 1:
        # Nobody waits for it.
        yield watch
        return
    watcher = _Watcher(watch, address=address, timeout_s=timeout_minutes * 60)
    try:
        yield watch
    except BaseException:
        # This rank dies, and whoever waits for it shall hear of it: so no goodbye.
        watcher.stop()
        raise
    watcher.stop()
    watcher.say_goodbye()


class _Watcher:
    """The two threads of a rank: one may be held up by the store, the other never is."""

    def __init__(self, watch: Watch, *, address: str, timeout_s: float) -> None:
        self._watch, self._address = watch, address
        self._period_s = min(LONGEST_PERIOD_S, timeout_s / PERIODS)
        self._patience = Patience(timeout_s, self._period_s)
        self._main_thread = MainThread(period_s=self._period_s)
        self._host = platform.node()
        self._num_beats = 0
        # Collectives of an accelerator return before they are done: what waits for them can be anywhere.
        self._waits_anywhere = ranks.device().type != "cpu"
        self._server = self._serve() if ranks.is_first() else None
        self._port = int(ranks.max_over_ranks(self._server.port if self._server else 0))
        self._store: TCPStore | None = None
        self._beats: dict[int, Beat] = {}
        self._verdict, self._trouble = "", ""
        self._stopping, self._told = threading.Event(), threading.Event()
        self._watched = range(ranks.get_world_size()) if ranks.is_first() else range(1)
        # Two collectives: nobody listens before everybody has told something.
        ranks.agree(self._first_beat)
        ranks.agree(self._listen)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    def _serve(self) -> TCPStore:
        server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=CONNECT_S))
        server.set(VERDICT, "")
        return server

    def _connect(self, *, seconds: float) -> TCPStore:
        # A plain connection first: a TCPStore that finds nobody fills the screen.
        socket.create_connection((self._address, self._port), timeout=seconds).close()
        return TCPStore(self._address, self._port, is_master=False, timeout=timedelta(seconds=CONNECT_S))

    def _first_beat(self) -> None:
        try:
            self._store = self._server or self._connect(seconds=CONNECT_S)
            self._beat()
        except (DistError, OSError) as error:
            raise TrainingError(
                f"the first rank's store at {self._address}:{self._port} does not answer, so that ranks could not be "
                f"watched: {error}"
            ) from error

    # -- the thread that talks to the store, which may keep it waiting for ever

    def _talk(self) -> None:
        while not self._stopping.wait(self._period_s):
            try:
                if self._store is None:
                    self._store = self._connect(seconds=self._period_s)
                self._beat()
                self._listen()
                self._trouble = ""
            except (DistError, OSError) as error:
                self._store = self._server
                self._had_trouble(error)

    def _beat(self, *, has_left: bool = False) -> None:
        assert self._store is not None
        self._num_beats += 1
        sight = self._main_thread.look()
        beat = Beat(
            number=self._num_beats,
            host=self._host,
            step=self._watch.step,
            place=sight.place,
            waits=sight.in_collective or self._waits_anywhere,
            stood_s=sight.stood_s,
            has_left=has_left,
        )
        self._store.set(_key(ranks.get_rank()), beat.text())

    def _listen(self) -> None:
        assert self._store is not None
        if self._verdict and ranks.is_first():
            self._store.set(VERDICT, self._verdict)
            self._told.set()
        told, *texts = self._store.multi_get([VERDICT, *map(_key, self._watched)])
        self._beats = {rank: Beat.of(text) for rank, text in zip(self._watched, texts, strict=True)}
        if told and not ranks.is_first():
            self._end(told.decode(), speaks=ranks.is_first_on_node())

    def _had_trouble(self, error: Exception) -> None:
        if not self._trouble:
            _say(f"rank {ranks.get_rank()}: the first rank's store does not answer, trying again: {error}")
        self._trouble = str(error)

    # -- the thread that judges

    def _judge(self) -> None:
        clock = RunningClock(most_s=2 * self._period_s)
        silent_s = dict.fromkeys(self._watched, 0.0)
        numbers = dict.fromkeys(self._watched, 0)
        while not self._stopping.wait(self._period_s):
            passed, beats = clock.since_last(), self._beats
            for rank, beat in beats.items():
                answers = beat.has_left or beat.number != numbers[rank]
                silent_s[rank] = 0.0 if answers else silent_s[rank] + passed
                numbers[rank] = beat.number
            if found := self._found(beats, silent_s):
                # Where the first rank is silent, its node has nobody else to say so.
                self._end(found, speaks=ranks.is_first_on_node() or ranks.get_rank() == 1)

    def _found(self, beats: dict[int, Beat], silent_s: dict[int, float]) -> str:
        if ranks.is_first():
            return verdict(beats, silent_s, patience=self._patience)
        return silence(beats, silent_s, enough_s=self._patience.limit_s, patience=self._patience)

    def _end(self, sentence: str, *, speaks: bool) -> None:
        """End this rank, once the others can know why."""
        if speaks:
            _say(sentence)
        if ranks.is_first():
            self._verdict = sentence
            self._told.wait(3 * self._period_s)
        # The others read it before the store is gone; and a launcher ends all ranks as soon as one has ended.
        time.sleep(2 * self._period_s if speaks else 3 * self._period_s)
        os._exit(1)

    # -- the end, in the main thread

    def stop(self) -> None:
        """End the threads; one that the store keeps waiting ends with the process."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(self._period_s)

    def say_goodbye(self) -> None:
        """Tell the others that this rank's silence is no trouble; the first rank hears them out before it goes."""
        if self._store is None or self._threads[0].is_alive():
            return
        try:
            self._beat(has_left=True)
            until = time.monotonic() + 2 * self._period_s + GOODBYE_S
            while ranks.is_first() and time.monotonic() < until:
                self._listen()
                if all(beat.has_left for beat in self._beats.values()):
                    return
                time.sleep(self._period_s / 10)
        except (DistError, OSError) as error:
            self._had_trouble(error)


def _key(world_rank: int) -> str:
    return f"beat/{world_rank}"


def _say(sentence: str) -> None:
    print(f"\n{sentence}\n", file=sys.stderr, flush=True)
