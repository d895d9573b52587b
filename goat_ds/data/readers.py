"""Read the rows of one file, each with the place where it stands.

JSON and CSV are read line by line here and not by ``datasets``: only so can an error name the line, and a CSV cell
``None`` or ``007`` stay the text that it is. Parquet has no lines; there a place is a row number, from 1.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset
from datasets.exceptions import DatasetsError

from goat_ds.errors import ConfigError


class Row(NamedTuple):
    """One record as it was read, or what is wrong with the place where it should be."""

    origin: str
    value: Any
    problem: str = ""
    """Why nothing could be read here; reading goes on behind it."""


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the objects of a file that has one a line; blank lines are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            origin = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield Row(origin, json.loads(text))
            except json.JSONDecodeError as error:
                yield Row(origin, None, f"bad JSON: {error.msg} (column {error.colno})")
            except UnicodeDecodeError as error:
                yield Row(origin, None, f"not UTF-8: {error.reason}")


def read_json(path: Path) -> Iterator[Row]:
    """Yield the objects of a file that holds a list of them, or one after the other.

    Raises:
        ConfigError: not JSON; behind such a place nothing can be told apart any more.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} (byte {error.start})") from None
    decoder, place, line, counted = json.JSONDecoder(), _skip(text, 0, " \t\r\n"), 1, 0
    in_list = text[place : place + 1] == "["
    place = _skip(text, place + in_list, " \t\r\n")
    while place < len(text) and not (in_list and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} line {error.lineno}: bad JSON: {error.msg} (column {error.colno})") from None
        yield Row(f"{path} line {line}", value)
        place = _next_value(text, place, in_list, path)
    if in_list and text[place:].rstrip() != "]":
        raise ConfigError(f"{path} line {_line(text, place)}: bad JSON: the list must end here with ]")


def _next_value(text: str, place: int, in_list: bool, path: Path) -> int:
    """Return where the next value starts; in a list, a comma stands before it."""
    after = _skip(text, place, " \t\r\n")
    if not in_list or text[after : after + 1] in ("]", ""):
        return after
    if text[after] != ",":
        raise ConfigError(f"{path} line {_line(text, after)}: bad JSON: no comma after a record")
    return _skip(text, after + 1, " \t\r\n")


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def read_csv(path: Path) -> Iterator[Row]:
    """Yield the rows of a table with a header, every cell as text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # The default limit of 128 KiB a cell is less than some documents.
            csv.field_size_limit(1 << 30)
            reader = csv.DictReader(file, strict=True)
            last_line = reader.line_num
            for value in reader:
                origin = f"{path} line {last_line + 1 if last_line else 2}"
                last_line = reader.line_num
                yield Row(origin, value, "more cells than the header names" if None in value else "")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason}") from None
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num}: bad CSV: {error}") from None


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file without copying it into a cache."""
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, value in enumerate(rows, start=1):
            yield Row(f"{path} row {number}", value)
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: bad Parquet: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""What reads a file, by its suffix."""
