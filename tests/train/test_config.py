"""Flags and YAML become settings, or one message."""

import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from goat_ds.distributed import ranks
from goat_ds.errors import ConfigError
from goat_ds.method.spectrum import Init
from goat_ds.precision import Precision
from goat_ds.train.cli import parse
from goat_ds.train.config import Schedule, TrainConfig
from goat_ds.train.environment import build_locks, settle_ranks
from goat_ds.tuner.quantized import Packing


def test_flags_become_settings_of_the_right_kind() -> None:
    config = parse(["--r", "16", "--init", "pissa", "--learning_rate", "1e-3", "--dry_run", "--no_packing"])
    assert (config.r, config.init, config.learning_rate) == (16, Init.PISSA, 1e-3)
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
    assert not from_file.packing and from_file.init is Init.PISSA
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
        parse(["--config", str(path), "--ds_config", "zero3.json"])
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
    forget_launchers(monkeypatch)
    settle_ranks(TrainConfig())
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]


def forget_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*ours, "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        # Set first, so that what the function sets is undone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_of_a_launcher_that_sets_no_rank_do_not_train_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_launchers(monkeypatch)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ConfigError, match=rf"{name} \(4\) says .*start with deepspeed or torchrun"):
        settle_ranks(TrainConfig())
    monkeypatch.setenv(name, "1")
    settle_ranks(TrainConfig())
    assert os.environ["WORLD_SIZE"] == "1"


def test_a_second_local_rank_without_a_rank_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_launchers(monkeypatch)
    with pytest.raises(ConfigError, match=r"local_rank \(1\) says .*start with deepspeed or torchrun"):
        settle_ranks(TrainConfig(local_rank=1))


def test_the_launchers_local_rank_is_taken_from_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    settle_ranks(TrainConfig())
    assert ranks.get_local_rank() == 1
    monkeypatch.delenv("LOCAL_RANK")
    settle_ranks(parse(["--local_rank", "2"]))
    assert ranks.get_local_rank() == 2
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="local_rank is not given"):
        settle_ranks(TrainConfig())


def test_the_demo_brings_settings_of_its_own_and_any_flag_wins(tmp_path: Path) -> None:
    assert parse([]).learning_rate == 2e-3
    assert parse(["--learning_rate", "1e-5"]).learning_rate == 1e-5
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 3e-5\n")
    from_file = parse(["--config", str(path)])
    assert (from_file.learning_rate, from_file.max_length) == (3e-5, 512)
    assert parse(["--model", "m", "--data", "d"]).learning_rate == TrainConfig().learning_rate


def goat_of(*arguments: str) -> tuple[Any, Any]:
    goat = parse(["--ds_config", "zero3.json", *arguments]).adapter()
    return goat.target_modules, goat.exclude_modules


def test_one_word_that_is_no_name_is_a_pattern_and_names_stay_names() -> None:
    assert goat_of("--target_modules", "all-linear") == ("all-linear", None)
    assert goat_of("--target_modules", r".*\.[01]\..*_proj", "--exclude_modules", ".*k_proj") == (
        r".*\.[01]\..*_proj", ".*k_proj",
    )  # fmt: skip
    assert goat_of("--target_modules", "self_attn.q_proj") == ({"self_attn.q_proj"}, None)
    assert goat_of("--target_modules", "q_proj", "v_proj") == ({"q_proj", "v_proj"}, None)


@pytest.mark.parametrize("schedule", Schedule)
def test_every_schedule_rises_to_the_peak_and_stays_below_it(schedule: Schedule) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=12)
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == ([1.0] * 5 if schedule is Schedule.CONSTANT else [0.0, 0.25, 0.5, 0.75, 1.0])
    assert all(0 <= later <= earlier for earlier, later in pairwise(rates[4:]))


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy", "warmup_stable_decay", "cosine_with_min_lr"])
def test_a_schedule_that_needs_more_than_steps_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--lr-scheduler: invalid choice: '{name}'"):
        parse(["--lr_scheduler", name])


def test_a_number_that_its_schedule_cannot_use_is_refused() -> None:
    assert problems(lr_scheduler=Schedule.CONSTANT, warmup_steps=5) == [
        "warmup_steps (5) has no effect with lr_scheduler constant; use constant_with_warmup"
    ]
    (found,) = problems(lr_scheduler=Schedule.POLYNOMIAL, learning_rate=1e-8)
    assert found.startswith("learning_rate (1e-08) must be above 1e-07")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_finish": 1.0}, r"dense_finish \(1.0\) must be in \[0, 1\)"),
        ({"dense_finish": float("nan")}, r"dense_finish \(nan\) must be in \[0, 1\)"),
        ({"dense_finish": 0.7, "num_experts": 1, "top_k": 1}, r"dense_finish \(0.7\) has no effect with num_experts 1"),
        (
            {"dense_finish": 0.5, "shared_A": True, "init": Init.ZERO},
            r"dense_finish \(0.5\) gives every expert a dense A of its own, and shared_A has one for all; leave one",
        ),
        (
            {"dense_finish": 0.5, "max_steps": 10, "rho_warmup_steps": 6},
            r"dense_finish \(0.5\) is after step 5 of 10, and rho_warmup_steps \(6\) must be over by then",
        ),
        ({"dense_finish": 0.5, "precision": Precision.FP16}, r"dense_finish \(0.5\) would restart the loss scale of"),
        ({"dense_finish": 0.1, "max_steps": 9}, r"dense_finish \(0.1\) is after step 0 of 9; it must leave steps"),
    ],
)
def test_a_dense_finish_that_finishes_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    (found,) = problems(**settings)
    assert re.match(message, found)


def test_a_dense_finish_is_after_the_last_whole_step_of_its_share() -> None:
    for share, num_steps, step in ((0.7, 60, 42), (0.29, 100, 29), (0.5, 7, 3), (0.99, 10, 9)):
        assert TrainConfig(dense_finish=share).finish_after(num_steps) == step
    assert TrainConfig().finish_after(60) is None


@pytest.mark.parametrize("minutes", [0.05, 1e9, math.nan])
def test_a_wait_that_is_no_wait_is_refused_before_ranks_meet(minutes: float) -> None:
    message = f"timeout_minutes ({minutes}) must be in [0.1, 100000.0]"
    assert problems(timeout_minutes=minutes) == [message]
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(["--ds_config", "ds_configs/zero3.json", "--timeout_minutes", str(minutes)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lora_alpha 16", r"lora_alpha \(16.0\) has no effect with scaling theory"),
        ("--scaling rslora --eta 2", r"eta \(2.0\) has no effect with scaling rslora"),
        ("--init zero --rho 5", r"rho \(5.0\) has no effect with init zero"),
        ("--init zero --residual fold", r"residual \(fold\) has no effect with init zero"),
        ("--init zero --residual gated", r"residual \(gated\) has no effect with init zero"),
        ("--routing top_p --top_k 3", r"top_k \(3\) has no effect with routing top_p; use routing top_k, or leave"),
        ("--top_p 0.3", r"top_p \(0.3\) has no effect with routing top_k; use routing top_p, or leave top_p out"),
        ("--max_threshold 0.1", r"max_threshold \(0.1\) has no effect with routing top_k; use routing threshold"),
        ("--num_experts 1 --top_k 1 --temperature 2", r"temperature \(2.0\) has no effect with num_experts 1"),
        ("--num_experts 1 --top_k 1 --init zero --shared_A", r"shared_A \(true\) has no effect with num_experts 1"),
        ("--top_k 8 --balance_coef 0.1", r"balance_coef \(0.1\) has no effect with top_k 8, which keeps every expert"),
        ("--num_experts 1 --top_k 1 --balance_coef 0.1", r"balance_coef \(0.1\) has no effect with num_experts 1"),
    ],
)
def test_a_flag_that_another_makes_useless_is_refused_when_it_is_given(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(["--ds_config", "zero3.json", *arguments.split()])


@pytest.mark.parametrize(
    "arguments",
    ["--scaling rslora --lora_alpha 16", "--eta 2", "--init zero", "--num_experts 1 --top_k 1 --balance_coef 0"],
)
def test_a_flag_with_an_effect_and_a_default_without_one_are_fine(arguments: str) -> None:
    assert not list(parse(["--ds_config", "zero3.json", *arguments.split()]).problems())


def test_a_useless_key_of_the_yaml_file_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lora_alpha: 16\n")
    with pytest.raises(ConfigError, match=r"lora_alpha \(16.0\) has no effect"):
        parse(["--config", str(path), "--ds_config", "zero3.json"])


def test_unknown_keys_unknown_flags_and_wrong_numbers_come_in_one_message(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rank: 3\n")
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(path), "--ds_config", "zero3.json", "--lerning_rate", "1", "--max_length", "1"])
    assert [problem.removeprefix(f"config: {path}: ").split()[0] for problem in raised.value.problems] == [
        "rank", "--lerning_rate", "max_length",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bnb_4bit_blocksize", "128"], "bnb_4bit_blocksize (128) has no effect without load_in_4bit"),
        (["--bnb_4bit_use_double_quant"], "bnb_4bit_use_double_quant (true) has no effect without load_in_4bit"),
        (["--keep_in_high_precision", "a", "b"], "keep_in_high_precision (a b) has no effect without load_in_4bit"),
    ],
)
def test_settings_of_a_4bit_base_without_one_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(["--ds_config", "ds_configs/zero3.json", *arguments])
    assert [problem for problem in raised.value.problems if message in problem]
    assert parse(["--load_in_4bit", *arguments]).quantization() is not None


def test_the_flags_of_a_4bit_base_say_how_it_is_packed() -> None:
    quantization = parse(["--load_in_4bit", "--bnb_4bit_use_double_quant", "--precision", "fp32"]).quantization()
    assert quantization is not None
    assert quantization.packing == Packing(quant_type="nf4", block_size=64, double_quant=True)
    assert (quantization.compute_dtype, quantization.kept) == ("float32", ())
    wider = parse(["--load_in_4bit", "--bnb_4bit_compute_dtype", "fp32"]).quantization()
    assert wider is not None and wider.compute_dtype == "float32"
    assert parse([]).quantization() is None


def test_locks_of_builds_are_found_where_torch_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert build_locks() == []
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    assert build_locks() == [tmp_path / "cpu_adam" / "lock"]
