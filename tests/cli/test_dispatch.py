"""``goat-ds``: which program a word stands for, and what every program does with words that it does not know."""

import json
import os
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from goat_ds import cli
from goat_ds.cli import PROGRAMS, demo
from goat_ds.evaluate.settings import Dtype
from goat_ds.precision import Precision
from goat_ds.zero import ds_config
from tests.launching import REPOSITORY, cpu_environment

Printed = pytest.CaptureFixture[str]

# What each refuses is one flag more than it needs.
ENOUGH = {
    "train": [],
    "export": ["--checkpoint", "a", "--mode", "exact", "--output", "b"],
    "evaluate": ["--model", "a", "--data", "b"],
    "plan": [],
    "compare": ["--config", "a"],
    "demo": [],
}


def exit_code_of(monkeypatch: pytest.MonkeyPatch, program: str, arguments: Sequence[str]) -> int | None:
    """Run a program in this process; return its exit code, also of one that would end the process."""

    def end(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    # The test's process keeps its own way to be ended.
    monkeypatch.setattr("goat_ds.train.run.Signals.listen", lambda self: None)
    try:
        return cli.main([program, *arguments])
    except SystemExit as ended:
        return ended.code  # type: ignore[return-value]


def test_the_console_script_is_this_dispatch() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"goat-ds": "goat_ds.cli:main"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_gets_the_words_after_its_name(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Sequence[str]] = []
    monkeypatch.setattr(f"goat_ds.cli.{program}.main", lambda arguments: given.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", ["goat-ds", program, "--r", "8"])
    assert cli.main() == 3
    assert given == [["--r", "8"]]


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_no_program_and_an_unknown_one_print_the_list_and_are_bad_input(arguments: list[str], capsys: Printed) -> None:
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert all(f"\n  {name} " in told and text in told for name, text in PROGRAMS.items())
    assert ("trian is not a program" in told) is bool(arguments)


def test_help_prints_the_list_and_is_no_error(capsys: Printed) -> None:
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == f"{cli.usage()}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_lists_its_flags(program: str, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    assert exit_code_of(monkeypatch, program, ["--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: goat-ds {program} ")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--wrold_size", "3"], "--wrold_size is not a setting; see --help"),
        (["stray"], "stray belongs to no flag; see --help"),
    ],
)
def test_every_program_refuses_a_word_that_it_does_not_know(
    program: str, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    # First, or a list of values would take a stray word for its own.
    assert exit_code_of(monkeypatch, program, [*words, *ENOUGH[program]]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and not printed.out


@pytest.mark.parametrize(
    ("program", "words", "told"),
    [
        ("train", ["--max_step", "1"], "--max_step is not a setting; see --help"),
        ("train", ["--precision", "bfloat16"], "argument --precision: invalid choice: 'bfloat16'"),
        ("export", ["--shards", "3"], "--shards is not a setting; see --help"),
        ("export", ["--check", "3"], "--check is not a setting; see --help"),
        ("export", ["--mode", "excat"], "argument --mode: invalid choice: 'excat'"),
        ("export", ["--dtype", "float32"], "argument --dtype: invalid choice: 'float32'"),
        ("export", ["--max_kl", "low"], "argument --max_kl/--max-kl: invalid float value: 'low'"),
        ("evaluate", ["--shots", "3"], "--shots is not a setting; see --help"),
        ("evaluate", ["--dtype", "bfloat16"], "argument --dtype: invalid choice: 'bfloat16'"),
        ("evaluate", ["--limit", "few"], "argument --limit: invalid int value: 'few'"),
        ("plan", ["--world_size", "two"], "argument --world_size/--world-size: invalid int value: 'two'"),
        ("compare", ["--rates", "1e-3"], "--rates is not a setting; see --help"),
        ("compare", ["--config", "no.yaml"], "config (no.yaml) cannot be read:"),
        ("demo", ["--outptu", "a"], "--outptu is not a setting; see --help"),
    ],
)
def test_bad_words_are_named_and_end_the_program_with_2(
    program: str, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    assert exit_code_of(monkeypatch, program, [*ENOUGH[program], *words]) == 2
    assert told in capsys.readouterr().err


def test_a_flag_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    assert exit_code_of(monkeypatch, "export", ["--output", "b"]) == 2
    assert "error: the following arguments are required: --checkpoint, --mode\n" in capsys.readouterr().err


def test_dtypes_are_spelled_alike_on_every_command_line() -> None:
    assert list(Dtype) == ["auto", *Precision]
    assert [member.torch_name for member in Dtype] == ["auto", *(member.torch_name for member in Precision)]
    assert {str(member.torch_dtype) for member in Precision} == {f"torch.{member.torch_name}" for member in Precision}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_script_in_launch_is_the_same_program(program: str) -> None:
    script = (REPOSITORY / "launch" / f"{program}.py").read_text()
    assert f"from goat_ds.cli.{program} import main\n" in script and "main(sys.argv[1:])" in script
    assert callable(import_module(f"goat_ds.cli.{program}").main)


def test_the_list_of_programs_needs_nothing_that_trains_or_exports() -> None:
    code = "import sys, goat_ds.cli; goat_ds.cli.main(['-h']); print(sorted(m for m in sys.modules if 'goat_ds' in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cpu_environment(), cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert not {name for name in loaded if name.startswith(("goat_ds.train", "goat_ds.export", "goat_ds.zero"))}
    assert not done.stderr


# -- the demo


def test_the_demo_questions_trains_exports_and_questions_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        demo.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    assert cli.main(["demo", "--output", str(tmp_path / "demo")]) == 0
    assert [Path(words[1]).name if "exam.py" in words[1] else words[0] for words in commands] == [
        "exam.py", "deepspeed", sys.executable, "exam.py",
    ]  # fmt: skip
    assert commands[0][-1] != commands[3][-1] == str(tmp_path / "demo" / "exact")
    printed = capsys.readouterr().out
    assert all(f"\n$ {' '.join(command)}\n" in printed for command in commands)


def test_a_program_that_python_starts_as_a_module_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed
) -> None:
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(demo.__file__), run_name="__main__")
    assert ended.value.code == 0
    assert f"the model is in {tmp_path / 'exact'}\n" in capsys.readouterr().out


def test_a_step_of_the_demo_that_fails_is_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        demo.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=75)
    )
    assert cli.main(["demo", "--output", str(tmp_path)]) == 75
    assert len(commands) == 1


# -- the DeepSpeed configs that are shipped


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_ds_config_goes_by_its_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ds_config.read(path.stem) == ds_config.read(path)
    # A folder of a run may have the same name; a file of that name is the user's own.
    (tmp_path / path.stem).mkdir()
    assert ds_config.read(path.stem) == ds_config.read(path)
    (tmp_path / path.stem).rmdir()
    (tmp_path / path.stem).write_text("{}")
    assert ds_config.read(path.stem) == ({}, [])


def test_a_name_that_none_is_shipped_by_is_refused_with_those_that_are() -> None:
    (problem,) = ds_config.read("zero9")[1]
    assert problem == ("ds_config (zero9) does not exist; give a file, or one of zero1, zero2, zero3, zero3_offload")


def test_the_installed_package_has_the_shipped_ds_configs_inside(tmp_path: Path) -> None:
    build = ["setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run([sys.executable, *build], cwd=REPOSITORY, capture_output=True, check=True)
    shipped = {path.name: path.read_bytes() for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "goat_ds" / "ds_configs").iterdir()} == shipped
    assert (tmp_path / "goat_ds" / "demo" / "base" / "model.safetensors").is_file()
