"""What the README says can be typed, can be typed."""

import ast
import re
import shlex
import subprocess
import sys

import pytest

from goat_ds.train.config import parse
from tests.launching import REPOSITORY, cpu_environment

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY)) for room in ("launch", "benchmarks") for path in (REPOSITORY / room).glob("*.py")
)
INLINE = re.findall(r"`([^`\n]+)`", README)


def shell_commands() -> list[list[str]]:
    """Give the words of every command in the README, without comments and the dots that stand for more."""
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in [*lines, *INLINE] if "launch/" in line or "make " in line]
    return [[word for word in command if word != "…"] for command in commands]


def after(script: str) -> list[list[str]]:
    return [command[command.index(script) + 1 :] for command in shell_commands() if script in command]


@pytest.mark.parametrize("flags", after("launch/train.py"), ids=" ".join)
def test_training_commands_parse(flags: list[str]) -> None:
    config = parse(flags)
    if config.ds_config is not None:
        assert (REPOSITORY / config.ds_config).exists()


@pytest.mark.parametrize("flags", after("launch/export.py"), ids=" ".join)
def test_export_commands_are_understood(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "launch/export.py", *flags],
        cwd=REPOSITORY,
        env=cpu_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    # The folders of the README are not here: what is refused must be the checkpoint, not a flag.
    assert "usage:" not in done.stderr
    assert "runs/first" in done.stderr


def test_make_targets_exist() -> None:
    targets = {word for command in shell_commands() if command[0] == "make" for word in command[1:2]}
    assert targets >= {"setup", "demo", "test"}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_python_blocks_compile_and_import_what_exists() -> None:
    for kind, text in BLOCKS:
        if kind == "python":
            imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
            exec(compile(ast.Module(imports, type_ignores=[]), "README.md", "exec"), {})


def test_the_map_names_every_room_and_nothing_else() -> None:
    tree = README[README.index("## Map") : README.index("The data's way")]
    named = set(re.findall(r"^ {6}(\w+)(?:/|\.py) ", tree, flags=re.MULTILINE))
    rooms = {path.stem for path in (REPOSITORY / "goat_ds").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == rooms - {"__init__", "__pycache__"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", sorted(set(re.findall(r"(?:launch|benchmarks)/\w+\.py", README)) | {"launch/demo.py"})
)
def test_every_script_starts(script: str) -> None:
    command = [sys.executable, script, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
