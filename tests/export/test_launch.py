"""The command line of the export."""

import json
import runpy
from pathlib import Path

import pytest

from tests.export.conftest import Trained, in_4bit, train
from tests.export.test_dense import keep_sample

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCRIPT = Path(__file__).parents[2] / "launch" / "export.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


@pytest.mark.parametrize(("mode", "weights"), [("adapter", "adapter_model"), ("exact", "model")])
def test_both_modes_write_their_weights_and_say_what_they_read(
    tmp_path: Path,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    weights: str,
) -> None:
    run(monkeypatch, "--checkpoint", trained.adapter, "--mode", mode, "--output", tmp_path / "out")
    assert (tmp_path / "out" / f"{weights}.safetensors").is_file()
    assert f"read {trained.adapter}\nwrote {tmp_path / 'out'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("merge_base", ["dequant_w4", "w16"])
def test_the_weights_that_were_asked_for_are_written_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], merge_base: str
) -> None:
    adapter = train(tmp_path, "llama", **in_4bit()).adapter
    arguments = ("--checkpoint", adapter, "--mode", "exact", "--merge_base", merge_base, "--output", tmp_path / "out")
    run(monkeypatch, *arguments)
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert report["merge_base"] == merge_base
    assert f"\nbase weights: {merge_base}, {report['values']}\n" in capsys.readouterr().out


def test_merge_base_without_base_weights_is_refused(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--checkpoint", trained.adapter, "--mode", "adapter", "--merge_base", "w16")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments, "--output", tmp_path / "out")
    assert caught.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("error: merge_base (w16) has no effect with --mode adapter")


@pytest.mark.parametrize("mode", ["dense", "lora"])
def test_merged_modes_show_what_they_cost(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    keep_sample(trained.adapter)
    arguments = ("--checkpoint", trained.adapter, "--mode", mode, "--output", tmp_path / "out", "--dtype", "fp32")
    run(monkeypatch, *arguments, "--fit", "mean", "--heldout_labels", "16")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    shown = capsys.readouterr().out
    assert f"as written{report['merged']['loss']:15.4f}" in shown and report["fit"] == "mean"
    assert "least explained layers" in shown


def test_flags_of_other_modes_are_all_refused_at_once(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    useless = ("--fit", "mean", "--calibration", "a", "b", "--max_kl", "0.1", "--dtype", "bf16")
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--checkpoint", trained.adapter, "--mode", "exact", "--output", tmp_path / "out", *useless)
    told = capsys.readouterr().err
    assert caught.value.code == 2
    for flag in ("fit (mean)", "calibration (a b)", "max_kl (0.1)", "dtype (bf16)"):
        assert f"{flag} has no effect with --mode exact; leave it out, or use --mode dense or lora" in told


def test_a_refusal_is_one_message_on_stderr_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--checkpoint", tmp_path, "--mode", "exact", "--output", tmp_path / "out")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: checkpoint ({tmp_path}) holds neither adapter_config.json")


def test_an_unknown_flag_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--checkpoint", "a", "--mode", "exact", "--output", "b", "--shards", "3")
    assert caught.value.code == 2
    assert "error: --shards is not a setting; see --help\n" in capsys.readouterr().err
