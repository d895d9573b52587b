"""The options of a mixture on whole models: their starts, their randomness under checkpointing, and the warm-up."""

from typing import Any

import pytest
import torch
from torch import Tensor

from goat_ds import ConfigError, GoatConfig
from goat_ds.tuner.layer import GoatLayer
from tests.models import causal_lm, token_ids
from tests.tuner.helpers import SMALL, disturb, experts_of, goat, logits
from tests.tuner.test_balance import CHECKPOINTING, assert_equal, checkpointed, gradients
from tests.tuner.test_layer import draw_input, one_layer

RANDOM: dict[str, Any] = {"router_noise": 1.0, "expert_dropout": 0.3, "dropout": 0.2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 4},
        {"routing": "threshold", "shared_experts": 1},
        {"adaptive_scale": True, "routing": "top_p"},
        {"num_experts": 1, "top_k": 1},
    ],
    ids=str,
)
def test_a_gated_start_is_the_base_model_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    expected = logits(causal_lm(dtype=dtype))
    model = goat(causal_lm(dtype=dtype), residual="gated", **settings)
    assert torch.equal(logits(model), expected)
    disturb(model)
    assert not torch.equal(logits(model), expected)


def test_a_gated_start_in_training_is_the_base_with_everything_random_switched_on() -> None:
    expected = causal_lm().train()(input_ids=token_ids(2, 9)).logits
    model = goat(residual="gated", **RANDOM).train()
    assert torch.equal(model(input_ids=token_ids(2, 9)).logits, expected)


def test_the_router_of_a_gated_start_has_no_gradient_and_gets_one_with_the_first_step() -> None:
    model = goat(residual="gated", balance_coef=0.0).train()
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    assert not any(experts.router.grad.any() for experts in experts_of(model))
    assert all(experts.B.grad.any() for experts in experts_of(model))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
    assert all(experts.router.grad.any() for experts in experts_of(model))


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize(
    "settings",
    [
        RANDOM,
        RANDOM | {"residual": "gated", "shared_experts": 1},
        RANDOM | {"routing": "threshold"},
        RANDOM | {"routing": "top_p", "top_p": 0.7},
        {"init": "zero", "shared_A": True, "expert_dropout": 0.5, "top_k": 4},
        RANDOM | {"init": "zero", "full_rank": True, "r": 32},
        {"rho_warmup_steps": 10, "top_k": 4},
    ],
    ids=str,
)
def test_what_is_computed_again_under_checkpointing_is_what_was_computed(settings: dict[str, Any], how: str) -> None:
    assert how in CHECKPOINTING
    found = []
    for kind in ("none", how):
        torch.manual_seed(0)
        model = goat(causal_lm(dtype=torch.float64), balance_coef=1.0, **settings)
        disturb(model)
        model.base_model.set_step(3)
        model = checkpointed(model.train(), kind)
        torch.manual_seed(1)
        model(input_ids=token_ids(2, 9), labels=token_ids(2, 9)).loss.backward()
        found.append(gradients(model))
    assert_equal(found[1], found[0])


def test_randomness_of_the_router_is_off_in_evaluation() -> None:
    expected = logits(goat())
    assert torch.equal(logits(goat(router_noise=1.0, expert_dropout=0.5)), expected)


@pytest.mark.parametrize("option", [{"router_noise": 1.0}, {"expert_dropout": 0.5}, {"dropout": 0.5}], ids=str)
def test_each_randomness_is_on_in_training_and_comes_again_from_its_seed(option: dict[str, Any]) -> None:
    model = goat(**option)
    disturb(model)
    model.train()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = model(input_ids=token_ids(2, 9)).logits.detach()
        return found

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.5},
        {"routing": "top_p", "top_p": 0.7},
        {"routing": "threshold", "max_threshold": 0.1},
        {"shared_experts": 1},
        {"residual": "gated"},
        {"top_k": 4},
    ],
    ids=str,
)
def test_each_option_of_the_router_changes_what_a_model_computes(option: dict[str, Any]) -> None:
    found = []
    for settings in ({}, option):
        model = goat(**settings)
        disturb(model)
        found.append(logits(model))
    assert not torch.allclose(*found)


def test_shared_experts_with_uniform_gates_for_the_others_start_as_the_base() -> None:
    for residual in ("lowrank", "fold"):
        plain, adapted = one_layer(shared_experts=2, top_k=2, residual=residual)
        adapted.goat_experts["default"].router.data.zero_()
        torch.testing.assert_close(adapted(draw_input()), plain(draw_input()))
        adapted.set_adapter([])
        torch.testing.assert_close(adapted(draw_input()), plain(draw_input()))


def test_experts_that_share_one_a_have_so_many_fewer_values() -> None:
    _, adapted = one_layer(init="zero", shared_A=True, top_k=4)
    experts = adapted.goat_experts["default"]
    assert tuple(experts.A.shape) == (2, 24) and tuple(experts.B.shape) == (40, 8)
    plain, again = one_layer(init="zero", shared_A=True, top_k=4)
    assert torch.equal(again(draw_input()), plain(draw_input()))


def test_the_residual_warms_up_from_gated_to_lowrank_by_the_step() -> None:
    def outputs(residual: str, **settings: Any) -> tuple[GoatLayer, torch.Tensor]:
        _, adapted = one_layer(residual=residual, **settings)
        disturb(adapted)
        return adapted, adapted(draw_input())

    _, lowrank = outputs("lowrank")
    _, gated = outputs("gated")
    warming, _ = outputs("lowrank", rho_warmup_steps=4)
    experts = warming.goat_experts["default"]
    for share in (0.0, 0.25, 1.0):
        experts.signal.mean_share = share
        torch.testing.assert_close(warming.train()(draw_input()), share * lowrank + (1 - share) * gated)
        assert torch.equal(warming.eval()(draw_input()), lowrank)


def test_the_share_of_a_warm_up_follows_from_the_steps_that_are_done() -> None:
    expected = causal_lm().train()(input_ids=token_ids(2, 9)).logits
    model = goat(rho_warmup_steps=4).train()
    tuner = model.base_model
    shares = []
    for step in (0, 1, 4, 9):
        tuner.set_step(step)
        shares.append(tuner.signal.mean_share)
    assert shares == [0.0, 0.25, 1.0, 1.0]
    tuner.set_step(0)
    assert torch.equal(model(input_ids=token_ids(2, 9)).logits, expected)


def test_two_adapters_that_warm_up_differently_are_not_trained_together() -> None:
    model = goat(rho_warmup_steps=4)
    model.add_adapter("second", GoatConfig(**SMALL))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match=r"rho_warmup_steps \(0, 4\) must be the same for all active adapters"):
        model.base_model.set_step(0)
