"""Check whether a folder is as it was written: its manifest holds the size and the SHA-256 of every file."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """List every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": listed}, indent=2))


def damages(folder: Path, *, below: str = "") -> Iterator[str]:
    """Yield, one line each, what is not as the manifest has it.

    Tensors and settings that it does not name are damages, notes of the user's are not.

    Args:
        folder: With its manifest.
        below: A folder in it, to look at that alone.
    """
    path = folder / MANIFEST_NAME
    try:
        listed = [(name, int(file["bytes"]), str(file["sha256"])) for name, file in _files(path).items()]
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}"
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{path} is damaged: it does not list files with bytes and sha256"
        return
    names = {MANIFEST_NAME, *(name for name, _, _ in listed)}
    for found in sorted(path for pattern in ("*.safetensors", "*.json") for path in (folder / below).rglob(pattern)):
        if str(found.relative_to(folder)) not in names:
            yield f"{found} is not in {MANIFEST_NAME}"
    for name, num_bytes, digest in listed:
        if Path(name).is_relative_to(below):
            yield from _damages_of(folder / name, num_bytes, digest)


def _files(manifest: Path) -> dict[str, dict[str, int | str]]:
    files: dict[str, dict[str, int | str]] = json.loads(manifest.read_text())["files"]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise ValueError("a file outside the folder")
    return files


def _damages_of(path: Path, num_bytes: int, digest: str) -> Iterator[str]:
    try:
        found = path.stat().st_size
        if found != num_bytes:
            yield f"{path} has {found:,} bytes, and {MANIFEST_NAME} says {num_bytes:,}"
        elif sha256_of(path) != digest:
            yield f"{path} is damaged: its SHA-256 is not the one in {MANIFEST_NAME}"
    except FileNotFoundError:
        yield f"{path} is missing"
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror}"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
