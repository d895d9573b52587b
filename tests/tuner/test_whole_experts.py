"""Whole experts on whole models: copies of the weights, of which the file and the gradients know the differences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from goat_ds.tuner.quantized import Packing, QuantizedLinear, pack
from goat_ds.tuner.whole_experts import WholeExperts
from tests import reference
from tests.models import CAUSAL_LMS, causal_lm, token_ids
from tests.tuner.helpers import disturb, experts_of, fixed_tensors, goat, logits
from tests.tuner.test_balance import assert_equal, batch, checkpointed, gradients, model_of, slow_gradients

WHOLE: dict[str, Any] = {"full_rank": True, "init": "zero", "r": 32, "num_experts": 3, "top_k": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_whole_experts_start_as_the_base_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    expected = logits(causal_lm(name, dtype=dtype))
    model = goat(causal_lm(name, dtype=dtype), **WHOLE)
    assert all(isinstance(experts, WholeExperts) for experts in experts_of(model))
    assert torch.equal(logits(model), expected)
    disturb(model)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_a_layer_mixes_whole_weights_by_the_gates_of_the_token() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model = goat(nn.Sequential(layer), target_modules=["0"], **WHOLE)
    disturb(model)
    (experts,), x = experts_of(model), torch.randn(4, 6, dtype=torch.float64)
    found = model.base_model.model(x)
    for token, y in zip(x, found, strict=True):
        gates, _, _ = reference.gates_of_token(list(experts.router @ token), 2)
        copies = [layer.weight + difference for difference in experts.D]
        expected = layer.bias + sum(g * (w @ token) for g, w in zip(gates, copies, strict=True))
        torch.testing.assert_close(y, expected)


def test_differences_and_routers_are_all_that_trains() -> None:
    model = goat(**WHOLE).train()
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    for experts in experts_of(model):
        assert {name for name, parameter in experts.named_parameters() if parameter.requires_grad} == {"D", "router"}
        assert all(parameter.grad.any() for parameter in experts.parameters())
    fixed = [parameter for name, parameter in fixed_tensors(model) if ".base_layer." in name]
    assert fixed and not any(parameter.requires_grad for parameter in fixed)


def test_an_adapter_file_holds_a_matrix_for_each_expert_and_the_router(tmp_path: Path) -> None:
    goat(target_modules=["up_proj"], **WHOLE).save_pretrained(tmp_path)
    path = "base_model.model.model.layers.0.mlp.up_proj"
    found = {key: list(t.shape) for key, t in load_file(tmp_path / "adapter_model.safetensors").items() if path in key}
    out_features, in_features = causal_lm().model.layers[0].mlp.up_proj.weight.shape
    assert found == {f"{path}.goat_D": [3, out_features, in_features], f"{path}.goat_router": [3, in_features]}


@pytest.mark.parametrize("how", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_with_the_balance_loss_equal_plain_autograds(padded: bool, how: str) -> None:
    model = checkpointed(model_of(**WHOLE), how)
    model(**batch(padded=padded)).loss.backward()
    assert_equal(gradients(model), slow_gradients([batch(padded=padded)], **WHOLE))


def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adam_trains_differences_as_it_trains_copies() -> None:
    torch.manual_seed(0)
    base, x, target = nn.Linear(6, 5).double(), torch.randn(8, 6).double(), torch.randn(8, 5).double()
    model = goat(nn.Sequential(base), target_modules=["0"], **WHOLE, balance_coef=0.0).train()
    (experts,) = experts_of(model)
    copies = base.weight.detach().repeat(3, 1, 1).requires_grad_()
    router = experts.router.detach().clone().requires_grad_()
    ours, theirs = [experts.D, experts.router], [copies, router]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0) for parameters in (ours, theirs)]
    for _ in range(5):
        step((model.base_model.model(x) - target).square().sum(), optimizers[0])
        rows = []
        for token in x:
            gates, _, _ = reference.gates_of_token(list(router @ token), 2)
            rows.append(base.bias.detach() + sum(g * (w @ token) for g, w in zip(gates, copies, strict=True)))
        step((torch.stack(rows) - target).square().sum(), optimizers[1])
    torch.testing.assert_close(base.weight + experts.D, copies)
    torch.testing.assert_close(experts.router, router)


def test_one_whole_expert_is_full_fine_tuning_of_the_layers() -> None:
    model = goat(**WHOLE | {"num_experts": 1, "top_k": 1}, balance_coef=0.0).train()
    base = causal_lm().train()
    for each in (model, base):
        each(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    weights = dict(base.named_parameters())
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, WholeExperts):
            expected = weights[path.removesuffix(".goat_experts.default") + ".weight"].grad
            torch.testing.assert_close(module.D.grad[0], expected)


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_whole_experts_stand_beside_a_4bit_base(tmp_path: Path, is_reloaded: bool) -> None:
    pytest.importorskip("bitsandbytes")
    base = in_4bit(causal_lm(dtype=torch.bfloat16))
    expected = logits(base)
    model = goat(base, **WHOLE)
    assert torch.equal(logits(model), expected)
    disturb(model)
    if is_reloaded:
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(in_4bit(causal_lm(dtype=torch.bfloat16)), tmp_path)
        assert torch.equal(logits(again), logits(model))
        return
    model.train()(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    assert all(parameter.grad.any() for experts in experts_of(model) for parameter in experts.parameters())


def in_4bit(model: Any) -> Any:
    """Pack the linear layers of a model's blocks."""
    for path, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = QuantizedLinear(
                pack(layer.weight, Packing()),
                packing=Packing(),
                shape=tuple(layer.weight.shape),
                bias=layer.bias,
                dtype=torch.bfloat16,
                compute_dtype=torch.bfloat16,
                weight_dtype=torch.bfloat16,
            )
            model.model.layers.set_submodule(path, packed)
    return model
