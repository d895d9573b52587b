"""Whole experts equal their formula in loops: a mixture of copies of the weight, in values and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from goat_ds.method.dropout import dropout_mask, kept_share
from goat_ds.method.input_gradient import sum_gradients
from goat_ds.method.mixture import MixtureOutput
from goat_ds.method.router import RouterSettings
from goat_ds.method.routing import BalanceSignal, Routing, carry_balance
from goat_ds.method.whole_mixture import Dropout, WholeFactors, whole_mixture
from tests import reference
from tests.method.test_mixture import Called, draw
from tests.method.test_options import Run, assert_same, drawn_again

NUM_TOKENS, IN, OUT, E = 7, 10, 6, 4
COEF, UPSTREAM, SEED = 0.25, 3.0, 5
MASK = [True, True, False, True, True, False, True]


def tensors_of(options: dict[str, Any], *, num_experts: int = E) -> dict[str, Tensor]:
    """Draw what has a gradient."""
    torch.manual_seed(0)
    found = {"x": draw(NUM_TOKENS, IN), "d": draw(num_experts, OUT, IN) / 3}
    if num_experts > 1:
        found["router"] = draw(num_experts - options.get("shared_experts", 0), IN) / 3
    if options.get("routing") is Routing.THRESHOLD:
        found |= {"threshold": draw(1, IN) / 3, "threshold_bias": draw(1)}
    return found


def factors_of(tensors: dict[str, Tensor]) -> WholeFactors:
    return WholeFactors(*[tensors.get(name) for name in ("d", "router", "threshold", "threshold_bias")])  # type: ignore[arg-type]


def trained_copies(
    options: dict[str, Any], *, top_k: int, num_experts: int = E, mask: list[bool] | None = None
) -> tuple[Run, Run]:
    """Run the fast form, and the loops: there a whole expert is a low-rank one whose A is the identity."""
    tensors = tensors_of(options, num_experts=num_experts)
    weight, target = draw(OUT, IN), draw(NUM_TOKENS, OUT)
    signal = BalanceSignal()
    signal.begin_forward(None if mask is None else torch.tensor(mask))
    settings = RouterSettings(num_experts=num_experts, top_k=top_k, balance_coef=COEF, **options)
    is_random = bool(settings.router_noise or settings.expert_dropout)

    fast = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    y, load = whole_mixture(
        fast["x"],
        fast["x"] @ weight.T,
        factors_of(fast),
        settings,
        signal=signal,
        router_seed=SEED if is_random else None,
    )
    loss = (y * target).sum()
    if load is not None:
        signal.record("layer", load, coef=COEF)
        loss = carry_balance(loss, signal.balance_loss(), signal)
    (UPSTREAM * loss).backward()

    slow = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    identity, beside = torch.eye(IN, dtype=torch.float64), torch.cat(list(slow["d"]), dim=1)
    y_slow, balance = reference.layer(
        slow["x"], weight, identity, beside, None, None, slow.get("router"), scales=[1.0] * num_experts, top_k=top_k,
        mask=mask, **drawn_again(options) | {name: slow[name] for name in slow if name.startswith("threshold")},
    )  # fmt: skip
    loss_slow = (y_slow * target).sum() + (0 if load is None else COEF * balance)
    (UPSTREAM * loss_slow).backward()
    balances = (0.0, 0.0) if load is None else (float(load.balance_loss), float(balance.detach()))
    return (
        Run(y, loss, balances[0], {name: value.grad for name, value in fast.items()}),
        Run(y_slow, loss_slow, balances[1], {name: value.grad for name, value in slow.items()}),
    )


OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "top 1": ({}, 1),
    "top 2": ({}, 2),
    "soft": ({}, 4),
    "temperature": ({"temperature": 0.7}, 2),
    "top p": ({"routing": Routing.TOP_P, "top_p": 0.6}, 2),
    "threshold": ({"routing": Routing.THRESHOLD, "max_threshold": 0.25}, 2),
    "shared": ({"shared_experts": 1}, 2),
    "shared soft": ({"shared_experts": 2}, 2),
    "noise": ({"router_noise": 0.5}, 2),
    "left out": ({"expert_dropout": 0.4, "shared_experts": 1}, 2),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["all real", "padded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_whole_experts_equal_the_loops(name: str, mask: list[bool] | None) -> None:
    options, top_k = OPTIONS[name]
    assert_same(*trained_copies(options, top_k=top_k, mask=mask))


def test_one_whole_expert_is_the_weight_itself() -> None:
    assert_same(*trained_copies({}, top_k=1, num_experts=1))


def run(tensors: dict[str, Tensor], base: Tensor, *, top_k: int = 2, **how: Any) -> MixtureOutput:
    settings = RouterSettings(num_experts=E, top_k=top_k, balance_coef=0.0)
    return whole_mixture(tensors["x"], base, factors_of(tensors), settings, signal=BalanceSignal(), **how)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_gates_that_sum_to_one_mix_the_copies_themselves(top_k: int) -> None:
    tensors, weight = tensors_of({}), draw(OUT, IN)
    found = run(tensors, tensors["x"] @ weight.T, top_k=top_k).y
    for token, y in zip(tensors["x"], found, strict=True):
        gates, _, _ = reference.gates_of_token(list(tensors["router"] @ token), top_k)
        copies = [weight + difference for difference in tensors["d"]]
        torch.testing.assert_close(y, sum(g * (w @ token) for g, w in zip(gates, copies, strict=True)))


def test_dropout_reaches_the_experts_and_not_the_router() -> None:
    tensors = {name: value.requires_grad_() for name, value in tensors_of({}).items()}
    dropout, target = Dropout(0.25, 7), draw(NUM_TOKENS, OUT)
    found = run(tensors, torch.zeros(NUM_TOKENS, OUT).double(), dropout=dropout).y
    seen = tensors["x"] * dropout_mask(tensors["x"], dropout=0.25, seed=7) / kept_share(0.25)
    rows = []
    for token, seen_token in zip(tensors["x"], seen, strict=True):
        gates, _, _ = reference.gates_of_token(list(tensors["router"] @ token), 2)
        rows.append(sum(g * (d @ seen_token) for g, d in zip(gates, tensors["d"], strict=True)))
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected)
    found_grads, expected_grads = (
        torch.autograd.grad((y * target).sum(), list(tensors.values())) for y in (found, expected)
    )
    torch.testing.assert_close(found_grads, expected_grads)


@pytest.mark.parametrize("top_k", [2, E])
def test_whole_experts_added_in_place_have_the_values_and_gradients_of_those_beside_the_base(top_k: int) -> None:
    found, weight, target = [], draw(OUT, IN), draw(NUM_TOKENS, OUT)
    for in_place in (False, True):
        tensors = {name: value.requires_grad_() for name, value in tensors_of({}).items()}
        x_of_base, summed = sum_gradients(tensors["x"]) if in_place else (tensors["x"], None)
        base = x_of_base @ weight.T
        seen = tensors | {"x": tensors["x"].detach() if in_place else tensors["x"]}
        y = run(seen, base, top_k=top_k, into_base=in_place, summed=summed).y
        assert (y.data_ptr() == base.data_ptr()) == in_place
        found.append([y.detach(), *torch.autograd.grad((y * target).sum(), list(tensors.values()))])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("frozen", ["x", "d", "router"])
def test_a_gradient_that_nobody_needs_leaves_the_others_as_they_are(frozen: str) -> None:
    found = []
    for names in ({"x", "d", "router"}, {"x", "d", "router"} - {frozen}):
        tensors = {name: value.requires_grad_(name in names) for name, value in tensors_of({}).items()}
        run(tensors, torch.zeros(NUM_TOKENS, OUT).double()).y.square().sum().backward()
        found.append({name: value.grad for name, value in tensors.items() if name != frozen})
    torch.testing.assert_close(found[1], found[0])


def test_an_expert_that_no_token_uses_has_a_gradient_of_zeros() -> None:
    tensors = {name: value.requires_grad_() for name, value in tensors_of({}).items()}
    tensors["x"] = tensors["x"].detach().abs()
    tensors["router"] = torch.ones(E, IN).double().cumsum(0).requires_grad_()
    run(tensors, torch.zeros(NUM_TOKENS, OUT).double(), top_k=1).y.sum().backward()
    assert [bool(grad.any()) for grad in tensors["d"].grad] == [False] * (E - 1) + [True]


def test_nothing_of_all_tokens_experts_and_features_is_ever_there_or_kept() -> None:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tensors = {name: value.bfloat16().requires_grad_() for name, value in tensors_of({}).items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Called() as called:
        y = run(tensors, torch.zeros(NUM_TOKENS, OUT).bfloat16(), top_k=E).y
        y.sum().backward()
    parameters = sum(tensors[name].untyped_storage().nbytes() for name in ("d", "router"))
    assert sum(kept.values()) - parameters == NUM_TOKENS * (2 * IN + 4 * E)
    assert all(torch.Size(shape).numel() <= NUM_TOKENS * IN for shape in called.shapes_of(torch.ops.aten.mm.default))


def test_half_precision_is_the_loops_up_to_its_rounding() -> None:
    tensors, weight = tensors_of({}), draw(OUT, IN)
    half = {name: value.bfloat16() for name, value in tensors.items()}
    found = run(half, half["x"] @ weight.bfloat16().T).y
    wide = {name: value.double() for name, value in half.items()}
    expected = run(wide, wide["x"] @ weight.bfloat16().double().T).y
    assert (found.double() - expected).norm() < 2**-7 * expected.norm()


def test_tensors_without_values_count_every_token_for_every_expert() -> None:
    with FakeTensorMode():
        tensors = {
            "x": torch.empty(NUM_TOKENS, IN, requires_grad=True),
            "d": torch.empty(E, OUT, IN, requires_grad=True),
            "router": torch.empty(E, IN, requires_grad=True),
        }
        with Called() as called:
            run(tensors, torch.empty(NUM_TOKENS, OUT)).y.sum().backward()
    assert called.shapes_of(torch.ops.aten.mm.default).count((NUM_TOKENS, OUT)) == E
