"""What a resumed run may change, what becomes of the packs of a step, and of lines that will be written again."""

import dataclasses
import json
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError
from goat_ds.train import resume
from goat_ds.train.cli import parse
from goat_ds.train.config import TrainConfig
from goat_ds.train.methods import Method
from goat_ds.train.metrics import _append, _set_redone_aside
from goat_ds.train.resume import check_phase
from goat_ds.zero.checkpoint import Checkpoint, keep_newest, sweep

BEGUN = TrainConfig(ds_config="ds_configs/zero3.json", output_dir="runs/a", grad_accum_steps=2, resume="auto")


REST: dict[str, Any] = {"data_sha256": "", "tokens": 0, "eval_loss": None}


def checkpoint(global_batch_size: int = 4) -> Checkpoint:
    run: dict[str, Any] = {"settings": resume.settings_of(BEGUN), "global_batch_size": global_batch_size} | REST
    return Checkpoint(Path("runs/a/checkpoint-5"), 0, 5, {}, run, {}, {}, None)


def look(
    monkeypatch: pytest.MonkeyPatch, config: TrainConfig, *, world_size: int, patched: bool = True
) -> resume.Resumption:
    if patched:
        monkeypatch.setattr(resume, "newest_whole", lambda folder: (checkpoint(), {}))
    monkeypatch.setattr(ranks, "get_world_size", lambda: world_size)
    return resume.look(config)


def test_settings_that_make_another_run_are_told_by_name_all_at_once() -> None:
    changed = dataclasses.replace(
        BEGUN, r=64, seed=1, learning_rate=1e-3, save_steps=7, ds_config="ds_configs/zero2.json"
    )
    told = list(resume.changes(changed, resume.settings_of(BEGUN)))
    assert [line.split(" was ")[0] for line in told] == ["seed (1)", "r (64)", "learning_rate (0.001)"]
    assert all("--allow_changed" in line for line in told)


def test_a_run_of_a_peft_config_goes_on_with_one_only() -> None:
    by_file = dataclasses.replace(BEGUN, peft_config="lily.json")
    (line,) = resume.changes(dataclasses.replace(BEGUN, method=Method.LORA), resume.settings_of(by_file))
    assert line.startswith("peft_config (None) was lily.json when the run began")
    (line,) = resume.changes(by_file, resume.settings_of(BEGUN))
    assert line.startswith("peft_config (lily.json) was None when the run began")


def test_every_setting_is_either_free_or_held() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names >= resume.FREE
    for name in names - resume.FREE:
        settings = resume.settings_of(BEGUN) | {name: "another"}
        assert [line.split()[0] for line in resume.changes(BEGUN, settings)] == [name]


@pytest.mark.parametrize(("world_size", "grad_accum_steps"), [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_a_step_keeps_its_packs_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int, grad_accum_steps: int
) -> None:
    found = look(monkeypatch, BEGUN, world_size=world_size)
    assert found.problems == []
    assert (found.global_batch_size, found.config.grad_accum_steps) == (4, grad_accum_steps)
    assert bool(found.notes) == (grad_accum_steps != 2)


def test_flags_that_fit_the_packs_of_a_step_are_taken_and_others_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fitting = dataclasses.replace(BEGUN, micro_batch_size=2, grad_accum_steps=1)
    found = look(monkeypatch, fitting, world_size=2)
    assert (found.problems, found.notes, found.config) == ([], [], fitting)
    other = dataclasses.replace(BEGUN, grad_accum_steps=3)
    (problem,) = look(monkeypatch, other, world_size=2).problems
    assert problem.startswith("grad_accum_steps (3) x micro_batch_size (1) x ranks (2) makes a step of 6 packs, and")
    assert "use grad_accum_steps 2" in problem
    assert look(monkeypatch, dataclasses.replace(other, allow_changed=True), world_size=2).problems == [problem]


def test_the_number_of_ranks_may_change_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, BEGUN, world_size=1)
    # What a checkpoint of that run holds.
    run = {"settings": resume.settings_of(found.given), "global_batch_size": found.global_batch_size}
    for world_size in (1, 4, 1, 2):
        monkeypatch.setattr(resume, "newest_whole", lambda *_: (checkpoint()._replace(run=REST | run), {}))
        found = look(monkeypatch, BEGUN, world_size=world_size, patched=False)
        assert found.problems == []
        assert found.config.grad_accum_steps == 4 // world_size


def test_changes_that_are_allowed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(monkeypatch, dataclasses.replace(BEGUN, learning_rate=1e-3, allow_changed=True), world_size=2)
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith("resume: changed: learning_rate (0.001) was 0.0001")


def test_a_checkpoint_that_does_not_say_enough_of_its_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "newest_whole", lambda *_: (checkpoint()._replace(run={"settings": {}}), {}))
    (problem,) = look(monkeypatch, BEGUN, world_size=2, patched=False).problems
    assert problem == "resume: runs/a/checkpoint-5 does not say data_sha256, eval_loss, global_batch_size, tokens"


def test_allow_changed_without_resume_is_told() -> None:
    with pytest.raises(ConfigError, match="allow_changed has no effect without resume"):
        parse(["--allow_changed"])


def test_lines_that_will_be_written_again_are_set_aside_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    _set_redone_aside(path, done=2)
    assert path.read_text().splitlines() == lines[:2]
    assert (tmp_path / "metrics.redone.jsonl").read_text().splitlines() == [*lines[2:], '{"step": 5, "lo']
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.redone.jsonl"]


def test_what_a_dense_finish_wrote_after_its_checkpoint_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(line) for line in ({"step": 2}, {"step": 2, "dense_finish": {}}, {"step": 2, "eval_loss": 1.0})]
    path.write_text("\n".join(lines) + "\n")
    _set_redone_aside(path, done=2)
    assert path.read_text().splitlines() == lines[:1]


def test_a_line_without_its_end_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    _set_redone_aside(path, done=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("is_routed", [True, False])
@pytest.mark.parametrize(("finish_after", "is_dense"), [(None, False), (4, True), (5, False), (6, False)])
def test_a_checkpoint_is_dense_or_routed_as_the_settings_have_it(
    finish_after: int | None, is_dense: bool, is_routed: bool
) -> None:
    found = checkpoint()._replace(adapter={"routed": is_routed})
    if is_dense != is_routed:
        check_phase(BEGUN, found, finish_after)
    else:
        with pytest.raises(ConfigError, match=r"dense_finish \(0.0\) makes the run (dense|routed) after step 5, and "):
            check_phase(BEGUN, found, finish_after)


def test_a_line_that_a_full_disk_does_not_take_is_lost_whole_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"

    class Full(FileIO):
        def write(self, line: Any) -> int:
            return super().write(line[:3])

    with Full(str(path), "ab") as file:
        _append(file, b'{"step": 1}\n')
    with FileIO(str(path), "ab") as file:
        _append(file, b'{"step": 2}\n')
    assert path.read_text() == '{"step": 2}\n'
    assert f"{path}: a line was not written: No space left on device" in caplog.text


def test_a_disk_without_a_byte_left_does_not_end_a_run_by_its_metrics(caplog: pytest.LogCaptureFixture) -> None:
    with FileIO("/dev/full", "wb") as file:
        _append(file, b'{"step": 1}\n')
    assert "/dev/full: a line was not written: No space left on device" in caplog.text


def test_what_a_killed_run_left_half_done_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint-3.tmp", ".checkpoint-1.surplus", "checkpoint-2", "checkpoint-1.damaged"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1.damaged", "checkpoint-2"]


def test_the_newest_the_best_and_the_last_routed_checkpoint_are_kept(tmp_path: Path) -> None:
    losses = {10: 0.9, 20: 0.3, 30: 0.5, 40: None, 50: 0.4, 60: float("nan")}
    for step, loss in losses.items():
        (tmp_path / f"checkpoint-{step}" / "adapter").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "run.json").write_text(json.dumps({"run": {"eval_loss": loss}}))
        config = tmp_path / f"checkpoint-{step}" / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({"routed": step <= 30}))
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "notes").write_text("the user's own")
    keep_newest(tmp_path, 2)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-20", "checkpoint-30", "checkpoint-5", "checkpoint-50", "checkpoint-60"]
