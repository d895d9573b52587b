"""The words that CONTRIBUTING.md has retired do not come back, and a file's base name stands in one room only."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "goat_ds"
FILES = sorted(PACKAGE.rglob("*.py"))
IN_TWO_ROOMS = {
    "__init__": "Python's",
    "config": "PEFT's own name for the file of a method's config (tuner/), and the field's for that of a run (train/)",
}
NO_VERBS = ("Give", "Hold", "Tell", "Say", "See", "Walk")
"""First words of docstrings that say less than Return, Check or Raise."""


def retired() -> set[str]:
    """Read the last column of the table of words."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `?[^|]+ \| [^|]+ \| ([^|]*) \|$", text.partition("## Words")[2], re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`(\w+)`", row)} - set(NO_VERBS)


def names_in(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every name that a file gives to a thing of its own, and its line."""
    yield path.stem, 0
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno


def uses(name: str, word: str) -> bool:
    """Whether a name is a retired word, or one of its parts is; a capital one is looked for in CamelCase."""
    if word.islower():
        return word in name.lower().split("_")
    return name.strip("_") == word or word in re.findall(r"[A-Z][a-z]+", name)


def test_there_are_retired_words() -> None:
    assert {"together", "static", "Ranks", "Moments"} <= retired()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_name_uses_a_retired_word(path: Path) -> None:
    words = retired()
    found = [f"line {line}: {name}" for name, line in names_in(path) if any(uses(name, word) for word in words)]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_verbs_of_the_field(path: Path) -> None:
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, with_docstrings))
    first_words = {re.match(r"\w*", ast.get_docstring(node) or "")[0] for node in nodes}  # type: ignore[index]
    assert not first_words & set(NO_VERBS)


def test_a_file_name_stands_in_one_room_only() -> None:
    rooms = defaultdict(set)
    for path in FILES:
        rooms[path.stem].add(path.parent.name)
    assert {name for name, where in rooms.items() if len(where) > 1} <= IN_TWO_ROOMS.keys()
