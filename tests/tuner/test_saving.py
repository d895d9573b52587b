"""An adapter file is complete, small, and never loaded by half."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from goat_ds import ConfigError
from goat_ds.tuner import layer as layer_module
from tests.models import CAUSAL_LMS, causal_lm, sequence_classifier
from tests.tuner.helpers import disturb, experts_of, goat, logits

FILE = "adapter_model.safetensors"


@pytest.fixture
def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an SVD was taken to load an adapter")

    monkeypatch.setattr(layer_module, "decompose", refuse)


def saved(folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, **settings: Any) -> torch.Tensor:
    """Save a trained adapter and give its logits."""
    model = goat(causal_lm(name, dtype=dtype), **settings)
    disturb(model)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_a_reloaded_adapter_gives_the_same_logits_bit_for_bit(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expected = saved(tmp_path, name)
    request.getfixturevalue("no_svd")
    assert torch.equal(logits(PeftModel.from_pretrained(causal_lm(name), tmp_path)), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "zero"},
        {"init": "pissa_milora"},
        {"adaptive_scale": True},
        {"num_experts": 1, "top_k": 1},
        {"residual": "gated"},
        {"residual": "gated", "adaptive_scale": True, "shared_experts": 1, "dtype": torch.bfloat16},
        {"routing": "threshold", "dtype": torch.bfloat16},
        {"routing": "top_p", "temperature": 0.5},
        {"shared_experts": 2, "top_k": 1, "residual": "fold"},
        {"init": "zero", "shared_A": True, "top_k": 4},
        {"init": "zero", "full_rank": True, "r": 32, "num_experts": 3},
        {"init": "zero", "full_rank": True, "r": 32, "routing": "threshold", "dtype": torch.bfloat16},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*\.0\..*_proj"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "adaptive_scale": True},
    ],
    ids=str,
)
def test_every_kind_of_adapter_is_complete_on_disk(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = saved(tmp_path, **settings)
    base = causal_lm(dtype=settings.get("dtype", torch.float32))
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), expected)


def test_loading_without_a_first_copy_in_memory_gives_the_same_logits(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = PeftModel.from_pretrained(causal_lm(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), expected)
    assert not any(experts.A0.requires_grad for experts in experts_of(model))


def test_an_adapter_file_holds_the_tensors_of_the_fixed_layout(tmp_path: Path) -> None:
    saved(tmp_path, target_modules=["q_proj"])
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / FILE).items() if path in key}
    assert shapes == {
        f"{path}.goat_A": [8, 32],
        f"{path}.goat_B": [32, 8],
        f"{path}.goat_A0": [8, 32],
        f"{path}.goat_B0": [32, 8],
        f"{path}.goat_router": [4, 32],
    }


def test_a_loaded_adapter_trains_like_the_one_that_was_saved(tmp_path: Path) -> None:
    saved(tmp_path)
    model = PeftModel.from_pretrained(causal_lm(), tmp_path, is_trainable=True)
    for experts in experts_of(model):
        trained = {name for name, parameter in experts.named_parameters() if parameter.requires_grad}
        assert trained == {"A", "B", "router"}


def test_a_file_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.goat_B"]
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(RuntimeError, match=r"adapter default lacks base_model.*layers\.1\.mlp\.up_proj\.goat_B$"):
        PeftModel.from_pretrained(causal_lm(), tmp_path)


def test_a_file_for_a_larger_model_is_refused_by_what_is_too_much(tmp_path: Path) -> None:
    saved(tmp_path / "paths")
    saved(tmp_path / "names", target_modules=["q_proj", "v_proj"])
    small = causal_lm()
    del small.model.layers[1]
    with pytest.raises(ConfigError, match=r"target_modules \(model\.layers\.1\..*\) matches no layer"):
        PeftModel.from_pretrained(small, tmp_path / "paths")
    with pytest.raises(RuntimeError, match=r"has no place for: .*layers\.1\..* and 2 more"):
        PeftModel.from_pretrained(small, tmp_path / "names")


def test_half_a_file_over_a_whole_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    half = {key: tensor for key, tensor in load_file(tmp_path / FILE).items() if "layers.0" in key}
    with pytest.raises(RuntimeError, match=r"adapter default lacks base_model.*layers\.1\."):
        set_peft_model_state_dict(goat(), half)


def test_an_empty_file_leaves_an_adapter_that_refuses_to_run(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file({}, tmp_path / FILE)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        model = PeftModel.from_pretrained(causal_lm(), tmp_path)
    with pytest.raises(ConfigError, match="is empty: its config is deferred"):
        logits(model)


def test_the_state_of_a_whole_model_comes_back(tmp_path: Path) -> None:
    model = goat()
    disturb(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = goat(causal_lm(seed=1), deferred=True)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(other), logits(model))


def test_a_classification_head_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = goat(sequence_classifier(), task_type="SEQ_CLS")
    disturb(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(sequence_classifier(), tmp_path)), logits(model))
    assert any("classifier" in key for key in load_file(tmp_path / FILE))
    assert not any("classifier" in key and "goat_" in key for key in load_file(tmp_path / FILE))
