"""Sharded equals whole: the same global batches give the same losses on any ranks, stage and accumulation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from goat_ds import demo
from goat_ds.train.cli import parse
from tests.launching import REPOSITORY, losses_of, metrics_of, run_many
from tests.zero.plain_torch import (
    COMMON,
    FEWER_STEPS,
    NUM_FEWER_STEPS,
    NUM_STEPS,
    TWO_IN_ONE_STEP,
    ZERO3,
    first_step,
    start_as_the_run_did,
)

# All of them train on the same two packs a step.
ON_ONE_RANK: dict[str, dict[str, str]] = {
    "zero3, accumulated": ZERO3 | TWO_IN_ONE_STEP,
    "zero3, one row of both": ZERO3 | {"micro_batch_size": "2"},
    "zero3, reentrant": ZERO3 | TWO_IN_ONE_STEP | {"gradient_checkpointing": "reentrant"},
    "zero3, non-reentrant": ZERO3 | TWO_IN_ONE_STEP | {"gradient_checkpointing": "non_reentrant"},
    "zero1, accumulated": {"ds_config": "ds_configs/zero1.json"} | TWO_IN_ONE_STEP,
    "zero3, fold": ZERO3 | TWO_IN_ONE_STEP | {"residual": "fold"},
    "zero3, fast": ZERO3 | TWO_IN_ONE_STEP | {"learning_rate": "4e-3"},
}
# Not judged by the run that judges the others: another arithmetic, or another learning rate.
APART = ("zero3, fold", "zero3, fast")
# The judge, and what is held at its end; all others have its first steps.
LONG = ("1 zero3, accumulated", "1 zero3, fast", "2 zero3")
ON_TWO_RANKS: dict[str, dict[str, str]] = {
    "zero1": {"ds_config": "ds_configs/zero1.json"},
    "zero2": {"ds_config": "ds_configs/zero2.json"},
    "zero3": ZERO3,
    "zero3, reentrant": ZERO3 | {"gradient_checkpointing": "reentrant"},
    "zero3, non-reentrant": ZERO3 | {"gradient_checkpointing": "non_reentrant"},
    "zero3, offload": {"ds_config": "ds_configs/zero3_offload.json"},
    "zero3, fold": ZERO3 | {"residual": "fold"},
}


def flags_of(folder: Path, settings: dict[str, str]) -> list[str]:
    """Return the command line of a run in ``folder``; its neighbours share the caches."""
    places = {"output_dir": folder, "svd_cache": folder.parent / "svd", "token_cache": folder.parent / "tokens"}
    flags = COMMON | settings | {name: str(path) for name, path in places.items()}
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train every variant; return the folder of each run."""
    root = tmp_path_factory.mktemp("trajectories")
    found = {}
    for world_size, variants in ((1, ON_ONE_RANK), (2, ON_TWO_RANKS)):
        command_lines = []
        for name, settings in variants.items():
            run = f"{world_size} {name}"
            found[run] = root / run
            command_lines.append(flags_of(root / run, settings | ({} if run in LONG else FEWER_STEPS)))
        run_many(command_lines, world_size=world_size, folder=root)
    return found


def grad_norms_of(folder: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics_of(folder) if "loss" in line]


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> list[float]:
    """The trajectory that judges the others: one process."""
    losses = losses_of(folders["1 zero3, accumulated"])
    assert len(losses) == NUM_STEPS
    return losses


def assert_same(losses: list[float], whole: list[float], *, abs: float, long: bool = False) -> None:
    """Check that a run has as many steps as it was to have, and there the losses of the longer one."""
    assert len(losses) == (NUM_STEPS if long else NUM_FEWER_STEPS)
    assert losses == pytest.approx(whole[: len(losses)], abs=abs)


@pytest.mark.slow
def test_a_run_learns(folders: dict[str, Path]) -> None:
    losses = losses_of(folders["1 zero3, fast"])
    assert len(losses) == NUM_STEPS
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ON_TWO_RANKS if name not in APART])
def test_two_ranks_give_the_losses_of_one_process(name: str, folders: dict[str, Path], whole: list[float]) -> None:
    run = f"2 {name}"
    assert_same(losses_of(folders[run]), whole, abs=1e-5, long=run in LONG)
    # Adam and clipping hide a gradient that is scaled wrongly from the losses, not from its norm.
    norms, expected = grad_norms_of(folders[run]), grad_norms_of(folders["1 zero3, accumulated"])
    assert norms == pytest.approx(expected[: len(norms)], rel=1e-3)


@pytest.mark.slow
def test_the_first_step_is_that_of_plain_torch_on_the_whole_global_batch(folders: dict[str, Path]) -> None:
    config = parse(flags_of(folders["1 zero3, accumulated"], ON_ONE_RANK["zero3, accumulated"]))
    base = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    model: Any = get_peft_model(base, dataclasses.replace(config.adapter(), deferred=True)).train()
    start_as_the_run_did(model, config, lambda path: base.get_submodule(path).base_layer.weight.detach())
    step = first_step(model, config)
    first = metrics_of(folders["1 zero3, accumulated"])[0]
    assert first["loss"] == pytest.approx(step.loss, abs=1e-5)
    assert first["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ON_ONE_RANK if name not in APART])
def test_accumulation_checkpointing_and_stage_change_nothing_beyond_rounding(
    name: str, folders: dict[str, Path], whole: list[float]
) -> None:
    if "one row" in name:
        # One micro-batch has one balance loss, two have the mean of two: only the start is comparable.
        assert losses_of(folders[f"1 {name}"])[:1] == pytest.approx(whole[:1], abs=1e-5)
    else:
        assert_same(losses_of(folders[f"1 {name}"]), whole, abs=1e-5, long=f"1 {name}" in LONG)


@pytest.mark.slow
def test_a_folded_residual_gives_the_same_losses_on_two_ranks_and_nearly_those_of_the_low_rank_one(
    folders: dict[str, Path], whole: list[float]
) -> None:
    folded = losses_of(folders["1 zero3, fold"])
    assert_same(losses_of(folders["2 zero3, fold"]), folded, abs=1e-5)
    assert_same(folded, whole, abs=1e-4)


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / f"checkpoint-{NUM_STEPS}" / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_saved_adapters_are_whole_and_equal_on_one_and_two_ranks(folders: dict[str, Path]) -> None:
    one, two = adapter(folders["1 zero3, accumulated"]), adapter(folders["2 zero3"])
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.numel() > 0
        assert (tensor - two[name]).abs().max() < 1e-4, name


@pytest.mark.slow
def test_every_logged_step_has_the_promised_fields(folders: dict[str, Path]) -> None:
    lines = [line for line in metrics_of(folders["2 zero3"]) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    promised = {"step", "loss", "balance_loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_mem_gib"}
    assert all(promised <= line.keys() for line in lines)
    assert all(line["balance_loss"] >= 0.5 and line["grad_norm"] > 0 and line["tokens"] > 0 for line in lines)


@pytest.mark.slow
def test_second_copies_of_parameters_on_two_nodes_of_two_ranks_change_no_loss(tmp_path: Path) -> None:
    config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    variants = {"one": ZERO3, "two": {"ds_config": str(tmp_path / "hpz.json")}}
    for name, settings in variants.items():
        # Of a process group DeepSpeed divides the ranks once and for all.
        run_many([flags_of(tmp_path / name, settings | {"max_steps": "6"})], world_size=4, folder=tmp_path / "lists")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-6)
