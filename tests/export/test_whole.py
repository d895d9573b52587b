"""Whole experts leave as an adapter, and every form that low-rank experts have is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from goat_ds.errors import ConfigError, ExportError
from goat_ds.export import export_adapter, export_dense, export_exact, export_lora, read_adapter
from tests.export.conftest import TOKENS, Trained, adapt, train

# transformers 5.23 deprecates what PEFT 0.21 asks every model for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WHOLE: dict[str, Any] = {"full_rank": True, "init": "zero", "r": 32, "eta": 1.0}
WEIGHTS, UP_PROJ = "adapter_model.safetensors", "model.layers.0.mlp.up_proj"


@pytest.fixture
def whole(tmp_path: Path) -> Trained:
    """A LLaMA base with whole experts on all linear layers."""
    return train(tmp_path, "llama", **WHOLE)


def test_the_exported_adapter_gives_the_trained_logits_bit_for_bit(tmp_path: Path, whole: Trained) -> None:
    export_adapter(whole.adapter, output=tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(whole.base)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, whole.logits())


def test_the_card_says_that_experts_are_whole_and_nothing_of_ranks(tmp_path: Path, whole: Trained) -> None:
    export_adapter(whole.adapter, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A mixture of whole copies" in card and "| full_rank | True |" in card and "- mixture-of-experts" in card
    assert "| r |" not in card and "| scaling |" not in card and "- lora" not in card


@pytest.mark.parametrize(("export", "mode"), [(export_exact, "exact"), (export_dense, "dense"), (export_lora, "lora")])
def test_forms_of_low_rank_experts_are_refused(
    tmp_path: Path, whole: Trained, export: Callable[..., Any], mode: str
) -> None:
    with pytest.raises(ConfigError, match=rf"mode \({mode}\) is for low-rank experts, .* \(full_rank\); use mode adap"):
        export(whole.adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, whole: Trained) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(whole.base)
    with torch.no_grad():
        model.get_submodule(UP_PROJ).weight.mul_(2)
    model.save_pretrained(other)
    with pytest.raises(ExportError, match="its weights are not those that"):
        export_adapter(whole.adapter, output=tmp_path / "out", base=str(other))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (None, rf"{UP_PROJ}.goat_D is missing"),
        ((0,), rf"{UP_PROJ}.goat_D is empty \[0\]: it was saved while its parameter was sharded"),
        ((3, 8, 32), rf"{UP_PROJ}.goat_D is \[3, 8, 32\], the settings say \[4, 8, 32\]"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(whole: Trained, shape: tuple[int, ...] | None, words: str) -> None:
    tensors = load_file(whole.adapter / WEIGHTS)
    key = f"base_model.model.{UP_PROJ}.goat_D"
    del tensors[key]
    if shape is not None:
        tensors[key] = torch.zeros(shape)
    save_file(tensors, whole.adapter / WEIGHTS)
    with pytest.raises(ExportError, match=words):
        read_adapter(whole.adapter)


def test_an_adapter_that_no_longer_says_what_its_experts_are_is_refused(whole: Trained) -> None:
    path = whole.adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["full_rank"]
    path.write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"adapter_config\.json lacks full_rank"):
        read_adapter(whole.adapter)


def test_one_whole_expert_is_read_without_a_router(tmp_path: Path, whole: Trained) -> None:
    alone = adapt(whole.base, tmp_path / "alone", **WHOLE, num_experts=1, top_k=1)
    found = read_adapter(alone.adapter)
    assert set(found.layers[UP_PROJ]) == {"D"} and not found.is_routed
    assert found.in_features(UP_PROJ) == 32 and found.dtype == torch.float32
