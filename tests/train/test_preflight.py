"""What a base's config, the tokenizer and the device say against a run before a weight is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from goat_ds import demo
from goat_ds.errors import ConfigError
from goat_ds.train import preflight
from goat_ds.train.config import TrainConfig
from goat_ds.zero import engine
from goat_ds.zero.engine import Attention, Precision
from goat_ds.zero.ranks import Ranks
from tests.launching import REPOSITORY

ALONE = Ranks(world_rank=0, world_size=1, local_rank=0)


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
    return list(preflight.problems(config, ALONE))


def test_a_base_as_it_should_be_has_no_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, model=base_with(tmp_path)) == []


def test_everything_wrong_with_the_base_is_told_at_once(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8"}, "vocab_size": 100}
    base = base_with(tmp_path, **quantised)
    found = problems(tmp_path, model=base, max_length=100_000)
    for words in (
        f"model ({base}) is quantised (fp8), which experts cannot start from; use the unquantised base",
        "max_length (100000) is above the model's max_position_embeddings (2048); lower it",
        "has no row in the embedding (vocab_size 100)",
    ):
        assert sum(words in problem for problem in found) == 1, (words, found)


def test_an_added_token_that_nothing_brings_needs_no_row(tmp_path: Path) -> None:
    base = base_with(tmp_path)
    tokenizer = preflight.load_tokenizer(base)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    engine.check_base(base, max_length=64, tokenizer=tokenizer)
    tokenizer.pad_token = "<image_soft_token>"
    with pytest.raises(ConfigError, match=r"highest token id \(1024, '<image_soft_token>'\) has no row"):
        engine.check_base(base, max_length=64, tokenizer=tokenizer)


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
