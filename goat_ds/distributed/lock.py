"""Keep two runs out of one folder: each would delete what the other is writing."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from goat_ds.distributed import ranks
from goat_ds.distributed.ranks import agree
from goat_ds.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
"""A file of the folder while a run has it; a run that was killed leaves it behind, and nobody has it locked then."""
PATIENCE = 0.5
"""Share of the timeout to wait for: a rank that lost its network ends itself within the timeout."""


@contextmanager
def locked(folder: Path, *, timeout_minutes: float) -> Iterator[None]:
    """Lock a folder for this run while the block runs; the system unlocks it when the first rank ends. A collective.

    Args:
        folder: Is there on the first rank.
        timeout_minutes: Of the run.

    Raises:
        ConfigError: another run has it, and kept it for half of the timeout; or the folder cannot be written to.
    """
    lock = agree(lambda: _acquired(folder, 60 * PATIENCE * timeout_minutes) if ranks.is_first() else None)
    try:
        yield
    finally:
        if lock is not None:
            # Deleted before it is released, for afterwards it may be another run's; one that stays does no harm.
            with suppress(OSError):
                (folder / LOCK_NAME).unlink()
            lock.release()


def _acquired(folder: Path, patience_s: float) -> BaseFileLock:
    """Return the folder's lock, held; not held where the disk knows no locks, which is said."""
    try:
        (folder / LOCK_NAME).touch()
    except OSError as error:
        raise ConfigError(_unwritable(folder, error)) from error
    # A soft lock, which is a file's being there, would outlive a run that is killed.
    lock = FileLock(folder / LOCK_NAME, fallback_to_soft=False)
    try:
        _wait_for(lock, folder, patience_s)
    except Timeout:
        raise ConfigError(
            f"output_dir ({folder}) is in use by another run; end that run first, or choose another folder"
        ) from None
    except OSError as error:
        logger.warning(f"output_dir ({folder}) cannot be locked ({error.strerror}); see that no other run uses it")
    return lock


def _unwritable(folder: Path, error: OSError) -> str:
    path = folder / LOCK_NAME
    if path.exists() and os.access(folder, os.W_OK):
        return f"output_dir: {path} belongs to another user ({error.strerror}); if no run uses the folder, delete it"
    return f"output_dir ({folder}) cannot be written to: {error.strerror}; choose another folder"


def _wait_for(lock: BaseFileLock, folder: Path, patience_s: float) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info(f"output_dir ({folder}) is in use by another run; waiting {patience_s:.0f} s for it to end")
        lock.acquire(timeout=patience_s, poll_interval=min(1.0, patience_s))
