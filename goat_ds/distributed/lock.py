"""Keep two runs out of one folder: each would delete what the other is writing."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from goat_ds.distributed import ranks
from goat_ds.distributed.ranks import agree
from goat_ds.errors import ConfigError

PATIENCE = 0.5
"""Share of the timeout to wait for: a rank that lost its network ends itself within the timeout."""


@contextmanager
def locked(folder: Path, *, timeout_minutes: float) -> Iterator[None]:
    """Hold a folder for this run while the block runs; the system lets go of it when the first rank ends. A collective.

    Args:
        folder: Is there on the first rank. It is locked itself, so that nothing is left in it.
        timeout_minutes: Of the run.

    Raises:
        ConfigError: another run has it, and kept it for half of the timeout.
    """
    held = agree(lambda: _hold(folder, 60 * PATIENCE * timeout_minutes) if ranks.is_first() else None)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _hold(folder: Path, patience_s: float) -> int | None:
    """Return what holds the folder; None where the disk knows no locks, which is said."""
    descriptor = os.open(folder, os.O_RDONLY)
    until, told = time.monotonic() + patience_s, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(descriptor)
                raise ConfigError(
                    f"output_dir ({folder}) is in use by another run; end that run first, or choose another folder"
                ) from None
        except OSError as error:
            os.close(descriptor)
            tqdm.write(
                f"warning: output_dir ({folder}) cannot be locked ({error.strerror}); see that no other run uses it"
            )
            return None
        if not told:
            tqdm.write(f"output_dir ({folder}) is in use by another run; waiting {patience_s:.0f} s for it to end")
            told = True
        time.sleep(min(1.0, patience_s))
