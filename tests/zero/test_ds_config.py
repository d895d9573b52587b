"""A DeepSpeed config and the flags become one config, or one message."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from goat_ds.zero import ds_config
from goat_ds.zero.ds_config import EngineSettings, Precision
from tests.launching import REPOSITORY

SETTINGS = EngineSettings(
    world_size=2,
    micro_batch_size=3,
    grad_accum_steps=4,
    precision=Precision.BF16,
    learning_rate=1e-4,
    weight_decay=0.1,
    adam_betas=(0.9, 0.95),
    adam_eps=1e-8,
    max_grad_norm=1.0,
    torch_adam=True,
)
SHIPPED = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def problems(config: dict[str, Any], **changes: Any) -> list[str]:
    return list(ds_config.problems(config, dataclasses.replace(SETTINGS, **changes)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_fit_any_flags_and_stand_in_the_table(path: Path) -> None:
    config, unreadable = ds_config.read(path)
    assert not unreadable and not problems(config)
    assert not problems(config, precision=Precision.FP16, micro_batch_size=7)
    assert f"`{path.name}`" in (REPOSITORY / "ds_configs" / "README.md").read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_nothing_is_left_auto_after_filling(path: Path) -> None:
    filled = ds_config.fill(ds_config.read(path)[0], SETTINGS)
    assert '"auto"' not in json.dumps(filled)
    assert filled["train_batch_size"] == 3 * 4 * 2
    assert filled["bf16"]["enabled"] is True and filled["fp16"]["enabled"] is False
    assert filled["optimizer"]["params"] == {
        "lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True,
    }  # fmt: skip


def test_a_missing_file_and_bad_json_are_named(tmp_path: Path) -> None:
    assert ds_config.read(tmp_path / "no.json")[1] == [f"ds_config ({tmp_path / 'no.json'}) does not exist"]
    (tmp_path / "bad.json").write_text('{\n "a": 1,\n}')
    (problem,) = ds_config.read(tmp_path / "bad.json")[1]
    assert "bad.json line 3: not JSON" in problem


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16.enabled and fp16.enabled are both true"),
        ({"train_batch_size": 25}, "train_batch_size (25) must equal micro_batch_size (3) x grad_accum_steps (4)"),
        ({"train_micro_batch_size_per_gpu": 5}, "(5) contradicts micro_batch_size (3)"),
        ({"gradient_clipping": 0.5}, "gradient_clipping (0.5) contradicts max_grad_norm (1.0)"),
        ({"bf16": {"enabled": False}}, "bf16.enabled (False) contradicts precision bf16 (True)"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, "optimizer.params.lr (0.0003) contradicts"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type (Lamb) must be AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by --lr_scheduler"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage (4) must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "(nvme) is not supported"),
    ],
)
def test_a_contradiction_is_refused_in_one_line(config: dict[str, Any], expected: str) -> None:
    (problem,) = problems(config)
    assert expected in problem
