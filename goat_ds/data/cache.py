"""Tokenise once and keep the result on disk, under a name that its content determines.

An entry is a folder ``<key>/`` with ``tokens.arrow`` and ``manifest.json``. It is written under a temporary name and
then renamed, so that any number of processes and nodes can make the same entry at once: the first to finish wins, and
the others take what it left. An entry that does not match its manifest is made again. Data files that have not changed
are not even read (``known_files``): an entry is there only if nothing was wrong with them.
"""

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from goat_ds.data.formats import DataFormat
from goat_ds.data.known_files import KnownFiles
from goat_ds.data.sources import digest_of, load_records
from goat_ds.data.tokens import Tokenised, TokenReport, tokenise
from goat_ds.errors import ConfigError
from goat_ds.manifest import sha256_of

VERSION = 1
"""Raise it with every change to what records become: entries of other versions are not found any more."""

ARROW, MANIFEST = "tokens.arrow", "manifest.json"
KNOWN_FILES = ".known_files"
"""Folder beside the entries: what was read of the data files."""


def prepare(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    cache_dir: Path,
    data_format: DataFormat | None = None,
    split: str = "train",
) -> Tokenised:
    """Return the tokenised records of all sources, from the cache if they are there.

    Args:
        sources: Files, folders or hub names.
        tokenizer: Fast or SentencePiece, with or without a chat template.
        max_length: Tokens; of a longer record the head is kept.
        cache_dir: Made if it is not there; may be shared by processes and nodes.
        data_format: The format of all records; without it, each record's columns tell.
        split: Which split of a folder or a hub data set.

    Raises:
        ConfigError: ``cache_dir`` cannot be written, or as for :func:`goat_ds.data.sources.load_records` and
            :func:`goat_ds.data.tokens.tokenise`.
    """
    content = digest_of(sources, split=split, digest_file=KnownFiles(cache_dir / KNOWN_FILES).digest)
    key = _key(content, tokenizer, max_length=max_length, data_format=data_format)
    entry = cache_dir / key
    found = read_entry(entry)
    if found is not None:
        return found
    folder = _new_folder(cache_dir, key)
    try:
        records = load_records(sources, data_format=data_format, split=split)
        made = tokenise(records, tokenizer, max_length=max_length, arrow_file=folder / ARROW)
        _write_manifest(folder, made)
        return _publish(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(cache_dir: Path, key: str) -> Path:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".part", dir=cache_dir))
    except OSError as error:
        raise ConfigError(
            f"token_cache ({cache_dir}) cannot be written ({error}); name a folder that every node can write to"
        ) from error


def read_entry(entry: Path) -> Tokenised | None:
    """Return what is in the cache folder ``entry``, or nothing if it is missing or not as its manifest says."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        if sha256_of(entry / ARROW) != manifest["sha256"]:
            return None
        return Tokenised(Dataset.from_file(str(entry / ARROW)), TokenReport(**manifest["report"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(folder: Path, entry: Path) -> Tokenised:
    """Rename ``folder`` to ``entry``, unless another process was faster."""
    while True:
        try:
            folder.rename(entry)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        found = read_entry(entry)
        if found is not None:
            return found
        _discard(entry)


def _discard(entry: Path) -> None:
    # Renamed before it is deleted, so that nobody finds it half deleted.
    grave = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".part", dir=entry.parent))
    try:
        entry.rename(grave / "damaged")
    except FileNotFoundError:
        return  # another process did it
    finally:
        shutil.rmtree(grave, ignore_errors=True)


def _write_manifest(folder: Path, made: Tokenised) -> None:
    manifest = {"sha256": sha256_of(folder / ARROW), "report": made.report._asdict()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def _key(content: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int, data_format: DataFormat | None) -> str:
    parts = [str(VERSION), str(max_length), str(data_format), content, *_tokenizer(tokenizer)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield all that a tokenizer is: the files it saves, whatever its kind."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            yield f"{file.relative_to(folder)}\0{sha256_of(file)}"
