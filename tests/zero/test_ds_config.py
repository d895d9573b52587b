"""A DeepSpeed config and the flags become one config, or one message."""

import dataclasses
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

from goat_ds.errors import ConfigError
from goat_ds.precision import Precision
from goat_ds.zero import ds_config, sizes
from goat_ds.zero.ds_config import EngineSettings
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


def test_a_folder_and_a_file_that_is_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path, tmp_path / "bad.json"):
        (problem,) = ds_config.read(path)[1]
        assert problem.startswith(f"ds_config ({path}) cannot be read: ")


def test_a_dtype_of_gradients_that_is_none_is_refused_in_one_line() -> None:
    for name in ("fp31", ["fp32"]):
        with pytest.raises(ConfigError) as refused:
            sizes.read({"data_types": {"grad_accum_dtype": name}}, model_dtype=torch.bfloat16)
        (problem,) = refused.value.problems
        assert problem.startswith(f"ds_config: data_types.grad_accum_dtype ({name}) must be fp32, bf16 or fp16")


def hpz(size: Any, *, stage: int = 3) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "zero_hpz_partition_size": size}}


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
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device (nvme) is not"),
        ({"gradient_cliping": 1.0}, "gradient_cliping is not a key of DeepSpeed's; did you mean gradient_clipping?"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is not a key of DeepSpeed's; did you mean bf16?"),
        (hpz(3), "zero_hpz_partition_size (3) must divide the number of ranks (2); set it to the ranks of one node"),
        (hpz(4), "zero_hpz_partition_size (4) must divide the number of ranks (2)"),
        (hpz(2, stage=2), "zero_hpz_partition_size (2) has no effect at stage 2; use stage 3, or leave it out"),
        ({"xyzzy": 1}, "xyzzy is not a key of DeepSpeed's; leave it out"),
    ],
)
def test_a_contradiction_is_refused_in_one_line(config: dict[str, Any], expected: str) -> None:
    (problem,) = problems(config)
    assert expected in problem


def test_no_sharding_in_fp32_is_refused_for_it_has_no_gradient_norm() -> None:
    (problem,) = problems({}, precision=Precision.FP32)
    assert "zero_optimization.stage (0) reports no gradient norm in precision fp32; use stage 1" in problem
    assert not problems({}) and not problems({"zero_optimization": {"stage": 1}}, precision=Precision.FP32)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"bf16": True}, "bf16 (true) must be a JSON object"),
        ({"zero_optimization": 3}, "zero_optimization (3) must be a JSON object"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage ("auto") must be 0, 1, 2 or 3'),
        ({"zero_optimization": {"offload_param": "cpu"}}, 'zero_optimization.offload_param ("cpu") must be'),
        (hpz("auto"), 'zero_hpz_partition_size ("auto") must be the ranks of a node'),
        (hpz(-2), "zero_hpz_partition_size (-2) must be the ranks of a node"),
        ({"optimizer": {"params": []}}, "optimizer.params ([]) must be a JSON object"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_when_the_file_is_read(
    content: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    (problem,) = ds_config.read(path)[1]
    assert expected in problem


def test_a_batch_size_that_counts_micro_batches_ranks_and_accumulation_is_right() -> None:
    assert not list(ds_config.problems({"train_batch_size": 3 * 4 * 2}, SETTINGS))
    for size in (3 * 4, 3 * 2, 4 * 2):
        (problem,) = ds_config.problems({"train_batch_size": size}, SETTINGS)
        assert "x ranks (2) = 24" in problem


def test_the_known_keys_are_those_that_deepspeed_knows() -> None:
    ours = {"train_batch_size", "zero_optimization", "csv_monitor", "wandb", "tensorboard", "comms_logger", "aio"}
    assert ours <= ds_config.KNOWN_KEYS
    assert not ds_config.KNOWN_KEYS & _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("is_installed", [True, False])
def test_tensorboard_is_refused_where_its_package_is_not_installed(
    is_installed: bool, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("tensorboard") if is_installed else None
    if module is not None:
        module.__spec__ = ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", module)
    found = problems({"tensorboard": {"enabled": enabled}})
    assert len(found) == (enabled and not is_installed)
    assert all("needs the tensorboard package (pip install 'goat_ds[tensorboard]')" in line for line in found)


def test_what_has_not_been_tried_is_allowed_and_told() -> None:
    zero = {"stage": 3, "zero_quantized_gradients": True, "zero_quantized_weights": True}
    config = {"zero_optimization": zero, "torch_autocast": {"enabled": True}, "activation_checkpointing": {}}
    assert not problems(config)
    assert [warning.split()[1] for warning in ds_config.warnings(config)] == [
        "torch_autocast", "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_gradients",
        "activation_checkpointing",
    ]  # fmt: skip
    quiet = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}, "torch_autocast": {"enabled": False}}
    assert not list(ds_config.warnings(quiet))


@pytest.mark.parametrize(
    ("size", "ranks_per_node", "expected"),
    [
        (8, [8, 8], None),
        (1, [8], None),
        (0, [8, 4], None),
        (8, [8], "(8) holds parameters twice to spare the network between nodes, and there is one node; leave it out"),
        (4, [8, 8], "(4) is meant to be the ranks of a node (8, 8), so that backward gathers parameters inside of it"),
        (4, [8, 4], "(4) is meant to be the ranks of a node (8, 4)"),
        (16, [8, 8], "(16) is meant to be the ranks of a node (8, 8)"),
    ],
)
def test_a_second_copy_of_parameters_that_is_not_a_nodes_own_is_told(
    size: int, ranks_per_node: list[int], expected: str | None
) -> None:
    assert not problems(hpz(size), world_size=sum(ranks_per_node))
    told = list(ds_config.hpz_warnings(hpz(size), ranks_per_node))
    assert len(told) == (expected is not None)
    assert all(expected is not None and expected in line for line in told)
