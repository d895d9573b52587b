"""Decide from what the ranks tell about themselves whether one of them holds up the run, and say which."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MOST_NAMED = 4
"""Ranks, and places, that a sentence names; of more it gives the number."""


class Beat(NamedTuple):
    """What a rank tells about itself every few seconds."""

    number: int
    """Changes with every beat."""
    host: str
    step: int
    """Last step it has finished; 0 before the first."""
    place: str
    """Where its main thread is."""
    waits: bool
    """Whether the main thread may be waiting for other ranks there."""
    stood_s: float
    """Seconds for which the main thread has not moved."""
    has_left: bool
    """Whether it has come to its end and beats no more."""

    def text(self) -> str:
        """Write it down."""
        return json.dumps(self)

    @classmethod
    def of(cls, text: str | bytes) -> "Beat":
        """Read what ``text`` wrote."""
        return cls(*json.loads(text))


class Patience(NamedTuple):
    """How long ranks may hold up a run."""

    timeout_s: float
    """Seconds within which the run is to end."""
    period_s: float
    """Seconds between beats."""

    @property
    def limit_s(self) -> float:
        """Seconds after which a rank holds up the run: what is left of the timeout is for telling so."""
        return self.timeout_s - 5 * self.period_s

    def minutes(self, seconds: float) -> str:
        """Say how long something took, and how long it may take."""
        return f"{seconds / 60:.1f} minutes (timeout_minutes {self.timeout_s / 60:g})"


def silence(beats: Mapping[int, Beat], silent_s: Mapping[int, float], *, enough_s: float, patience: Patience) -> str:
    """Say which ranks have been silent for ``enough_s`` and more; nothing if none.

    Args:
        beats: The last beat of each rank.
        silent_s: Seconds since then.
        enough_s: Seconds of silence to tell.
        patience: To be told with it.
    """
    silent = [rank for rank, seconds in silent_s.items() if seconds >= enough_s]
    if not silent:
        return ""
    time = patience.minutes(max(silent_s[rank] for rank in silent))
    last_step = _after(max(beats[rank].step for rank in silent))
    have = "has" if len(silent) == 1 else "have"
    return f"{_named(silent, beats)} {have} not answered for {time}, last seen {last_step}; ending the run"


def verdict(beats: Mapping[int, Beat], silent_s: Mapping[int, float], *, patience: Patience) -> str:
    """Say which ranks hold up the run, and for how long; nothing if none does.

    Either ranks are silent, or some rank has stood in one and the same wait for so long that the process group would
    give it up: then those are named that it waits for. Long work alone holds up nobody.

    Args:
        beats: The last beat of every rank of the run.
        silent_s: Seconds since then.
        patience: How long is too long.
    """
    waited_s = max((beat.stood_s for beat in beats.values() if beat.waits and not beat.has_left), default=0.0)
    if waited_s < patience.limit_s:
        return silence(beats, silent_s, enough_s=patience.limit_s, patience=patience)
    # Whoever waits for a silent rank may reach the limit a moment before its silence does.
    silent = silence(beats, silent_s, enough_s=patience.limit_s / 2, patience=patience)
    return silent or _standstill(beats, waited_s=waited_s, patience=patience)


def _standstill(beats: Mapping[int, Beat], *, waited_s: float, patience: Patience) -> str:
    step, time = _after(max(beat.step for beat in beats.values())), patience.minutes(waited_s)
    busy = [r for r, beat in beats.items() if beat.has_left or not beat.waits or beat.stood_s < waited_s / 2]
    if busy:
        return f"{_places(busy, beats)}, and the others have waited for {time} {step}; ending the run"
    return f"all ranks have waited for {time} {step}: {_places(list(beats), beats)}; ending the run"


def _places(ranks: Sequence[int], beats: Mapping[int, Beat]) -> str:
    """Say where ranks are, the place that fewest are at first."""
    at: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        at["its end" if beats[rank].has_left else beats[rank].place].append(rank)
    groups = sorted(at.items(), key=lambda group: len(group[1]))
    told = [
        f"{_named(there, beats)} {'is' if len(there) == 1 else 'are'} at {place}"
        for place, there in groups[:MOST_NAMED]
    ]
    more = sum(len(there) for _, there in groups[MOST_NAMED:])
    return "; ".join([*told, f"{more} more elsewhere"] if more else told)


def _named(ranks: Sequence[int], beats: Mapping[int, Beat]) -> str:
    told = [f"rank {rank} (host {beats[rank].host})" for rank in ranks[:MOST_NAMED]]
    more = len(ranks) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")


def _after(step: int) -> str:
    return f"after step {step}" if step else "before the first step"
