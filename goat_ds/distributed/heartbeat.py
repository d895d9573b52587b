"""End a run in which ranks would wait for one that no longer goes on, with a sentence that names it.

A collective's own timeout says that this rank waited, not for whom. Here a thread of every rank tells a store on the
first rank, every few seconds, that the rank is alive and how many collectives it has started in each process group.
The first rank judges all ranks, every other rank judges the first:

- A rank whose beats stop is *silent*.
- A rank is *late* if another rank of one of its groups has started more collectives there, and has started none since
  for nearly the whole timeout. A rank that is behind and has others behind it, in whatever group, is not late: all
  ranks enter their collectives in the same order, so it waits as well, for those others.

Ranks with equal counts hold up nobody, however long they start nothing: they work, or all are in one collective that a
lost network holds up, and then beats stop as well or the process group's own timeout, a tenth longer, ends the run.
That a rank that is ahead waits is assumed, not seen: after a broadcast, say, its source may go on alone.

One rank a node says the sentence. That rank and the named ones also print the stacks of their threads, and every rank
that still runs ends with exit code 1.
"""

import faulthandler
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _world

from goat_ds.distributed import ranks
from goat_ds.errors import TrainingError

LONGEST_PERIOD_S = 5.0
"""Seconds between beats, at most."""
PERIODS = 30
"""Beats within a timeout, at least."""
SPARE_PERIODS = 5
"""Beats that are left of the timeout to say who holds up the run."""
CONNECT_S = 60.0
"""Seconds for a first connection to the store."""
GOODBYE_S = 5.0
"""Seconds the first rank waits for the goodbye of slower ones."""
MOST_NAMED = 4
"""Ranks that a sentence names; it counts the rest."""
VERDICT = "verdict"


class Beat(NamedTuple):
    """What a rank tells the others every few seconds."""

    number: int
    """Changes with every beat."""
    host: str
    step: int
    """Last step it has finished; 0 before the first."""
    started: dict[str, int]
    """Collectives it has started, by the name of the group."""
    has_left: bool = False
    """Whether it has come to its end and beats no more."""


def period_s(timeout_s: float) -> float:
    """Return the seconds between beats."""
    return min(LONGEST_PERIOD_S, timeout_s / PERIODS)


class Verdict(NamedTuple):
    """Why the run ends."""

    sentence: str
    named: list[int]
    """Ranks that the sentence names."""


def judge(
    beats: Mapping[int, Beat], *, silent_s: Mapping[int, float], stood_s: Mapping[int, float], timeout_s: float
) -> Verdict | None:
    """Return which ranks hold up the run, or None.

    Args:
        beats: Last beat of each rank.
        silent_s: Seconds since then.
        stood_s: Seconds since each rank has started a collective.
        timeout_s: Seconds within which the run is to end.
    """
    limit_s = timeout_s - SPARE_PERIODS * period_s(timeout_s)
    standing = [rank for rank, beat in beats.items() if stood_s[rank] >= limit_s and not beat.has_left]
    waits_for = {rank: behind for rank in standing if (behind := _behind(rank, beats))}
    # A rank that waits for a silent one may reach the limit a moment before the silence does.
    enough_s = limit_s / 2 if waits_for else limit_s
    if silent := [rank for rank, seconds in silent_s.items() if seconds >= enough_s]:
        took = _minutes(max(silent_s[rank] for rank in silent), timeout_s)
        last = _after(max(beats[rank].step for rank in silent))
        return _verdict(silent, beats, f"not answered for {took}, last seen {last}")
    if late := [rank for rank in sorted(set().union(*waits_for.values())) if not _behind(rank, beats)]:
        took = _minutes(max(stood_s[rank] for rank in waits_for), timeout_s)
        last = _after(max(beat.step for beat in beats.values()))
        return _verdict(late, beats, f"not entered the collective that others have waited in for {took}, {last}")
    return None


def _behind(rank: int, beats: Mapping[int, Beat]) -> set[int]:
    """Return the ranks that have started fewer collectives than ``rank`` in a group of both."""
    started = beats[rank].started.items()
    return {r for r, beat in beats.items() if any(beat.started.get(name, num) < num for name, num in started)}


def _verdict(named: Sequence[int], beats: Mapping[int, Beat], what: str) -> Verdict:
    first, more = named[:MOST_NAMED], len(named[MOST_NAMED:])
    names = [f"rank {r} (host {beats[r].host}{', at its end' if beats[r].has_left else ''})" for r in first]
    who = ", ".join(names) + (f" and {more} more" if more else "")
    return Verdict(f"{who} {'has' if len(named) == 1 else 'have'} {what}; ending the run", list(first))


def _minutes(seconds: float, timeout_s: float) -> str:
    return f"{seconds / 60:.1f} minutes (timeout_minutes {timeout_s / 60:g})"


def _after(step: int) -> str:
    return f"after step {step}" if step else "before the first step"


def collectives_started() -> dict[str, int]:
    """Return how many collectives this process has started in each of its groups, by the group's name.

    A group whose backend does not count is left out: of its ranks only silence is noticed.
    """
    started: dict[str, int] = {}
    for group in list(_world.pg_map):
        with suppress(RuntimeError):
            started[group.group_name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return started


class Observer:
    """Measures for how long each rank has been silent, and for how long it has started no collective.

    A look that comes far too late, because this process was stopped, counts as two periods.
    """

    def __init__(self, watched: Collection[int], *, period_s: float) -> None:
        self._longest_s, self._looked_at, self._last = 2 * period_s, time.monotonic(), dict[int, Beat]()
        self.silent_s, self.stood_s = dict.fromkeys(watched, 0.0), dict.fromkeys(watched, 0.0)

    def look(self, beats: Mapping[int, Beat]) -> None:
        """Compare each rank's last beat with the one of the look before."""
        looked_at, self._looked_at = self._looked_at, time.monotonic()
        passed = min(self._looked_at - looked_at, self._longest_s)
        for rank, beat in beats.items():
            last = self._last.get(rank, beat._replace(number=0, started={}))
            is_silent = last.number == beat.number and not beat.has_left
            self.silent_s[rank] = self.silent_s[rank] + passed if is_silent else 0.0
            self.stood_s[rank] = self.stood_s[rank] + passed if last.started == beat.started else 0.0
        self._last = dict(beats)


class Watch:
    """What the main thread tells its watcher."""

    step = 0
    """Last step that is done."""

    def step_done(self, step: int) -> None:
        """Note which step is done, for the sentence that names it."""
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
        # This rank dies, and the ranks that wait for it are to notice: so no goodbye.
        watcher.stop()
        raise
    watcher.stop()
    watcher.say_goodbye()


class _Watcher:
    """The two threads of a rank: the store may hold up one of them, and never the other."""

    def __init__(self, watch: Watch, *, address: str, timeout_s: float) -> None:
        self._watch, self._address = watch, address
        self._timeout_s, self._period_s = timeout_s, period_s(timeout_s)
        self._num_beats = 0
        self._server = self._serve() if ranks.is_first() else None
        self._port = int(ranks.max_over_ranks(self._server.port if self._server else 0))
        self._store: TCPStore | None = None
        self._beats: dict[int, Beat] = {}
        self._verdict: Verdict | None = None
        self._trouble = ""
        self._stopping, self._sent = threading.Event(), threading.Event()
        self._watched = range(ranks.get_world_size() if ranks.is_first() else 1)
        # Two collectives: every rank has beaten before one listens.
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
        beat = Beat(self._num_beats, platform.node(), self._watch.step, collectives_started(), has_left)
        self._store.set(_key(ranks.get_rank()), json.dumps(beat))

    def _listen(self) -> None:
        assert self._store is not None
        if self._verdict and ranks.is_first():
            self._store.set(VERDICT, json.dumps(self._verdict))
            self._sent.set()
        verdict, *texts = self._store.multi_get([VERDICT, *map(_key, self._watched)])
        self._beats = {rank: Beat(*json.loads(text)) for rank, text in zip(self._watched, texts, strict=True)}
        if verdict and not ranks.is_first():
            self._end(Verdict(*json.loads(verdict)), speaks=ranks.is_first_on_node())

    def _had_trouble(self, error: Exception) -> None:
        if not self._trouble:
            _say(f"rank {ranks.get_rank()}: the first rank's store does not answer, trying again: {error}")
        self._trouble = str(error)

    # -- the thread that judges

    def _judge(self) -> None:
        seen = Observer(self._watched, period_s=self._period_s)
        while not self._stopping.wait(self._period_s):
            beats = self._beats
            seen.look(beats)
            found = judge(beats, silent_s=seen.silent_s, stood_s=seen.stood_s, timeout_s=self._timeout_s)
            if found:
                # Where the first rank is silent, nobody else on its node says so.
                self._end(found, speaks=ranks.is_first_on_node() or ranks.get_rank() == 1)

    def _end(self, found: Verdict, *, speaks: bool) -> None:
        """End this rank, once the others can know why."""
        self._verdict = found
        if speaks:
            _say(found.sentence)
        if speaks or ranks.get_rank() in found.named:
            _say(f"rank {ranks.get_rank()} is here, in each of its threads:")
            faulthandler.dump_traceback()
        if ranks.is_first():
            self._sent.wait(3 * self._period_s)
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
        """Beat once more, to say that this rank's silence is no trouble; the first rank waits for all goodbyes."""
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
