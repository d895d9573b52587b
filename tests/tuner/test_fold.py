"""residual="fold", the paper's literal form, is the same function as the low-rank residual."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from goat_ds import ConfigError, GoatConfig
from tests.models import causal_lm, token_ids
from tests.tuner.helpers import SMALL, disturb, experts_of, goat, logits

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # one fp32 rounding of the base weight


def trained(residual: str, name: str = "llama", **settings: Any) -> PeftModel:
    """Return an adapter after some training, the same for the same seed whatever its residual."""
    torch.manual_seed(0)
    base = causal_lm(name)
    torch.manual_seed(0)
    model = goat(base, residual=residual, **settings)
    disturb(model)
    return model


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folding_is_the_same_function(name: str, adaptive: bool) -> None:
    folded, lowrank = (trained(residual, name, adaptive_scale=adaptive) for residual in ("fold", "lowrank"))
    torch.testing.assert_close(logits(folded), logits(lowrank), **CLOSE)
    experts = experts_of(folded)[0]
    residual_OI = torch.zeros(experts.out_features, experts.in_features)
    experts.add_residual_(residual_OI, times=1)
    assert residual_OI.abs().max() > 1e-3


def test_a_folded_adapter_comes_back_on_a_fresh_base(tmp_path: Path) -> None:
    model = trained("fold")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_loading_over_a_folded_adapter_folds_the_loaded_start(tmp_path: Path) -> None:
    trained("fold", init="pissa").save_pretrained(tmp_path)
    model = trained("fold")
    model.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(logits(model), logits(trained("lowrank", init="pissa")), **CLOSE)


def test_the_state_of_a_whole_folded_model_is_not_folded_twice() -> None:
    model, other = trained("fold"), trained("fold", init="pissa")
    other.load_state_dict({key: tensor.clone() for key, tensor in model.state_dict().items()})
    assert torch.equal(logits(other), logits(model))
    torch.testing.assert_close(logits(other.unload()), logits(causal_lm()), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folded_base_comes_back_by_every_way(name: str) -> None:
    expected = logits(causal_lm(name))
    model = trained("fold", name)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, **CLOSE)
    torch.testing.assert_close(logits(trained("fold", name).unload()), expected, **CLOSE)
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model.base_model.model), expected, **CLOSE)


def test_a_disabled_folded_adapter_works_under_autocast() -> None:
    model = trained("fold")
    with model.disable_adapter(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model), logits(causal_lm()), rtol=0.1, atol=0.05)


def test_a_second_adapter_beside_a_folded_one_is_refused() -> None:
    model = trained("fold")
    with pytest.raises(ConfigError, match=r"residual \(fold\) changes the base weight.*residual='lowrank' for several"):
        model.add_adapter("second", GoatConfig(**SMALL))


def test_a_folded_adapter_beside_another_is_refused() -> None:
    model = trained("lowrank")
    with pytest.raises(ConfigError, match=r"residual \(fold\) changes the base weight"):
        model.add_adapter("second", GoatConfig(**SMALL, residual="fold"))
    assert torch.equal(logits(model), logits(trained("lowrank")))


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")  # PEFT's advice, beside our refusal
def test_folding_into_a_head_that_is_tied_to_the_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lm_head: its weight is also that of model\.embed_tokens"):
        goat(causal_lm("qwen2"), residual="fold", target_modules=["lm_head"])


def test_a_folded_model_trains() -> None:
    model = trained("fold").train()
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    assert all(experts.A.grad is not None and experts.A0.grad is None for experts in experts_of(model))
