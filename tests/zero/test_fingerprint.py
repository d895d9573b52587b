"""Ranks that each see some layers know their base as one process that sees all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from goat_ds import GoatConfig, demo
from tests.launching import run_many

ZERO3 = {"ds_config": "ds_configs/zero3.json"}
# On two ranks, in bf16; files in fp32 cannot be mapped as they are.
RUNS: dict[str, dict[str, str]] = {
    "zero2": {"ds_config": "ds_configs/zero2.json"},
    "zero3": ZERO3,
    "zero3, fold": ZERO3 | {"residual": "fold"},
    "zero3, zero": ZERO3 | {"init": "zero"},
    "zero3, 4-bit": ZERO3 | {"load_in_4bit": "true"},
    "zero3, 4-bit, fold": ZERO3 | {"load_in_4bit": "true", "residual": "fold"},
    "zero3, 4-bit, zero": ZERO3 | {"load_in_4bit": "true", "init": "zero"},
    "zero3, 4-bit, bf16 files": ZERO3 | {"load_in_4bit": "true", "model": "narrow"},
    "zero2, 4-bit": {"ds_config": "ds_configs/zero2.json", "load_in_4bit": "true"},
}
STORED = {"stored": ZERO3 | {"model": "stored"}, "stored, zero": ZERO3 | {"model": "stored", "init": "zero"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base in fp32, with values that bf16 rounds, in bf16, and in 4 bits."""
    root = tmp_path_factory.mktemp("fingerprint")
    wide = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) / 256)
    wide.save_pretrained(root / "wide")
    AutoModelForCausalLM.from_pretrained(root / "wide", dtype=torch.bfloat16).save_pretrained(root / "narrow")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(root / "wide", quantization_config=quantization)
    stored.save_pretrained(root / "stored")
    for name in ("wide", "narrow", "stored"):
        AutoTokenizer.from_pretrained(demo.base_path()).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def recorded(root: Path) -> dict[str, Any]:
    """Train each run for a step; return what its checkpoint says of the base."""
    common = {"max_steps": "1", "max_length": "64", "r": "8", "num_experts": "4", "precision": "bf16", "model": "wide"}
    command_lines = []
    for name, settings in (RUNS | STORED).items():
        flags = common | settings | {"data": str(demo.train_data()), "output_dir": str(root / name)}
        flags |= {"model": str(root / flags["model"]), "svd_cache": str(root / "svd"), "token_cache": str(root / "t")}
        command_lines.append([word for flag, value in flags.items() for word in (f"--{flag}", value)])
    run_many(command_lines, world_size=2, folder=root)
    configs = {name: root / name / "checkpoint-1" / "adapter" / "adapter_config.json" for name in RUNS | STORED}
    return {name: json.loads(path.read_text())["base_fingerprint"] for name, path in configs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_know_the_base_as_one_process_does(name: str, recorded: dict[str, Any], root: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(root / "wide", dtype=torch.bfloat16)
    whole = get_peft_model(base, GoatConfig(r=8, num_experts=4, init="zero", task_type="CAUSAL_LM"))
    assert recorded[name] == whole.peft_config["default"].base_fingerprint
    assert recorded[name]["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_a_base_that_was_4bit_before_has_none(name: str, recorded: dict[str, Any]) -> None:
    assert recorded[name] is None
