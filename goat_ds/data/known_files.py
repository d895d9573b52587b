"""Remember the content of files by their size and times, so that what has not changed is not read again.

What is kept of a file is one small file under a name that its path determines. Whoever rewrites a file changes its
times, so what is kept no longer fits and the file is read. A file that was new when it was read is read once more.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from goat_ds.manifest import sha256_of

RACY_NS = 2 * 10**9
"""How much later than the file its entry must be written. A disk counts time in ticks, of seconds at most, and a file
that is written twice within one tick looks the same."""


class KnownFiles:
    """The sha256 of files that have been read before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def digest(self, path: Path) -> str:
        """Return the sha256 of a file; reads it only where it is not known, or has changed since."""
        kept = self._folder / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}.json"
        before = _looks(path)
        known = _read(kept)
        if known is not None and known["looks"] == before and _is_settled(kept, before):
            return str(known["sha256"])
        found = sha256_of(path)
        # A file that is being written has the digest of neither its old nor its new content.
        if _looks(path) == before:
            _write(kept, {"path": str(path.resolve()), "looks": before, "sha256": found})
        return found


def _looks(path: Path) -> list[int]:
    """Return what changes whenever a file is written or replaced."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _is_settled(kept: Path, looks: list[int]) -> bool:
    """Whether a file was read so long after it was written that a later change shows in its times."""
    _, modified_ns, changed_ns, _ = looks
    try:
        return kept.stat().st_mtime_ns - max(modified_ns, changed_ns) > RACY_NS
    except OSError:
        return False


def _read(kept: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= {"looks", "sha256"} else None


def _write(kept: Path, content: dict[str, Any]) -> None:
    """Write what is known of a file whole or not at all; where it cannot be kept, the file is read again next time."""
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(suffix=".part", dir=kept.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, kept)
        except OSError:
            os.unlink(temporary)
            raise
