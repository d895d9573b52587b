"""Several adapters on one base: switched, active together, deleted; and what trains in each case."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from goat_ds import ConfigError, GoatConfig
from tests.models import causal_lm, token_ids
from tests.tuner.helpers import SMALL, disturb, experts_of, fixed_tensors, goat, logits


def two_adapters() -> PeftModel:
    """Return a model with adapters ``math`` and ``math2``, one name beginning with the other."""
    model = goat()
    model = PeftModel(model.unload(), GoatConfig(**SMALL), adapter_name="math")
    model.add_adapter("math2", GoatConfig(r=4, num_experts=2, top_k=1, init="pissa", adaptive_scale=True))
    for seed, name in enumerate(model.peft_config):
        model.set_adapter(name)
        disturb(model, seed=seed)
    return model


def test_switching_adapters_gives_each_its_own_logits(tmp_path: Path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path)
    for name in ("math", "math2"):
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(causal_lm(), tmp_path / name)
        assert torch.equal(logits(model), logits(alone))


def test_an_adapter_file_holds_nothing_of_another_adapter(tmp_path: Path) -> None:
    two_adapters().save_pretrained(tmp_path)
    ranks = {
        name: {len(t) for key, t in load_file(tmp_path / name / "adapter_model.safetensors").items() if "_A" in key}
        for name in ("math", "math2")
    }
    assert ranks == {"math": {8}, "math2": {4}}


def test_adapters_that_are_active_together_add_up() -> None:
    model = two_adapters()
    x, outputs = torch.randn(1, 3, 32), {}
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    for names in (["math"], ["math2"], ["math", "math2"]):
        model.base_model.set_adapter(names)
        outputs[tuple(names)] = q_proj(x) - q_proj.base_layer(x)
    torch.testing.assert_close(outputs["math", "math2"], outputs["math",] + outputs["math2",])


def test_both_active_adapters_have_a_balance_loss() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["math", "math2"])
    logits(model)
    assert len(model.base_model.signal.loads) == len(experts_of(model))


def test_a_deleted_adapter_leaves_the_other_as_it_was() -> None:
    model = two_adapters()
    model.set_adapter("math2")
    expected = logits(model)
    model.delete_adapter("math")
    assert torch.equal(logits(model), expected)
    model.add_adapter("math", GoatConfig(**SMALL))
    assert torch.equal(logits(model), expected)


def test_a_second_adapter_starts_from_the_untouched_base() -> None:
    model = goat()
    disturb(model)
    model.add_adapter("second", GoatConfig(**SMALL))
    first, second = (experts_of(model)[0], experts_of(model)[1])
    assert torch.equal(first.A0, second.A0) and torch.equal(second.A, second.A0)


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "set_adapter": lambda model: model.set_adapter("math2"),
    "both active": lambda model: model.base_model.set_adapter(["math", "math2"]),
    "disable and enable": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "add_adapter": lambda model: model.add_adapter("third", GoatConfig(**SMALL, adaptive_scale=True)),
    "set_requires_grad": lambda model: model.base_model.set_requires_grad(["math", "math2"], requires_grad=True),
    "delete_adapter": lambda model: model.delete_adapter("math2"),
    "disable_adapter": lambda model: model.disable_adapter().__enter__(),
}


@pytest.mark.filterwarnings("ignore:Adapter math2 was active which is now deleted")  # PEFT's, and what is tried here
@pytest.mark.parametrize("change", CHANGES)
def test_base_and_start_stay_frozen_through(change: str) -> None:
    model = two_adapters()
    CHANGES[change](model)
    assert [name for name, parameter in fixed_tensors(model) if parameter.requires_grad] == []


def test_the_inactive_adapter_does_not_train() -> None:
    model = two_adapters()
    model.set_adapter("math2")
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    trained = {
        name.split(".goat_experts.")[1].split(".")[0] for name, p in model.named_parameters() if p.grad is not None
    }
    assert trained == {"math2"}


def test_adding_an_adapter_does_not_wake_one_that_was_loaded_to_be_used(tmp_path: Path) -> None:
    goat().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(causal_lm(), tmp_path)
    model.add_adapter("second", GoatConfig(**SMALL))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_batch_that_mixes_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match="adapter_names: a batch cannot mix GOAT adapters"):
        two_adapters()(input_ids=token_ids(2, 9), adapter_names=["math", "math2"])
