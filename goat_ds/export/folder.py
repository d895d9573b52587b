"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from goat_ds.errors import ConfigError, ExportError


def check_new(output: Path) -> None:
    """Check that ``output`` is free, before anything is read for it.

    Raises:
        ConfigError: it exists and is not an empty folder.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"output ({output}) exists already; name a new folder, nothing is overwritten")


def check_room(output: Path, num_bytes: int) -> None:
    """Check that the disk has room, before hours go into what is to be written.

    Raises:
        ExportError: it has less than ``num_bytes``.
    """
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ExportError(
            f"output ({output}) needs {num_bytes / 2**30:.2f} GiB, and its disk has {free / 2**30:.2f} GiB left; make "
            "room, or name a folder on another disk"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``output`` that takes its name at the end, or is removed on any error.

    Raises:
        ExportError: the disk refuses.
    """
    output = output.absolute()
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(output)
    except OSError as error:
        raise ExportError(f"output ({output}) could not be written: {error}") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
