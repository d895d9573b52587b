"""results.jsonl: written whole, read after a kill, and what of a run stands in it; what makes two runs one."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from goat_ds import demo
from goat_ds.compare.compare_file import Point
from goat_ds.compare.results import Ended, Results, measured, thinned
from goat_ds.compare.trials import Trial, config_of, id_of, identity, key_of, trial_flags
from goat_ds.errors import ConfigError
from goat_ds.train.resume import settings_of
from tests.compare.helpers import read

TRIAL = Trial("lora", Point(0.001), "final", 4, 1)
METRICS: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "tokens": 10, "tokens_per_s": 5.0, "peak_mem_gib": 1.0},
    {"step": 2, "loss": 2.0, "tokens": 30, "tokens_per_s": 10.0, "peak_mem_gib": 2.0},
    {"step": 2, "eval_loss": 1.5},
    {"step": 4, "loss": 1.0, "tokens": 60, "tokens_per_s": 10.0, "peak_mem_gib": 2.0},
    {"step": 4, "eval_loss": 1.75},
]


def row(key: str, **more: Any) -> dict[str, Any]:
    names = ("id", "method", "rate", "grid", "stage", "steps", "seed", "status", "final_loss")
    return dict.fromkeys(names, 0) | {"key": key, "settings": {"r": 8}} | more


# -- the file


def test_rows_come_back_and_the_latest_of_a_run_counts(tmp_path: Path) -> None:
    results = Results(tmp_path / "deep" / "results.jsonl")
    for each in (row("a"), row("b"), row("a", seed=3)):
        results.append(each)
    again = Results(tmp_path / "deep" / "results.jsonl")
    assert again.rows() == results.rows() == [row("a", seed=3), row("b")]
    assert len((tmp_path / "deep" / "results.jsonl").read_text().splitlines()) == 3


def test_a_line_that_a_kill_has_torn_is_said_passed_over_and_does_no_harm_to_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.jsonl"
    Results(path).append(row("a"))
    with path.open("a") as file:
        file.write(json.dumps(row("b"))[:30])
    results = Results(path)
    assert [each["key"] for each in results.rows()] == ["a"] and results.num_torn == 1
    assert f"{path} line 2 was not written to its end" in caplog.text
    results.append(row("c"))
    assert [each["key"] for each in Results(path).rows()] == ["a", "c"]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"loss": 3}\n')
    with pytest.raises(ConfigError, match=r"results\.jsonl line 1 is no result of a comparison; move the file away"):
        Results(tmp_path / "results.jsonl")


def test_a_run_is_found_by_its_settings_new_ones_aside_and_not_where_a_default_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = Results(tmp_path / "results.jsonl")
    results.append(row("a", settings={"r": 8, "output_dir": "there"}))
    assert results.find("a", {"r": 8, "output_dir": "here", "of_a_later_version": 3}) is not None
    assert results.find("a", {"r": 16}) is None
    assert "is trained again: r had another default" in caplog.text
    assert results.find("b", {"r": 8}) is None


# -- what of a run stands in it


def test_a_finished_run_has_its_losses_tokens_and_seconds() -> None:
    found = measured(TRIAL, Ended(0, METRICS, "", 9.0))
    assert found["status"] == "finished" and found["error"] is None
    assert (found["final_loss"], found["best_loss"], found["last_train_loss"]) == (1.75, 1.5, 1.0)
    assert found["curve"] == [[2, 1.5], [4, 1.75]] and found["train_curve"] == [[1, 3.0], [2, 2.0], [4, 1.0]]
    # 10 tokens at 5 a second, 20 at 10, 30 at 10.
    assert (found["tokens"], found["train_seconds"], found["wall_seconds"]) == (60, 7.0, 9.0)
    assert found["peak_mem_gib"] == 2.0


@pytest.mark.parametrize(
    ("ended", "status", "words"),
    [
        (Ended(1, METRICS[:2], "TrainingError: the loss of step 3 is nan; records", 1), "diverged", "exit code 1 | Tr"),
        (Ended(1, METRICS[:2], "the gradient norm of step 3 is inf; records", 1), "diverged", "exit code 1"),
        (Ended(0, [*METRICS[:-1], {"step": 4, "eval_loss": float("nan")}], "", 1), "diverged", "exit code 0"),
        (Ended(1, METRICS[:2], "the loss of step 3 is fine\nOutOfMemoryError", 1), "failed", "OutOfMemoryError"),
        (Ended(-9, [], "step 1\rstep 2", 1), "failed", "killed by signal 9 | step 1 | step 2"),
        (Ended(0, METRICS[:3], "", 1), "failed", "exit code 0"),
    ],
)
def test_a_run_that_does_not_end_well_is_a_result_with_a_reason(ended: Ended, status: str, words: str) -> None:
    found = measured(TRIAL, ended)
    assert found["status"] == status and words in found["error"]
    assert found["final_loss"] is None and found["best_loss"] is None
    json.dumps(found, allow_nan=False)


def test_a_long_curve_keeps_its_ends_and_is_spread_evenly() -> None:
    kept = thinned(list(range(10_001)))
    assert (len(kept), kept[0], kept[-1]) == (200, 0, 10_000)
    assert {later - earlier for earlier, later in itertools.pairwise(kept)} <= {50, 51}
    assert thinned([1, 2]) == [1, 2]


# -- what makes two runs one


def flags(folder: Path, **more: Any) -> dict[str, Any]:
    return trial_flags(read(folder), TRIAL, r=None, folder=folder / "run") | more


def test_places_and_watching_do_not_make_another_run(tmp_path: Path) -> None:
    here = key_of(config_of(flags(tmp_path)))
    assert key_of(config_of(flags(tmp_path, output_dir="there", save_steps=3, svd_cache="a", log_steps=5))) == here
    for change in (
        {"seed": 9},
        {"learning_rate": 1},
        {"r": 16},
        {"max_steps": 9},
        {"eval_steps": 1},
        {"precision": "bf16"},
    ):
        assert key_of(config_of(flags(tmp_path, **change))) != here, change


def test_data_and_base_count_by_what_is_in_them(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_bytes(demo.train_data().read_bytes())
    named = {"model": str(demo.base_path()), "data": [str(data)]}
    settings = {"learning_rate": 0.001, "max_length": 64}
    key = key_of(config_of(flags(tmp_path, **named, **settings)))
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(data.read_bytes())
    assert key_of(config_of(flags(tmp_path, **named | {"data": [str(copied)]}, **settings))) == key
    copied.write_bytes(data.read_bytes() + b"\n")
    assert key_of(config_of(flags(tmp_path, **named | {"data": [str(copied)]}, **settings))) != key


def test_a_folder_counts_by_its_files_and_a_hub_name_by_itself(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert identity(str(tmp_path / "one")) == identity(str(tmp_path / "two"))
    (tmp_path / "two" / "config.json").write_text("[]")
    assert identity(str(tmp_path / "one")) != identity(str(tmp_path / "two"))
    assert identity("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


def test_a_folder_is_named_so_that_a_person_can_read_it() -> None:
    point = Point(2.5e-5, (("lora_alpha", 8), ("target_modules", "a/b c")))
    trial = TRIAL._replace(point=point)
    assert id_of(trial, "abc") == "lora-lr2.5e-05-lora_alpha8-target_modulesa_b_c-4steps-seed1-abc"


def test_the_final_may_be_judged_on_other_data(tmp_path: Path) -> None:
    settings = read(tmp_path, final={"steps": 4, "seeds": [1, 2], "eval_data": ["other.jsonl"]})
    judged = trial_flags(settings, TRIAL, r=None, folder=tmp_path)
    screened = trial_flags(settings, TRIAL._replace(stage="rung 0"), r=None, folder=tmp_path)
    assert judged["eval_data"] == ["other.jsonl"] != screened["eval_data"]


def test_a_rank_that_was_chosen_and_what_the_user_says_of_checkpoints_win(tmp_path: Path) -> None:
    settings = read(tmp_path)
    assert trial_flags(settings, TRIAL, r=12, folder=tmp_path)["r"] == 12
    kept = dataclasses.replace(settings, train=settings.train | {"save_total_limit": 5})
    assert trial_flags(kept, TRIAL, r=None, folder=tmp_path)["save_total_limit"] == 5
    assert settings_of(config_of(flags(tmp_path)))["calibration_sample_tokens"] == 0
