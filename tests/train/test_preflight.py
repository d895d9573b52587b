"""What a base's config, the tokenizer and the device say against a run before a weight is read."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from goat_ds import demo
from goat_ds.base.inspect import inspect
from goat_ds.data import load_tokenizer
from goat_ds.distributed.lock import LOCK_NAME
from goat_ds.errors import ConfigError
from goat_ds.precision import Precision
from goat_ds.train import preflight
from goat_ds.train.config import TrainConfig
from goat_ds.train.inputs import read_inputs
from goat_ds.train.resume import look
from goat_ds.tuner.config import Residual
from goat_ds.zero import engine, quantize
from goat_ds.zero.engine import Attention
from tests.launching import REPOSITORY
from tests.models import causal_lm


def base_with(folder: Path, **changes: Any) -> str:
    """Copy the demo's base without its weights, with other values in its config."""
    shutil.copytree(demo.base_path(), folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder / "base")


def problems(folder: Path, **settings: Any) -> list[str]:
    config = TrainConfig(
        **{"ds_config": str(REPOSITORY / "ds_configs" / "zero3.json"), "output_dir": str(folder / "run")}
        | {"data": [str(demo.train_data())], "eval_data": [str(demo.heldout_data())]}
        | settings
    )
    resumption = look(config)
    return list(preflight.problems(resumption, read_inputs(resumption.config)))


def test_a_base_as_it_should_be_has_no_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, model=base_with(tmp_path)) == []


def test_a_folder_with_nothing_but_the_lock_of_a_killed_run_is_empty(tmp_path: Path) -> None:
    base, lock = base_with(tmp_path), tmp_path / "run" / LOCK_NAME
    lock.parent.mkdir()
    lock.touch()
    assert problems(tmp_path, model=base) == []
    assert problems(tmp_path, model=base, resume="auto") == []
    assert look(TrainConfig(output_dir=str(lock.parent), resume="auto")).checkpoint is None
    (lock.parent / "notes").touch()
    (problem,) = problems(tmp_path, model=base)
    assert problem.startswith(f"output_dir ({lock.parent}) is not empty")


def test_everything_wrong_with_the_base_is_told_at_once(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8"}, "vocab_size": 100}
    base = base_with(tmp_path, **quantised)
    found = problems(tmp_path, model=base, max_length=100_000)
    for words in (
        f"model ({base}) is quantised (fp8), which experts cannot start from; use the unquantised base, or one that",
        "max_length (100000) is above the model's max_position_embeddings (2048); lower it",
        "has no row in the embedding (vocab_size 100)",
    ):
        assert sum(words in problem for problem in found) == 1, (words, found)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model_type": "stranger",
            "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"},
        },
        {"architectures": ["Model"], "auto_map": {"AutoModelForCausalLM": "strange.Model"}},
    ],
)
def test_a_base_that_needs_code_of_its_author_is_refused_and_the_code_never_runs(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_with(tmp_path, **changes)
    Path(base, "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks at the terminal"))
    assert problems(tmp_path, model=base) == [
        f"model ({base}) needs code of its author (auto_map: strange.Model), and goat_ds runs no code that comes with "
        "a model; use a base whose architecture transformers has itself"
    ]
    assert not (tmp_path / "ran").exists()


def test_a_name_of_code_that_transformers_has_taken_over_is_no_trouble(tmp_path: Path) -> None:
    base = base_with(tmp_path, auto_map={"AutoModelForCausalLM": "strange.Model"})
    assert problems(tmp_path, model=base) == []


NF4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
LLM_INT8 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}}


def test_a_base_that_bitsandbytes_has_quantised_to_4_bits_is_welcome(tmp_path: Path) -> None:
    assert problems(tmp_path, model=base_with(tmp_path, **NF4)) == []


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        (LLM_INT8, "bitsandbytes in 8 bits"),
    ],
)
def test_a_base_that_is_quantised_in_another_way_is_refused(
    changes: dict[str, Any], method: str, tmp_path: Path
) -> None:
    base = base_with(tmp_path, **changes)
    (found,) = problems(tmp_path, model=base)
    assert f"model ({base}) is quantised ({method}), which experts cannot start from" in found


def test_what_a_4bit_base_cannot_do_is_told_at_once(tmp_path: Path) -> None:
    base = base_with(tmp_path, **NF4)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    found = problems(
        tmp_path, model=base, ds_config=str(tmp_path / "ds.json"), load_in_4bit=True, residual=Residual.FOLD
    )
    for words in (
        f"load_in_4bit: model ({base}) is quantised already; leave load_in_4bit out",
        f"residual (fold) cannot be subtracted from model ({base}), which is 4-bit already; use residual lowrank",
        "zero_optimization.zero_quantized_weights (true) cannot hold a 4-bit base; leave it out",
    ):
        assert sum(words in problem for problem in found) == 1, (words, found)


def test_what_a_base_that_is_4bit_already_cannot_do_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    base, settings = base_with(tmp_path, **NF4), {"residual": Residual.FOLD, "ds_config": str(tmp_path / "ds.json")}
    found = problems(tmp_path, model=base, **settings)
    assert len(found) == 2
    assert any("residual (fold) cannot be subtracted" in problem for problem in found)
    assert any("zero_quantized_weights (true) cannot hold a 4-bit base" in problem for problem in found)


def test_a_compute_dtype_needs_a_4bit_base(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, model=base_with(tmp_path), bnb_4bit_compute_dtype=Precision.FP32)
    assert "bnb_4bit_compute_dtype (fp32) has no effect on an unquantised base; use load_in_4bit" in found
    (tmp_path / "4").mkdir()
    stored = base_with(tmp_path / "4", **NF4)
    assert problems(tmp_path, model=stored, bnb_4bit_compute_dtype=Precision.FP32) == []


def test_keeping_everything_in_high_precision_is_refused(tmp_path: Path) -> None:
    kept = ["self_attn", "mlp"]
    found = problems(tmp_path, model=base_with(tmp_path), load_in_4bit=True, keep_in_high_precision=kept)
    assert found == ["keep_in_high_precision (self_attn mlp) leaves no layer to become 4-bit; keep fewer"]


def test_two_layers_that_share_a_weight_are_refused() -> None:
    skeleton = causal_lm()
    skeleton.model.layers[1].mlp.up_proj.weight = skeleton.model.layers[0].mlp.up_proj.weight
    quantization = TrainConfig(load_in_4bit=True).quantization()
    assert quantization is not None
    (found,) = quantize.misfits(skeleton, quantization)
    assert "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj share one weight" in found


def test_files_are_mapped_only_where_they_hold_the_dtype_of_the_run(tmp_path: Path) -> None:
    model = causal_lm()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    base = inspect(str(tmp_path))
    assert quantize.can_be_mapped(base, dtype=torch.float32)
    # What a config says of its files need not be true.
    base.config.dtype = torch.bfloat16
    assert not quantize.can_be_mapped(base, dtype=torch.bfloat16)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    assert not quantize.can_be_mapped(base, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("zero_hpz_partition_size", 2),
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("use_all_reduce_for_fetch_params", True),
    ],
)
def test_settings_that_deepspeed_cannot_combine_with_a_4bit_base_are_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, name: value}}))
    base, ds_config = base_with(tmp_path), str(tmp_path / "ds.json")
    words = f"zero_optimization.{name} ({json.dumps(value)}) cannot hold a 4-bit base"
    assert any(words in problem for problem in problems(tmp_path, model=base, ds_config=ds_config, load_in_4bit=True))
    assert not any("4-bit" in problem for problem in problems(tmp_path, model=base, ds_config=ds_config))


def test_folding_before_quantising_is_allowed(tmp_path: Path) -> None:
    assert problems(tmp_path, model=base_with(tmp_path), load_in_4bit=True, residual=Residual.FOLD) == []


def test_a_block_that_does_not_divide_a_layer_is_refused_by_the_layer(tmp_path: Path) -> None:
    base = base_with(tmp_path, intermediate_size=300)
    (found, *others) = problems(tmp_path, model=base, load_in_4bit=True, bnb_4bit_blocksize=1024)
    assert "bnb_4bit_blocksize (1024) does not divide model.layers.0.mlp." in found
    assert "use a smaller one, or name the layer in keep_in_high_precision" in found
    assert all("does not divide" in other for other in others)
    kept = ["gate_proj", "up_proj", "down_proj"]
    again = problems(tmp_path, model=base, load_in_4bit=True, bnb_4bit_blocksize=1024, keep_in_high_precision=kept)
    assert again == []


def test_a_block_size_that_does_not_exist_and_a_name_that_matches_nothing_are_refused(tmp_path: Path) -> None:
    base = base_with(tmp_path)
    (found,) = problems(tmp_path, model=base, load_in_4bit=True, bnb_4bit_blocksize=48)
    assert found == "bnb_4bit_blocksize (48) must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096"
    (found,) = problems(tmp_path, model=base, load_in_4bit=True, keep_in_high_precision=["q_porj"])
    assert "keep_in_high_precision (q_porj) matches no layer that becomes 4-bit; these are: down_proj, gate" in found


def test_a_missing_library_is_told_beside_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = problems(tmp_path, model=base_with(tmp_path), load_in_4bit=True, max_length=100_000)
    assert any("a 4-bit base needs bitsandbytes, which does not load" in problem for problem in found)
    assert any("max_length (100000) is above" in problem for problem in found)


def test_an_added_token_that_nothing_brings_needs_no_row(tmp_path: Path) -> None:
    base = base_with(tmp_path)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    assert not list(inspect(base).misfits(max_length=64, tokenizer=tokenizer))
    tokenizer.pad_token = "<image_soft_token>"
    (found,) = inspect(base).misfits(max_length=64, tokenizer=tokenizer)
    assert "highest token id (1024, '<image_soft_token>') has no row" in found


def test_a_base_that_is_not_there_is_told_once_for_each_part(tmp_path: Path) -> None:
    found = problems(tmp_path, model=str(tmp_path / "no"))
    assert len(found) == len(set(found)) == 2


def test_a_config_file_of_the_wrong_shape_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": 3}')
    (found,) = problems(tmp_path, model=base_with(tmp_path), ds_config=str(tmp_path / "ds.json"))
    assert "zero_optimization (3) must be a JSON object" in found


def test_flash_attention_is_not_chosen_and_not_allowed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.ranks, "has_cuda", lambda: True)
    monkeypatch.setattr(engine, "is_flash_attn_2_available", lambda: True)
    assert engine.choose_attention(Attention.AUTO, precision=Precision.BF16) is Attention.FLASH_ATTENTION_2
    assert engine.choose_attention(Attention.AUTO, precision=Precision.FP32) is Attention.SDPA
    with pytest.raises(ConfigError, match=r"attn \(flash_attention_2\) has no precision fp32; use precision bf16"):
        engine.choose_attention(Attention.FLASH_ATTENTION_2, precision=Precision.FP32)
