"""A 4-bit base trains the same on any ranks and stage, and as bitsandbytes' own layers do in plain torch."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from goat_ds import demo
from goat_ds.export import read_adapter
from goat_ds.train.cli import parse
from tests.launching import losses_of, metrics_of, run_many
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

NF4 = {"load_in_4bit": "true"}
DOUBLE = NF4 | {"bnb_4bit_use_double_quant": "true"}
KEPT = NF4 | {"keep_in_high_precision": "v_proj"}
FOLD = NF4 | {"residual": "fold"}
STORED = {"model": "stored"}
# The demo's files are in bf16: in fp32 they are cast into shards, in bf16 they are mapped.
MAPPED = FOLD | {"precision": "bf16", "keep_in_high_precision": "v_proj"}

ON_ONE_RANK = {
    "nf4": ZERO3 | TWO_IN_ONE_STEP | NF4,
    "nf4, reentrant": ZERO3 | TWO_IN_ONE_STEP | FEWER_STEPS | NF4 | {"gradient_checkpointing": "reentrant"},
    "nf4, zero1": {"ds_config": "ds_configs/zero1.json"} | TWO_IN_ONE_STEP | FEWER_STEPS | NF4,
    "double": ZERO3 | TWO_IN_ONE_STEP | DOUBLE,
    "kept": ZERO3 | TWO_IN_ONE_STEP | KEPT,
    "fold": ZERO3 | TWO_IN_ONE_STEP | FOLD,
    "stored": ZERO3 | TWO_IN_ONE_STEP | STORED,
    "mapped": ZERO3 | TWO_IN_ONE_STEP | MAPPED,
    "unquantised": ZERO3 | TWO_IN_ONE_STEP,
    "fast": ZERO3 | TWO_IN_ONE_STEP | NF4 | {"learning_rate": "4e-3"},
}
# By the run on one rank that each must equal.
ON_TWO_RANKS = {
    "nf4": {
        "zero1": {"ds_config": "ds_configs/zero1.json"} | NF4,
        "zero2": {"ds_config": "ds_configs/zero2.json"} | NF4,
        "zero3": ZERO3 | NF4,
        "reentrant": ZERO3 | NF4 | {"gradient_checkpointing": "reentrant"},
        "non-reentrant": ZERO3 | NF4 | {"gradient_checkpointing": "non_reentrant"},
        "offload": {"ds_config": "ds_configs/zero3_offload.json"} | NF4,
    },
    "double": {"zero3": ZERO3 | DOUBLE},
    "kept": {"zero3": ZERO3 | KEPT},
    "fold": {"zero3": ZERO3 | FOLD, "zero2": {"ds_config": "ds_configs/zero2.json"} | FOLD},
    "mapped": {"zero3": ZERO3 | MAPPED},
    "stored": {"zero3": ZERO3 | STORED, "zero2": {"ds_config": "ds_configs/zero2.json"} | STORED},
}
PAIRS = [(like, name) for like, variants in ON_TWO_RANKS.items() for name in variants]
# Of these runs on two ranks the end is looked at; the others have the first steps of those on one rank.
LONG = [("nf4", "zero3")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base as bitsandbytes stores it: of bf16, where runs are in fp32, and in storage of bf16."""
    root = tmp_path_factory.mktemp("trajectories_4bit")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(
        demo.base_path(), dtype=torch.bfloat16, quantization_config=quantization
    )
    base.save_pretrained(root / "stored")
    AutoTokenizer.from_pretrained(demo.base_path()).save_pretrained(root / "stored")
    return root


def flags_of(root: Path, name: str, settings: dict[str, str]) -> list[str]:
    """Return the command line of a run."""
    places = {"output_dir": str(root / name), "svd_cache": str(root / "svd"), "token_cache": str(root / "tokens")}
    flags = {"model": str(demo.base_path()), "data": str(demo.train_data())} | COMMON | places | settings
    flags["model"] = flags["model"].replace("stored", str(root / "stored"))
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """Train every variant."""
    one = [flags_of(root, f"1 {name}", settings) for name, settings in ON_ONE_RANK.items()]
    two = [
        flags_of(root, f"2 {like} {name}", ON_TWO_RANKS[like][name] | ({} if (like, name) in LONG else FEWER_STEPS))
        for like, name in PAIRS
    ]
    run_many(one, world_size=1, folder=root)
    run_many(two, world_size=2, folder=root)
    return root


def grad_norms_of(folder: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics_of(folder) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("like", "name"), PAIRS)
def test_two_ranks_give_the_losses_of_one_process(like: str, name: str, trained: Path) -> None:
    expected, losses = losses_of(trained / f"1 {like}"), losses_of(trained / f"2 {like} {name}")
    num_steps = NUM_STEPS if (like, name) in LONG else NUM_FEWER_STEPS
    assert (len(expected), len(losses)) == (NUM_STEPS, num_steps)
    assert losses == pytest.approx(expected[:num_steps], abs=1e-5)
    expected, norms = grad_norms_of(trained / f"1 {like}"), grad_norms_of(trained / f"2 {like} {name}")
    assert norms == pytest.approx(expected[:num_steps], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4, reentrant", "nf4, zero1"])
def test_checkpointing_and_stage_change_nothing_beyond_rounding(name: str, trained: Path) -> None:
    losses = losses_of(trained / f"1 {name}")
    assert len(losses) == NUM_FEWER_STEPS
    assert losses == pytest.approx(losses_of(trained / "1 nf4")[:NUM_FEWER_STEPS], abs=1e-5)


@pytest.mark.slow
def test_a_4bit_base_is_another_base_and_near_the_unquantised_one(trained: Path) -> None:
    plain = losses_of(trained / "1 unquantised")
    for name in ("nf4", "double", "kept", "fold", "stored"):
        losses = losses_of(trained / f"1 {name}")
        gap = sum(abs(a - b) for a, b in zip(losses, plain, strict=True)) / sum(plain)
        print(f"{name}: mean gap to the losses on the unquantised base {gap:.2%}")
        assert 0.001 < gap < 0.1
    assert losses_of(trained / "1 nf4") != losses_of(trained / "1 double")


@pytest.mark.slow
def test_a_run_on_a_4bit_base_learns(trained: Path) -> None:
    losses = losses_of(trained / "1 fast")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.slow
def test_the_adapter_says_which_base_it_was_trained_on(trained: Path) -> None:
    nf4 = {"quant_type": "nf4", "block_size": 64, "double_quant": False, "kept": []}
    nf4 |= {"dtype": "float32", "weight_dtype": "float32", "compute_dtype": "float32"}
    v_proj = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(3)]
    expected = {
        "unquantised": None,
        "nf4": nf4,
        "double": nf4 | {"double_quant": True},
        "kept": nf4 | {"kept": v_proj},
        "stored": nf4 | {"quant_type": "fp4", "weight_dtype": "bfloat16"},
    }
    for name, quantization in expected.items():
        assert read_adapter(trained / f"1 {name}").config.base_quantization == quantization
    two = load_file(trained / "2 nf4 zero3" / f"checkpoint-{NUM_STEPS}" / "adapter" / "adapter_model.safetensors")
    one = load_file(trained / "1 nf4" / f"checkpoint-{NUM_STEPS}" / "adapter" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)


@pytest.mark.slow
def test_the_first_step_is_that_of_bitsandbytes_layers_in_plain_torch(trained: Path) -> None:
    config = parse(flags_of(trained, "1 nf4", ON_ONE_RANK["nf4"]))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32, quantization_config=quantization)
    model: Any = get_peft_model(base, dataclasses.replace(config.adapter(), deferred=True)).train()
    plain = AutoModelForCausalLM.from_pretrained(demo.base_path(), dtype=torch.float32)
    # The experts of the run started from the unquantised weights.
    start_as_the_run_did(model, config, lambda path: plain.get_submodule(path).weight.detach())
    step = first_step(model, config)
    first = metrics_of(trained / "1 nf4")[0]
    assert first["loss"] == pytest.approx(step.loss, abs=1e-5)
    assert first["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-4)
