"""Choosing experts, measuring the choice, and the balance loss on its way to the routers."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from goat_ds.method.routing import (
    BalanceSignal,
    BalanceWarning,
    carry_balance,
    carry_balance_by_log_probs,
    logits_gradient,
    router_load,
    top_k_gates,
)
from tests import reference


def draw_logits(num_tokens: int = 9, num_experts: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gates_are_the_papers(top_k: int) -> None:
    logits_TE = draw_logits()
    gates = top_k_gates(logits_TE, top_k=top_k)
    for t, logits_E in enumerate(logits_TE):
        gates_E, probs_E, kept_E = reference.gates_of_token(list(logits_E), top_k)
        torch.testing.assert_close(gates.gates_TE[t], torch.stack(gates_E))
        torch.testing.assert_close(gates.probs_TE[t], torch.stack(probs_E))
        assert gates.kept_TE[t].tolist() == kept_E


def test_keeping_all_experts_leaves_the_probabilities() -> None:
    gates = top_k_gates(draw_logits(), top_k=5)
    torch.testing.assert_close(gates.gates_TE, gates.probs_TE)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_ties_keep_exactly_k_experts_with_equal_gates(top_k: int) -> None:
    gates = top_k_gates(torch.zeros(4, 3), top_k=top_k)
    assert gates.kept_TE.sum(dim=1).tolist() == [top_k] * 4
    torch.testing.assert_close(gates.gates_TE, gates.kept_TE / top_k)


def test_logits_too_far_below_for_a_probability_are_still_kept_in_their_order() -> None:
    gates = top_k_gates(torch.tensor([[0.0, -400.0, -200.0, -300.0]]), top_k=2)
    assert not gates.probs_TE[0, 1:].any()
    assert gates.kept_TE[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("mask", [None, [True, False, True, True, False, True, True, True, False]])
def test_the_load_of_a_router_is_measured_over_real_tokens(mask: list[bool] | None) -> None:
    gates = top_k_gates(draw_logits(), top_k=2)
    load = router_load(gates, top_k=2, mask_T=None if mask is None else torch.tensor(mask))
    real = torch.tensor(mask or [True] * 9)
    probs_TE = gates.probs_TE[real]
    torch.testing.assert_close(load.share_E, gates.kept_TE[real].double().mean(dim=0) / 2)
    balance_loss = len(load.share_E) * (load.share_E @ probs_TE.mean(dim=0))
    torch.testing.assert_close(load.balance_loss, balance_loss)
    torch.testing.assert_close(load.entropy, -(probs_TE * probs_TE.log()).sum(dim=1).mean())


def test_a_batch_of_padding_alone_has_no_load_and_no_nan() -> None:
    load = router_load(top_k_gates(draw_logits(), top_k=2), top_k=2, mask_T=torch.zeros(9, dtype=torch.long))
    assert all(not value.any() for value in load)


def test_an_undecided_router_has_the_largest_entropy() -> None:
    load = router_load(top_k_gates(torch.zeros(4, 8), top_k=2), top_k=2, mask_T=None)
    assert load.entropy.item() == pytest.approx(math.log(8))


def test_a_router_that_always_chooses_the_same_experts_has_the_largest_balance_loss() -> None:
    load = router_load(top_k_gates(torch.tensor([[50.0, 50, 0, 0]] * 6), top_k=2), top_k=2, mask_T=None)
    assert load.balance_loss.item() == pytest.approx(4 / 2)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_gradient_of_the_logits_is_autograds(top_k: int) -> None:
    logits_TE = draw_logits().requires_grad_()
    gates = top_k_gates(logits_TE, top_k=top_k)
    into_gates_TE, into_probs_TE = torch.rand(9, 5, dtype=torch.float64), torch.rand(9, 5, dtype=torch.float64)
    total = (gates.gates_TE * into_gates_TE + gates.probs_TE * into_probs_TE).sum()
    (expected,) = torch.autograd.grad(total, logits_TE)
    found = logits_gradient(
        gates.gates_TE.detach(), gates.probs_TE.detach(), grad_gates_TE=into_gates_TE, grad_probs_TE=into_probs_TE
    )
    torch.testing.assert_close(found, expected)


def test_the_balance_loss_is_the_sum_over_layers() -> None:
    signal = BalanceSignal()
    assert signal.balance_loss() is None
    load = router_load(top_k_gates(draw_logits(), top_k=2), top_k=2, mask_T=None)
    for name in ("first", "second", "second"):  # a recomputed layer records itself again
        signal.record(name, load, coef=0.5)
    assert signal.balance_loss() == pytest.approx(float(load.balance_loss))


def test_a_mask_about_something_else_than_tokens_is_left_aside() -> None:
    signal = BalanceSignal()
    signal.begin_forward(torch.ones(2, 5))
    assert signal.mask_of(2) is None
    mask_T = signal.mask_of(10)
    assert mask_T is not None and mask_T.shape == (10,)


def test_what_arrives_at_the_loss_is_what_the_routers_take() -> None:
    signal, loss = BalanceSignal(), torch.zeros((), requires_grad=True)
    total = carry_balance(loss, torch.tensor(0.25), signal, weight=0.5)
    assert total.item() == 0.125
    (8 * total).backward()
    assert signal.take_upstream(like=loss) == 4.0


def test_a_loss_of_log_probabilities_is_worth_minus_what_it_sends() -> None:
    signal, log_probs = BalanceSignal(), torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    (-carry_balance_by_log_probs(log_probs, signal, label_mask=mask).sum() / 16).backward()
    assert signal.take_upstream(like=log_probs) == 4 / 16


def test_a_preference_loss_of_log_probabilities_leaves_the_balance_out_and_says_so() -> None:
    signal, log_probs = BalanceSignal(), torch.zeros(2, 3, requires_grad=True)
    carried = carry_balance_by_log_probs(log_probs, signal)
    with pytest.warns(BalanceWarning, match="gradients of the log-probabilities have both signs"):
        (carried[1].sum() - carried[0].sum()).backward()
    assert signal.take_upstream(like=log_probs) == 0.0


def test_a_preference_loss_that_is_wrapped_keeps_its_balance() -> None:
    signal, log_probs = BalanceSignal(), torch.zeros(2, 3, requires_grad=True)
    carried = carry_balance_by_log_probs(log_probs, signal)
    carry_balance(carried[1].sum() - carried[0].sum(), torch.tensor(0.25), signal, weight=0.5).backward()
    assert signal.take_upstream(like=log_probs) == 0.5


def test_a_loss_that_nobody_told_the_routers_of_warns_once() -> None:
    signal = BalanceSignal()
    with pytest.warns(BalanceWarning, match=r"computed outside of the model.*goat_ds\.with_balance_loss"):
        assert signal.take_upstream(like=torch.zeros(())) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert signal.take_upstream(like=torch.zeros(())) == 0.0
