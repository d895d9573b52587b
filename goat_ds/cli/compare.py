"""Find out which method is best on given data: ``goat-ds compare --config compare.yaml``.

Every method is tuned and trained in the same loop, one process a run. What is done is known from results.jsonl in
output_dir, so the same command goes on after a kill and trains nothing twice.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from goat_ds.arguments import flag, parse, required_flag
from goat_ds.cli.program import logger, program
from goat_ds.compare.compare_file import CompareSettings, read_settings
from goat_ds.compare.estimate import lines as estimate_lines
from goat_ds.compare.preparation import Sizes, prepare
from goat_ds.compare.report_files import write_reports
from goat_ds.compare.results import Results
from goat_ds.compare.search import Search
from goat_ds.compare.standings import standings_of
from goat_ds.compare.table import as_text
from goat_ds.compare.workers import Workers, places
from goat_ds.distributed.lock import locked
from goat_ds.errors import ConfigError, Interrupted

INTERRUPTED = 75
LOCK_MINUTES = 0.1


@dataclass(frozen=True, kw_only=True)
class CompareFlags:
    """Flags of a comparison, whose settings stand in a file."""

    config: Path = required_flag("compare.yaml: the flags of all runs, the methods, and how they are compared")
    dry_run: bool = flag(False, "check every run and say how many there are and how long they take; train nothing")
    report_only: bool = flag(False, "write the table and the page again from results.jsonl; train nothing")
    retry_failed: bool = flag(False, "run again what has failed (not what has diverged) in an earlier start")


def flags_from(arguments: Sequence[str]) -> CompareFlags:
    """Read the command line.

    Raises:
        ConfigError: it holds words that it should not hold.
    """
    return parse(CompareFlags, arguments, program="goat-ds compare", description=__doc__)


@program
def main(arguments: Sequence[str]) -> int:
    """Compare as the file says; return 75 if a signal has ended it."""
    flags = flags_from(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE says that there are several processes; start a comparison with python alone")
    if flags.dry_run and flags.report_only:
        raise ConfigError("dry_run and report_only are both given; choose one")
    settings = read_settings(flags.config)
    sizes = prepare(settings)
    try:
        return _compare(flags, settings, sizes)
    except Interrupted as error:
        print(f"\n{error}", file=sys.stderr)
        return INTERRUPTED


def _compare(flags: CompareFlags, settings: CompareSettings, sizes: Sizes) -> int:
    results = Results(settings.output_dir / "results.jsonl")
    here = places(settings.workers, os.environ)
    workers = Workers(settings, sizes, results, here=here, retry_failed=flags.retry_failed)
    if flags.dry_run:
        for line in estimate_lines(settings, sizes, results.rows(), num_workers=len(here)):
            logger.info(line)
        return 0
    if flags.report_only:
        _search(Search(settings, workers.look_up), sizes)
        return 0
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(settings.output_dir, timeout_minutes=LOCK_MINUTES), _ended_by_signals():
        _search(Search(settings, workers.run_all), sizes)
    return 0


def _search(search: Search, sizes: Sizes) -> None:
    search.run()
    found = standings_of(search, sizes)
    for line in as_text(found):
        logger.info(line)
    for path in write_reports(search, found, search.settings.output_dir):
        logger.info(f"wrote {path}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT end the comparison with its runs saved while the block runs."""

    def end(number: int, frame: object) -> NoReturn:
        # A second one would cut short the wait for the runs.
        for each in kept:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(f"{signal.Signals(number).name}: stopped; the same command goes on from there")

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in kept:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
