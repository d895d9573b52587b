"""Read records from files, folders and the hub, and say exactly where one is wrong.

A *source* is what the user names after ``--data``:

- a ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file;
- a folder of such files, split by their names as ``datasets`` does it (``train.jsonl``, ``test.jsonl``, …; without such
  names, all are training data), or a folder that ``Dataset.save_to_disk`` wrote;
- a data set on the hub, ``owner/name`` or ``owner/name:config``.

Each record is recognised on its own, so sources of different formats mix. What is wrong anywhere in any of
them is reported at once.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.data_files import DataFilesList, get_data_patterns
from datasets.exceptions import DatasetsError

from goat_ds.data.formats import DataFormat, Dropped, Record, convert, first_problems
from goat_ds.data.readers import READERS, Row
from goat_ds.errors import ConfigError, raise_if_any
from goat_ds.manifest import sha256_of

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


class Part(NamedTuple):
    """One file or one table of a source."""

    name: str
    rows: Callable[[], Iterator[Row]]
    """Reads the part; raises ``ConfigError`` where it cannot be read on."""
    digest: Callable[[Callable[[Path], str]], str]
    """Changes whenever the content does; is given what digests a file."""


def load_records(
    sources: Sequence[str], *, data_format: DataFormat | None = None, split: str = "train"
) -> Iterator[Record | Dropped]:
    """Yield the records of all sources, in order, those to be dropped with their reason.

    Args:
        sources: Files, folders or hub names; see the module's docstring.
        data_format: The format of all records; without it, each record's columns tell.
        split: Which split of a folder or a hub data set.

    Raises:
        ConfigError: something is wrong with a source; raised after the last record, with the problems of all sources.
    """
    problems: list[str] = []
    for source in sources:
        yield from _read(source, data_format, split, problems)
    raise_if_any(problems)


def check_sources(sources: Sequence[str], *, data_format: DataFormat | None = None, split: str = "train") -> list[str]:
    """Return what is wrong with the sources, reading all of them but tokenising nothing."""
    problems: list[str] = []
    for source in sources:
        for _ in _read(source, data_format, split, problems):
            pass
    return problems


def digest_of(sources: Sequence[str], *, split: str = "train", digest_file: Callable[[Path], str] = sha256_of) -> str:
    """Return a sha256 over the content of all sources, and their names, as records tell them for their origin.

    Args:
        sources: Files, folders or hub names.
        split: Which split of a folder or a hub data set.
        digest_file: Returns the sha256 of a file, which it may have remembered.

    Raises:
        ConfigError: a source cannot be found; with the problems of all sources.
    """
    problems: list[str] = []
    digest = hashlib.sha256()
    for source in sources:
        try:
            for part in _parts(source, split):
                digest.update(f"{part.name}\0{part.digest(digest_file)}\0".encode())
        except ConfigError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{source}: cannot be read: {error.strerror}")
    raise_if_any(problems)
    return digest.hexdigest()


def _read(source: str, data_format: DataFormat | None, split: str, problems: list[str]) -> Iterator[Record | Dropped]:
    """Yield what is right in ``source`` and add what is wrong to ``problems``."""
    found: list[str] = []
    num_rows = 0
    try:
        for part in _parts(source, split):
            for row in part.rows():
                num_rows += 1
                try:
                    yield _converted(row, data_format)
                except ConfigError as error:
                    found += error.problems
    except ConfigError as error:
        found += error.problems
    if not num_rows and not found:
        found.append(f"{source}: an empty data set, it holds no record")
    problems += first_problems(found, where=source)


def _converted(row: Row, data_format: DataFormat | None) -> Record | Dropped:
    if row.problem:
        raise ConfigError(f"{row.origin}: {row.problem}")
    return convert(row.value, data_format=data_format, origin=row.origin)


def _parts(source: str, split: str) -> list[Part]:
    """Find what ``source`` names."""
    path = Path(source)
    if path.is_file():
        return [_file_part(path)]
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return _saved_parts(path, split) if saved else _folder_parts(path, split)
    # A missing file is reported at once; only what can be nothing but a hub name is worth a trip over the network.
    hub = HUB_NAME.fullmatch(source)
    if hub is None or path.suffix in READERS or source.startswith("."):
        raise ConfigError(f"{source}: no such file or folder")
    return _hub_parts(source, hub["name"], hub["config"], split)


def _file_part(path: Path) -> Part:
    if path.suffix not in READERS:
        raise ConfigError(f"{path}: cannot read {path.suffix or 'a file without suffix'}, only {', '.join(READERS)}")
    return Part(str(path), lambda: READERS[path.suffix](path), lambda digest_file: digest_file(path))


def _folder_parts(folder: Path, split: str) -> list[Part]:
    try:
        patterns = get_data_patterns(str(folder))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: an empty folder") from None
    if split not in patterns:
        raise ConfigError(f'{folder}: no split "{split}", its files are {", ".join(map(str, patterns))}')
    files = DataFilesList.from_patterns(patterns[split], base_path=str(folder), allowed_extensions=list(READERS))
    if not files:
        raise ConfigError(f"{folder}: no {', '.join(READERS)} file in it")
    # The order of the files is the order of the records, so it must not depend on the file system.
    return [_file_part(folder / Path(file).relative_to(folder.resolve())) for file in sorted(files)]


def _saved_parts(folder: Path, split: str) -> list[Part]:
    try:
        saved = load_from_disk(str(folder))
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be read as a saved data set: {error}") from None
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ConfigError(f'{folder}: no split "{split}", it has {", ".join(saved)}')
        saved = saved[split]
    files = [Path(file["filename"]) for file in saved.cache_files]
    return [
        Part(str(folder), lambda: _table_rows(str(folder), saved), lambda digest_file: "".join(map(digest_file, files)))
    ]


def _hub_parts(source: str, name: str, config: str | None, split: str) -> list[Part]:
    try:
        table = load_dataset(name, config, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{source}: no file or folder here, and not to be had from the hub: {error}") from None
    # datasets has no public name for the digest of a table's content and history.
    return [Part(source, lambda: _table_rows(source, table), lambda _: str(table._fingerprint))]


def _table_rows(name: str, table: Dataset) -> Iterator[Row]:
    for number, value in enumerate(table, start=1):
        yield Row(f"{name} row {number}", value)
