"""A finished run as a line of results.jsonl: all that is needed to judge it, and to train it again."""

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from goat_ds.compare.trials import Trial, counted
from goat_ds.errors import ConfigError

logger = logging.getLogger(__name__)

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
"""How a run ends: as it should; with numbers that are none; because of something else, such as too little memory."""
NOT_A_NUMBER = re.compile(r"(?:loss|gradient norm) of step \d+ is -?(?:nan|inf)")
"""What a run says that stops because its loss or its gradient is not finite."""
MOST_POINTS = 200
"""Of the training loss of a run that are kept."""
LINES_OF_ERROR = 5
NEEDED = {"key", "id", "method", "rate", "grid", "stage", "steps", "seed", "status", "final_loss", "settings"}


class Results:
    """The file of a comparison. A line is written whole, and is on the disk before the next run starts."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            ConfigError: a line is no result.
        """
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self.num_torn = 0
        for row in _read(path):
            if row is None:
                self.num_torn += 1
            else:
                self._rows[row["key"]] = row

    def find(self, key: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the latest row of a run, or None where there is none of the same settings.

        Args:
            key: Of the run.
            settings: All of its settings; a default that has changed since makes it another run.
        """
        row = self._rows.get(key)
        if row is None:
            return None
        now, then = counted(dict(settings)), counted(row["settings"])
        changed = [name for name in now.keys() & then.keys() if now[name] != then[name]]
        if changed:
            logger.warning(f"{row['id']} is trained again: {', '.join(sorted(changed))} had another default")
            return None
        return row

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, on the disk when this returns."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if _ends_torn(file):
                # What a kill has left unfinished becomes a line of its own, which readers pass over.
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._rows[row["key"]] = dict(row)

    def rows(self) -> list[dict[str, Any]]:
        """Return the latest row of every run."""
        return list(self._rows.values())


def _ends_torn(file: Any) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) != b"\n")


def _read(path: Path) -> Iterable[dict[str, Any] | None]:
    """Yield the rows of a file; None for a line that was not written to its end."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            # Killed in the middle of a write: that run goes on from its folder.
            logger.warning(f"{path} line {number} was not written to its end; that run is looked at again")
            yield None
            continue
        if not isinstance(row, dict) or not row.keys() >= NEEDED:
            raise ConfigError(f"{path} line {number} is no result of a comparison; move the file away")
        yield row


class Ended(NamedTuple):
    """A run that has ended by itself."""

    code: int
    """Of its process; negative: a signal has killed it."""
    metrics: list[dict[str, Any]]
    """Its metrics.jsonl."""
    printed: str
    """What it said."""
    wall_seconds: float
    """Of its process; a run that went on after a kill has more behind it."""


def measured(trial: Trial, ended: Ended) -> dict[str, Any]:
    """Return what a run has shown, as a part of its row."""
    curve = [[line["step"], line["eval_loss"]] for line in ended.metrics if "eval_loss" in line]
    steps = [line for line in ended.metrics if "loss" in line]
    finite = [loss for _, loss in curve if math.isfinite(loss)]
    is_whole = ended.code == 0 and bool(curve) and curve[-1][0] == trial.steps
    status = _status(ended, curve, is_whole=is_whole)
    return {
        "status": status,
        "final_loss": curve[-1][1] if status == FINISHED else None,
        "best_loss": min(finite) if status == FINISHED else None,
        "last_train_loss": steps[-1]["loss"] if steps else None,
        "curve": [[step, loss] for step, loss in curve if math.isfinite(loss)],
        "train_curve": [[line["step"], line["loss"]] for line in thinned(steps)],
        "tokens": steps[-1]["tokens"] if steps else 0,
        "train_seconds": _train_seconds(steps),
        "wall_seconds": ended.wall_seconds,
        "peak_mem_gib": max((line["peak_mem_gib"] for line in steps), default=None),
        "error": None if status == FINISHED else _error(ended),
    }


def _status(ended: Ended, curve: list[list[float]], *, is_whole: bool) -> str:
    if is_whole:
        return FINISHED if math.isfinite(curve[-1][1]) else DIVERGED
    return DIVERGED if NOT_A_NUMBER.search(ended.printed) else FAILED


def _train_seconds(steps: list[dict[str, Any]]) -> float:
    """Return the seconds of a run's steps, without loading and evaluating, over all its processes."""
    before = [0, *(line["tokens"] for line in steps)]
    return sum((line["tokens"] - earlier) / line["tokens_per_s"] for line, earlier in zip(steps, before, strict=False))


def _error(ended: Ended) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", ended.printed) if line.strip()]
    why = f"exit code {ended.code}" if ended.code >= 0 else f"killed by signal {-ended.code}"
    return " | ".join([why, *lines[-LINES_OF_ERROR:]])


def thinned(lines: list[Any]) -> list[Any]:
    """Return at most ``MOST_POINTS`` of a list, evenly spread, the first and the last among them."""
    if len(lines) <= MOST_POINTS:
        return lines
    places = (round(place * (len(lines) - 1) / (MOST_POINTS - 1)) for place in range(MOST_POINTS))
    return [lines[place] for place in dict.fromkeys(places)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without one that was not written to its end; none without a file."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                logger.warning(f"{path}: a line was not written to its end")
    return lines
