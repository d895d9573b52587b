"""Flags and YAML become settings, or one message."""

from pathlib import Path
from typing import Any

import pytest

from goat_ds.errors import ConfigError
from goat_ds.method.spectrum import Start
from goat_ds.train.config import TrainConfig, parse, ranks_from_environment
from goat_ds.zero.ds_config import Precision


def test_flags_become_settings_of_the_right_kind() -> None:
    config = parse(["--r", "16", "--init", "pissa", "--learning_rate", "1e-3", "--dry_run", "--no_packing"])
    assert (config.r, config.init, config.learning_rate) == (16, Start.PISSA, 1e-3)
    assert config.dry_run and not config.packing
    assert parse([]).precision is Precision.BF16


def test_a_repeated_flag_adds_up() -> None:
    assert parse(["--data", "a.jsonl", "--data", "b.jsonl", "c.jsonl"]).data == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert parse([]).data is None


def test_the_command_line_wins_over_the_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("r: 16\nlearning_rate: 1e-3\ndata: [a.jsonl, b.jsonl]\npacking: false\ninit: pissa\n")
    from_file = parse(["--config", str(path)])
    assert (from_file.r, from_file.learning_rate, from_file.data) == (16, 1e-3, ["a.jsonl", "b.jsonl"])
    assert not from_file.packing and from_file.init is Start.PISSA
    overruled = parse([f"--config={path}", "--r", "32", "--data", "c.jsonl", "--packing", "true"])
    assert (overruled.r, overruled.data, overruled.packing) == (32, ["c.jsonl"], True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], r"--lerning_rate is not a setting"),
        (["--max_step", "1"], r"--max_step is not a setting"),
        (["stray"], r"stray belongs to no flag"),
        (["--r", "many"], r"argument --r: invalid int value: 'many'"),
        (["--init", "gaot"], r"argument --init: invalid choice: 'gaot'"),
        (["--config", "no.yaml"], r"config \(no.yaml\) cannot be read"),
    ],
)
def test_bad_words_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(arguments)


def test_unknown_keys_of_the_yaml_file_are_named_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rank: 3\nexperts: 4\n")
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(path)])
    assert len(raised.value.problems) == 2
    assert "rank is not a setting" in raised.value.problems[0]


def problems(**settings: Any) -> list[str]:
    return list(TrainConfig(ds_config="ds_configs/zero3.json", **settings).problems())


def test_the_defaults_train_the_demo_without_complaint() -> None:
    assert problems() == []


def test_every_wrong_number_is_in_one_list() -> None:
    found = problems(r=10, num_experts=8, top_k=9, learning_rate=0.0, micro_batch_size=0, max_length=1, adam_beta2=1.0)
    assert found == [
        "num_experts (8) must divide r (10)",
        "top_k (9) must be at most num_experts (8)",
        "micro_batch_size (0) must be at least 1",
        "learning_rate (0.0) must be above 0",
        "adam_beta2 (1.0) must be in [0, 1)",
        "max_length (1) must be at least 2",
    ]


def test_a_real_run_needs_model_data_and_folder() -> None:
    assert [problem.split()[0] for problem in problems(model="m")] == ["data", "output_dir"]
    assert [problem.split()[0] for problem in problems(data=["d"])] == ["model", "output_dir"]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    assert problems(max_steps=50, warmup_steps=50) == ["warmup_steps (50) must be below max_steps (50)"]
    assert TrainConfig().warmup_of(50) == 5
    assert TrainConfig().warmup_of(5000) == 100


def test_a_process_alone_is_a_run_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that what the function sets is undone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    alone = ranks_from_environment(TrainConfig())
    assert (alone.world_rank, alone.world_size, alone.local_rank) == (0, 1, 0)


def test_the_launchers_local_rank_is_taken_from_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_from_environment(TrainConfig()).local_rank == 1
    monkeypatch.delenv("LOCAL_RANK")
    assert ranks_from_environment(parse(["--local_rank", "2"])).local_rank == 2
    with pytest.raises(ConfigError, match="local_rank is not given"):
        ranks_from_environment(TrainConfig())


def test_the_demo_brings_settings_of_its_own_and_any_flag_wins(tmp_path: Path) -> None:
    assert parse([]).learning_rate == 2e-3
    assert parse(["--learning_rate", "1e-5"]).learning_rate == 1e-5
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 3e-5\n")
    from_file = parse(["--config", str(path)])
    assert (from_file.learning_rate, from_file.max_length) == (3e-5, 512)
    assert parse(["--model", "m", "--data", "d"]).learning_rate == TrainConfig().learning_rate
