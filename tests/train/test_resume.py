"""Resumed equals uninterrupted, bit for bit, on the same ranks and under the same stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.launching import FEW_HELDOUT, losses_of, metrics_of, run_many

NUM_STEPS, MIDDLE = 6, 3
COMMON = {
    "max_steps": str(NUM_STEPS),
    "save_steps": str(MIDDLE),
    "max_length": "64",
    "eval_data": str(FEW_HELDOUT),
    "learning_rate": "1e-3",
    "r": "16",
    "num_experts": "4",
    "dropout": "0.1",
    "balance_coef": "0.05",
    "seed": "3",
}
ZERO3 = {"ds_config": "ds_configs/zero3.json"}
FP32, BF16 = {"precision": "fp32"}, {"precision": "bf16"}
RATES = {"lr_ratio_B": "2", "router_lr": "5e-4"}
FOUR_BIT = {"load_in_4bit": "true"}
# With a larger rank, so that the names of small tensors stay a small part of a checkpoint.
RANDOM = {"router_noise": "0.5", "expert_dropout": "0.2", "r": "32"}
SAME: dict[str, dict[str, str]] = {
    "zero3 bf16": ZERO3 | BF16,
    "zero3 fp32 GOAT-s, reentrant": ZERO3 | FP32 | {"adaptive_scale": "true", "gradient_checkpointing": "reentrant"},
    "zero2 bf16": {"ds_config": "ds_configs/zero2.json"} | BF16,
    "zero1 fp32, accumulated": {"ds_config": "ds_configs/zero1.json"} | FP32 | {"grad_accum_steps": "2"},
    "offload bf16": {"ds_config": "ds_configs/zero3_offload.json"} | BF16,
    "zero3 4-bit, folded": ZERO3 | BF16 | FOUR_BIT | {"residual": "fold"},
    "zero0 bf16": {"ds_config": "zero0.json"} | BF16,
    "dense before": ZERO3 | BF16 | {"dense_finish": "0.34", "max_length": "256"} | RATES,
    "dense just then": ZERO3 | FP32 | {"dense_finish": "0.5", "max_length": "256"},
    "dense and gated": ZERO3 | BF16 | {"dense_finish": "0.34", "max_length": "256", "residual": "gated"},
    "options": ZERO3 | BF16 | {"routing": "threshold", "shared_experts": "1", "rho_warmup_steps": "5"} | RANDOM,
}


def flags_of(folder: Path, settings: dict[str, str]) -> list[str]:
    places = {"output_dir": folder, "svd_cache": folder.parent / "svd", "token_cache": folder.parent / "tokens"}
    flags = COMMON | settings | {name: str(path) for name, path in places.items()}
    if flags["ds_config"] == "zero0.json":
        flags["ds_config"] = str(folder.parent / "zero0.json")
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


def interrupted_copy(whole: Path, folder: Path) -> Path:
    """Return a folder as a run leaves it that died after its checkpoint in the middle, with metrics of later steps."""
    shutil.copytree(whole, folder)
    for path in folder.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > MIDDLE:
            shutil.rmtree(path)
    return folder


def adapter_of(folder: Path) -> dict[str, Any]:
    return load_file(folder / f"checkpoint-{NUM_STEPS}" / "adapter" / "adapter_model.safetensors")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without what depends on the machine's mood."""
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_s", "peak_mem_gib", "dense_finish")}
        for line in metrics_of(folder)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train every variant on two ranks, then each again from its middle; return the folder of all of them."""
    root = tmp_path_factory.mktemp("resume")
    (root / "zero0.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    run_many([flags_of(root / name, settings) for name, settings in SAME.items()], world_size=2, folder=root)
    again = [
        [*flags_of(interrupted_copy(root / name, root / f"{name} again"), settings), "--resume", "auto"]
        for name, settings in SAME.items()
    ]
    run_many(again, world_size=2, folder=root / "again")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(runs: Path, name: str) -> None:
    assert len(losses_of(runs / name)) == NUM_STEPS
    assert lines_of(runs / f"{name} again") == lines_of(runs / name)
    expected, found = adapter_of(runs / name), adapter_of(runs / f"{name} again")
    assert expected.keys() == found.keys()
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    assert (runs / f"{name} again" / "metrics.redone.jsonl").exists()


@pytest.mark.slow
def test_a_checkpoint_is_small_and_holds_no_frozen_weight(runs: Path) -> None:
    for folder in runs.glob("*/checkpoint-*"):
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        adapter = sum(size for path, size in sizes.items() if path.parent.name == "adapter")
        sample = (folder / "calibration.safetensors").stat().st_size
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        names = ("A", "B", "router", "threshold", "threshold_bias")
        trained = sum(t.numel() for key, t in tensors.items() if key.rpartition("goat_")[2] in names)
        assert sum(sizes.values()) - sample <= 1.02 * (12 * trained + adapter)
