"""Say what a benchmark found: print it, append it to results.jsonl, and write the table of README.md anew.

Every script calls ``publish`` with its rows, once. The table shows the newest run of every script, of runs without
flags only: sizes that somebody chose answer another question.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.jsonl", HERE / "README.md"
LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question's answer; ``ours`` and ``rival`` are alternating repetitions of one run, pair by pair."""

    question: str
    """What, against what; a row of the table is known by these words."""
    ours: tuple[float, ...]
    """In ``unit``; one value where nothing varies."""
    rival: tuple[float, ...]
    """The same of what it is measured against."""
    unit: str
    """Of both: s, MiB ..."""
    at_most: float | None = None
    """Target of the ratio; None: none."""
    at_least: float | None = None
    """Lower end of the target, where a small ratio is no better than a large one."""

    @property
    def ratios(self) -> list[float]:
        """``ours / rival`` of every repetition."""
        return [mine / other for mine, other in zip(self.ours, self.rival, strict=True)]

    @property
    def ratio(self) -> float:
        """Their median."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The quarter and three-quarter points of the ratios."""
        if len(self.ratios) == 1:
            return self.ratio, self.ratio
        low, _, high = statistics.quantiles(self.ratios, method="inclusive")
        return low, high

    def cells(self) -> list[str]:
        """Return the row as the table shows it."""
        low, high = self.quartiles
        return [
            self.question,
            _shown(statistics.median(self.ours), self.unit),
            _shown(statistics.median(self.rival), self.unit),
            f"{self.ratio:.3f}",
            f"{low:.3f} to {high:.3f}" if len(self.ratios) > 1 else "",
            self._target(),
        ]

    def _target(self) -> str:
        wanted = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        wanted += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        if not wanted:
            return ""
        is_met = (self.at_least or 0) <= self.ratio <= (float("inf") if self.at_most is None else self.at_most)
        return f"{', '.join(wanted)}: {'met' if is_met else '**missed**'}"


COLUMNS = ["what, against what", "ours", "rival", "ratio", "quartiles", "target of the ratio"]


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Return a script the flag that says where its rows go."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="file that the rows are appended to")


def publish(rows: Iterable[Row], *, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Print the rows, append them to the results, and write the table anew; on one rank only.

    Args:
        rows: What was measured.
        parser: The script's, which knows its defaults.
        arguments: What it has read.
    """
    rows = list(rows)
    print("\n".join(_aligned([COLUMNS, *(row.cells() for row in rows)])), flush=True)
    about = _about(_changed(parser, arguments))
    with arguments.results.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**about, **dataclasses.asdict(row)}) + "\n" for row in rows)
    if arguments.results.resolve() == RESULTS.resolve():
        TABLE.write_text(with_table(TABLE.read_text(encoding="utf-8"), _lines(RESULTS)), encoding="utf-8")


def with_table(page: str, found: Iterable[dict[str, Any]]) -> str:
    """Return a page with its table of every script's newest run.

    Args:
        page: Text with the two marks that the table stands between.
        found: Lines of the results, oldest first.
    """
    whole = [line for line in found if not line["flags"]]
    newest_run = {line["script"]: line["date"] for line in whole}
    newest = [line for line in whole if line["date"] == newest_run[line["script"]]]
    names = {field.name for field in dataclasses.fields(Row)}
    table = [[*COLUMNS, "measured"], ["---"] * (len(COLUMNS) + 1)]
    for line in sorted(newest, key=lambda line: str(line["script"])):
        row = Row(**{name: tuple(line[name]) if name in ("ours", "rival") else line[name] for name in names})
        table.append([*row.cells(), f"`{line['script']}`, {line['date'][:10]}, {line['commit']}"])
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table) + f"\n{END}{after}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _changed(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """List the settings that are not the script's own; what a script tells its ranks is none."""
    return [
        f"--{action.dest} {getattr(arguments, action.dest)}"
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        and hasattr(arguments, action.dest)
        and getattr(arguments, action.dest) != action.default
    ]


def _about(flags: list[str]) -> dict[str, Any]:
    return {
        "script": Path(sys.argv[0]).name,
        "flags": flags,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "process_seconds": round(time.time() - psutil.Process().create_time(), 1),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
    }


def _cpu() -> str:
    """Name the processor; /proc/cpuinfo says more than the platform does."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(map(str.strip, line.partition(":")[::2]) for line in lines if ":" in line)
    known = " ".join(fields[name] for name in ("model name", "cpu family", "model") if name in fields)
    return known or platform.processor()


def _commit() -> str:
    """Name the commit that was measured, and whether something else was changed beside it."""
    if not (HERE.parent / ".git").exists():
        return "no commit"
    git = ["git", "-C", str(HERE.parent)]
    commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()
    written_here = [f":!{path.relative_to(HERE.parent)}" for path in (RESULTS, TABLE)]
    changes = subprocess.check_output([*git, "status", "--porcelain", "--", ".", *written_here], text=True)
    return f"{commit} with changes" if changes else commit


def _shown(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) for cells in table]
