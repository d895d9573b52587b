"""The command line of the evaluation."""

import json
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.evaluate.conftest import LEARNED, alpaca
from tests.launching import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "evaluate.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


def test_a_table_is_printed_and_a_report_written(
    tmp_path: Path,
    knowing: Path,
    write_data: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = list(LEARNED.items())[:2], list(LEARNED.items())[2:]
    data = (write_data(alpaca(dict(first)), "a.jsonl"), "--data", write_data(alpaca(dict(second)), "b.jsonl"))
    sizes = ("--max_length", 64, "--max_new_tokens", 8, "--batch_size", 2, "--dtype", "fp32")
    choices = ("--choices", *LEARNED.values(), "--limit", 5)
    run(monkeypatch, "--model", knowing, "--data", *data, *sizes, *choices, "--output", tmp_path / "report.json")
    printed = capsys.readouterr().out
    assert "exact_match                   1.0000  5 of 5\n" in printed
    assert f"wrote {tmp_path / 'report.json'}\n" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["choice_accuracy"]["num_right"] == report["num_records"] == report["limit"] == 5


def test_a_refusal_is_one_message_on_stderr_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--model", tmp_path, "--metrics", "bleu")
    assert caught.value.code == 2
    error, *more = capsys.readouterr().err.splitlines()
    assert error == "error: metrics (bleu) must be of perplexity, exact_match, choice_accuracy"
    assert more[0].startswith("data and tasks are both missing") and more[1].startswith(f"model ({tmp_path}) holds")


def test_the_script_does_not_hide_the_package_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(SCRIPT.parent), *sys.path])
    found = find_spec("evaluate")
    assert found is not None and found.origin == str(SCRIPT)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", tmp_path)
    found = find_spec("evaluate")
    assert found is None or found.origin != str(SCRIPT)


def test_an_unknown_flag_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--model", "a", "--data", "b", "--shots", "3")
    assert caught.value.code == 2
    assert "error: --shots is not a setting; see --help\n" in capsys.readouterr().err
