"""A base is known by its content: by any of its adapted weights, however the adapter starts on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from goat_ds import GoatConfig
from goat_ds.errors import ConfigError
from goat_ds.tuner.fingerprint import NUM_VALUES, LayerSample, fingerprint, sample_layer
from tests.models import causal_lm
from tests.tuner.helpers import goat


def recorded(model: nn.Module | None = None, **settings: Any) -> dict[str, str] | None:
    return goat(model, **settings).peft_config["default"].base_fingerprint


def linear_samples(model: nn.Module, *, prefix: str = "") -> dict[str, LayerSample]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {prefix + path: sample_layer(layer.weight) for path, layer in layers.items() if path != "lm_head"}


def test_a_fingerprint_is_that_of_the_adapted_weights_under_their_paths_in_the_base() -> None:
    assert recorded() == fingerprint(linear_samples(causal_lm()))._asdict()
    assert recorded() != fingerprint(linear_samples(causal_lm(), prefix="other."))._asdict()


@pytest.mark.parametrize("settings", [{"residual": "fold"}, {"init": "zero"}, {"init": "pissa"}, {"r": 4}], ids=str)
def test_how_experts_start_says_nothing_of_their_base(settings: dict[str, Any]) -> None:
    assert recorded(**settings) == recorded()


def test_another_base_and_other_layers_have_another_fingerprint() -> None:
    other = causal_lm()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[-1, -1] += 1e-3
    names = [recorded(), recorded(causal_lm(seed=1)), recorded(other), recorded(target_modules=["q_proj"])]
    assert len({found["sha256"] for found in names if found}) == 4


def test_values_come_from_all_rows_and_columns_of_a_square_weight() -> None:
    places_OI = torch.arange(4096 * 4096).view(4096, 4096)
    values = sample_layer(places_OI).values_N
    assert values[0] == 0 and values[-1] == places_OI[-1, -1]
    assert len(set((values // 4096).tolist())) == len(set((values % 4096).tolist())) == NUM_VALUES


def test_a_weight_smaller_than_its_sample_is_taken_whole() -> None:
    assert set(sample_layer(torch.arange(6).view(2, 3)).values_N.tolist()) == set(range(6))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wider_base_has_the_fingerprint_of_what_training_rounded_it_to(dtype: str) -> None:
    narrow = fingerprint(linear_samples(causal_lm().to(getattr(torch, dtype))))
    assert narrow.dtype == dtype
    assert fingerprint(linear_samples(causal_lm()), dtype=dtype) == narrow
    assert fingerprint(linear_samples(causal_lm())) != narrow


def test_layers_kept_in_fp32_are_rounded_as_the_others() -> None:
    wide, mixed = linear_samples(causal_lm()), linear_samples(causal_lm().bfloat16())
    kept = next(iter(wide))
    assert fingerprint(mixed | {kept: wide[kept]}) == fingerprint(mixed)


def test_a_transposed_layer_is_seen_as_out_by_in() -> None:
    model = causal_lm("gpt2")
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, Conv1D)}
    expected = fingerprint({path: sample_layer(layer.weight.T) for path, layer in layers.items()})
    assert recorded(model) == expected._asdict()


def test_a_base_that_was_4bit_before_has_none(tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = type(causal_lm()).from_pretrained(tmp_path, quantization_config=quantization)
    assert recorded(model) is None


def test_weights_that_are_not_here_give_none() -> None:
    with torch.device("meta"):
        model = type(causal_lm())(causal_lm().config)
    assert recorded(model, init="zero") is None


def test_the_fingerprint_is_saved_with_the_adapter_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    goat().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"]
    assert values == recorded()
    assert GoatConfig.from_pretrained(str(tmp_path)).base_fingerprint == values
    with pytest.raises(ConfigError, match=r"base_fingerprint \(.*\) must be null or hold dtype, sha256"):
        GoatConfig(base_fingerprint={"sha256": ""})
    with pytest.raises(ConfigError, match=r"base_fingerprint \(.*\): dtype must be one of torch's"):
        GoatConfig(base_fingerprint={"dtype": "tensor", "sha256": ""})
