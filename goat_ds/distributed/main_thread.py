"""See, from another thread, where the main thread of this process is and for how long it has not moved."""

import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import deepspeed
import torch.distributed

PACKAGE = Path(__file__).parents[1]
WAITING = (
    Path(torch.distributed.__file__).parent,
    Path(deepspeed.comm.__file__).parent,
    Path(deepspeed.__file__).parent / "runtime",
)
"""Folders whose code the innermost frame is in while a rank waits for others: collectives, and handles of such."""


class Sight(NamedTuple):
    """The main thread at one moment."""

    place: str
    """The line it is at, and the line of goat_ds that led there."""
    in_collective: bool
    stood_s: float
    """Seconds for which it has been at one instruction of one call of one function."""


class RunningClock:
    """Measures seconds between looks; a look that comes far too late, because the process was stopped, counts less."""

    def __init__(self, *, most_s: float) -> None:
        self._most_s, self._last = most_s, time.monotonic()

    def since_last(self) -> float:
        """Return the seconds since the last call, at most ``most_s``."""
        last, self._last = self._last, time.monotonic()
        return min(self._last - last, self._most_s)


class MainThread:
    """Looks at the main thread, again and again."""

    def __init__(self, *, period_s: float) -> None:
        self._clock = RunningClock(most_s=2 * period_s)
        self._instruction = -1
        self._stood_s = 0.0

    def look(self) -> Sight:
        """See where it is now."""
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        passed, instruction = self._clock.since_last(), frame.f_lasti
        stands = frame.f_trace is _seen and instruction == self._instruction
        self._stood_s = self._stood_s + passed if stands else 0.0
        self._instruction = instruction
        if frame.f_trace is None:
            # A mark on the call itself: the next call of the same function has none. A reference to the frame would
            # tell as well, and keep its tensors alive; its id is given to the next frame. Only tracers use the field.
            frame.f_trace = _seen
        in_collective = any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in WAITING)
        return Sight(_place(frame), in_collective, self._stood_s)


def _seen(*_: Any) -> Any:
    return _seen


def _place(frame: FrameType) -> str:
    ours: FrameType | None = frame
    while ours is not None and not Path(ours.f_code.co_filename).is_relative_to(PACKAGE):
        ours = ours.f_back
    if ours is None or ours is frame:
        return _line(frame)
    return f"{_line(frame)} (called at {_line(ours)})"


def _line(frame: FrameType) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"
