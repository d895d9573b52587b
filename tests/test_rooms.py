"""Imports go down only: which room of goat_ds may import which, and what the lower rooms never touch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "goat_ds"
LOWEST = {"errors", "manifest", "precision"}
UP_TO_TUNER = LOWEST | {"distributed", "method", "tuner"}
UP_TO_BASE = UP_TO_TUNER | {"data", "base"}
MAY_IMPORT = {
    "errors": set(),
    "precision": set(),
    "arguments": {"errors"},
    "manifest": {"errors"},
    "distributed": LOWEST,
    "method": {"errors"},
    "tuner": LOWEST | {"distributed", "method"},
    "data": UP_TO_TUNER - {"distributed"},
    "base": UP_TO_TUNER | {"data"},
    "zero": UP_TO_BASE,
    "export": UP_TO_BASE | {"front door"},
    "evaluate": UP_TO_BASE | {"arguments", "export", "front door"},
    "plan": UP_TO_BASE | {"zero", "front door"},
    "train": UP_TO_BASE | {"arguments", "zero", "plan", "demo", "front door"},
    "compare": {"errors", "distributed", "zero", "plan", "train"},
    "demo": {"errors"},
    "cli": UP_TO_BASE | {"arguments", "zero", "train", "export", "evaluate", "plan", "compare", "demo", "front door"},
    "front door": UP_TO_BASE | {"zero", "train", "export", "evaluate", "plan", "demo"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """Name the room of a module given by its path below goat_ds."""
    name = parts[0].removesuffix(".py") if parts else "__init__"
    return "front door" if name == "__init__" else name


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the modules that a file imports, anywhere in it, as dotted parts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the whole name"
            module = tuple((node.module or "").split("."))
            rooms = [(*module, alias.name) for alias in node.names if alias.name in MAY_IMPORT]
            yield from rooms if module == ("goat_ds",) and rooms else [module]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_the_rooms_below_it_only(path: Path) -> None:
    room = room_of(path.relative_to(PACKAGE).parts)
    imported = {room_of(parts[1:]) for parts in imports(path) if parts[0] == "goat_ds"}
    assert imported - {room} <= MAY_IMPORT[room]


def test_the_shards_alone_know_deepspeed() -> None:
    knowing = {
        room_of(path.relative_to(PACKAGE).parts) for path in FILES if ("deepspeed" in {p[0] for p in imports(path)})
    }
    assert knowing <= {"zero"}


def test_the_method_imports_torch_lapack_and_the_errors_only() -> None:
    imported = {parts[0] for path in (PACKAGE / "method").glob("*.py") for parts in imports(path)}
    assert imported - set(sys.stdlib_module_names) == {"torch", "scipy", "goat_ds"}


@pytest.mark.parametrize("room", ["method", "tuner", "data"])
def test_the_lower_rooms_read_neither_environment_nor_clock(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        assert not {parts[0] for parts in imports(path)} & {"time", "datetime"}, path
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"environ", "getenv", "putenv"}, path


WITHOUT_DEEPSPEED = """
import os, sys
sys.modules["deepspeed"] = None
import peft
for room in ("goat_ds", "goat_ds.cli.export", "goat_ds.cli.evaluate", "goat_ds.cli.demo"):
    child = os.fork()
    if child == 0:
        __import__(room)
        print(room, sys.modules["goat_ds"].GoatConfig().peft_type)
        sys.exit()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{room} does not open")
"""


def test_the_front_door_and_what_needs_no_training_open_without_deepspeed() -> None:
    # Each room opens in a process of its own, which shares the imports of peft with the others.
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    rooms = ["goat_ds", "goat_ds.cli.export", "goat_ds.cli.evaluate", "goat_ds.cli.demo"]
    assert done.stdout.splitlines() == [f"{room} GOAT" for room in rooms]


# A program's list is what was asked for, no message; the exam runs where goat_ds is not installed.
PRINTING = {"cli/__init__.py", "demo/exam.py"}
BESIDE_BARS = {"distributed/messages.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_said_on_stdout_goes_through_the_logger(path: Path) -> None:
    where = str(path.relative_to(PACKAGE))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called != "print" or words.get("file") == "sys.stderr" or where in PRINTING, f"line {node.lineno}"
            assert called != "tqdm.write" or where in BESIDE_BARS, f"line {node.lineno}"


READING_THE_ENVIRONMENT = {
    *("train/environment.py", "train/config.py"),
    *("cli/export.py", "cli/program.py", "cli/demo.py", "cli/compare.py"),
}


def test_the_environment_is_read_in_few_places() -> None:
    reading = set()
    for path in FILES:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & {"environ", "getenv", "putenv"}:
            reading.add(str(path.relative_to(PACKAGE)))
    assert reading == READING_THE_ENVIRONMENT


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.save", "__import__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_can_run_code(path: Path) -> None:
    assert not {parts[0] for parts in imports(path)} & UNSAFE_MODULES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE_CALLS, f"line {node.lineno}"
            # Where nothing is said, transformers asks at the terminal whether to run the code that a model brings.
            asks = called.startswith("Auto") and called.endswith((".from_pretrained", ".from_config"))
            assert not asks or "trust_remote_code" in {word.arg for word in node.keywords}, f"line {node.lineno}"
