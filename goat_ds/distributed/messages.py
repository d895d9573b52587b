"""What goat_ds says to its user: log records, shown beside progress bars, once a run.

A module says something by ``logging.getLogger(__name__)``. What another rank than the first must say, because only that
one knows it, goes with ``extra=ON_ANY_RANK``. Programs show what is said with ``shown``; where goat_ds is imported as a
library, nothing is shown unless its user's own logging does so.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from goat_ds.distributed import ranks

ON_ANY_RANK = {"on_any_rank": True}
"""``extra`` of a record that is shown by whichever rank logs it."""


@contextmanager
def shown() -> Iterator[None]:
    """Show what goat_ds says, on stdout, while the block runs."""
    logger, handler = logging.getLogger("goat_ds"), _BesideBars()
    handler.addFilter(_is_for_this_rank)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Libraries that set logging up for all would show every line twice.
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    return ranks.is_first() or getattr(record, "on_any_rank", False)


class _BesideBars(logging.Handler):
    """Writes lines above progress bars, which then stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        line = self.format(record)
        tqdm.write(f"warning: {line}" if record.levelno >= logging.WARNING else line)
        # A launcher reads it through a pipe, where lines would wait for thousands more.
        sys.stdout.flush()
