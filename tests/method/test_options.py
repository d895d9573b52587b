"""Every option of the mixture equals its formula in loops, and the start that takes the gates is the base."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from goat_ds.method.dropout import disturb_router_, dropout_mask
from goat_ds.method.mixture import MixtureFactors, MixtureSettings, mixture
from goat_ds.method.routing import BalanceSignal, Routing, carry_balance
from tests import reference
from tests.method.test_mixture import Called, draw

NUM_TOKENS, IN, OUT, R, E = 7, 10, 6, 8, 4
COEF, UPSTREAM, SEED = 0.25, 3.0, 5
MASK = [True, True, False, True, True, False, True]


class Run(NamedTuple):
    """What a form of the layer gives: its output, loss, balance loss and all gradients by name."""

    y: Tensor
    loss: Tensor
    balance: float
    grads: dict[str, Tensor]


def trained_tensors(options: dict[str, Any], *, shared_a: bool) -> dict[str, Tensor]:
    """Draw what has a gradient."""
    torch.manual_seed(0)
    num_choices = E - options.get("shared_experts", 0)
    found = {
        "x": draw(NUM_TOKENS, IN), "a": draw(R // E if shared_a else R, IN), "b": draw(OUT, R),
        "router": draw(num_choices, IN) / 3,
    }  # fmt: skip
    if options.get("routing") is Routing.THRESHOLD:
        found |= {"threshold": draw(1, IN) / 3, "threshold_bias": draw(1)}
    return found


def fast_and_slow(
    options: dict[str, Any],
    *,
    top_k: int,
    residual: bool,
    adaptive: bool = False,
    mask: list[bool] | None = None,
    shared_a: bool = False,
) -> tuple[Run, Run]:
    tensors = trained_tensors(options, shared_a=shared_a)
    weight, target = draw(OUT, IN), draw(NUM_TOKENS, OUT)
    a0, b0 = (draw(R, IN), draw(OUT, R)) if residual else (None, None)
    scales = [1.7 + 0.3 * e * adaptive for e in range(E)]

    fast = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    signal = BalanceSignal()
    signal.begin_forward(None if mask is None else torch.tensor(mask))
    factors = MixtureFactors(
        fast["a"], fast["b"], a0, b0, fast["router"], torch.tensor(scales, dtype=torch.float64) if adaptive else None,
        fast.get("threshold"), fast.get("threshold_bias"),
    )  # fmt: skip
    settings = MixtureSettings(num_experts=E, top_k=top_k, scale=scales[0], balance_coef=COEF, **options)
    is_random = bool(settings.router_noise or settings.expert_dropout)
    y, load = mixture(
        fast["x"], fast["x"] @ weight.T, factors, settings, signal=signal, router_seed=SEED if is_random else None
    )
    assert load is not None
    assert float(load.share_E.sum()) == pytest.approx(1)
    signal.record("layer", load, coef=COEF)
    loss = carry_balance((y * target).sum(), signal.balance_loss(), signal)
    (UPSTREAM * loss).backward()

    slow = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    y_slow, balance = reference.layer(
        slow["x"], weight, slow["a"], slow["b"], a0, b0, slow["router"], scales=scales, top_k=top_k, mask=mask,
        **drawn_again(options) | {name: slow[name] for name in ("threshold", "threshold_bias") if name in slow},
    )  # fmt: skip
    loss_slow = (y_slow * target).sum() + COEF * balance
    (UPSTREAM * loss_slow).backward()
    return (
        Run(y, loss, float(load.balance_loss), {name: value.grad for name, value in fast.items()}),
        Run(y_slow, loss_slow, float(balance.detach()), {name: value.grad for name, value in slow.items()}),
    )


def drawn_again(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the loops take them: with the noise and the experts that were left out."""
    given = dict(options)
    noise, expert_dropout = given.pop("router_noise", 0.0), given.pop("expert_dropout", 0.0)
    shape = (NUM_TOKENS, E - options.get("shared_experts", 0))
    disturbed = torch.zeros(shape[::-1], dtype=torch.float64).T
    if noise or expert_dropout:
        disturb_router_(
            disturbed,
            noise=noise / options.get("temperature", 1.0),
            expert_dropout=expert_dropout,
            seed=SEED,
        )
    left_out = disturbed == -torch.inf
    noise_TN = disturbed.masked_fill(left_out, 0.0) * options.get("temperature", 1.0)
    return given | {"noise": noise_TN, "left_out": left_out}


def assert_same(fast: Run, slow: Run) -> None:
    for value, expected in ((fast.y, slow.y), (fast.loss, slow.loss)):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    assert fast.balance == pytest.approx(slow.balance, abs=1e-10)
    for name, gradient in fast.grads.items():
        torch.testing.assert_close(
            gradient, slow.grads[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "gated": ({"mean_share": 0.0}, 2),
    "gated soft": ({"mean_share": 0.0}, 4),
    "warming up": ({"mean_share": 0.3}, 2),
    "temperature": ({"temperature": 0.7}, 2),
    "soft temperature": ({"temperature": 2.0}, 4),
    "top_p": ({"routing": Routing.TOP_P, "top_p": 0.25}, 2),
    "top_p 0.9": ({"routing": Routing.TOP_P, "top_p": 0.9, "temperature": 0.5}, 2),
    "threshold": ({"routing": Routing.THRESHOLD, "max_threshold": 1 / E}, 2),
    "threshold gated": ({"routing": Routing.THRESHOLD, "max_threshold": 0.2, "temperature": 2.0, "mean_share": 0.0}, 2),
    "shared": ({"shared_experts": 1}, 2),
    "shared soft": ({"shared_experts": 2}, 2),
    "shared gated": ({"shared_experts": 1, "mean_share": 0.0}, 1),
    "shared warming up": ({"shared_experts": 1, "mean_share": 0.6}, 1),
    "shared threshold": ({"shared_experts": 1, "routing": Routing.THRESHOLD, "max_threshold": 1 / 3}, 1),
    "noise": ({"router_noise": 1.0, "temperature": 0.5}, 2),
    "expert dropout": ({"expert_dropout": 0.4}, 2),
    "expert dropout soft": ({"expert_dropout": 0.7}, 4),
    "expert dropout top_p": ({"expert_dropout": 0.4, "routing": Routing.TOP_P, "top_p": 0.8}, 2),
    "expert dropout threshold": ({"expert_dropout": 0.4, "routing": Routing.THRESHOLD, "max_threshold": 1 / E}, 2),
    "all": (
        {"expert_dropout": 0.3, "router_noise": 0.5, "temperature": 2.0, "shared_experts": 1, "mean_share": 0.0},
        2,
    ),
}


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_its_formula_in_loops(name: str, adaptive: bool, mask: list[bool] | None) -> None:
    options, top_k = OPTIONS[name]
    assert_same(*fast_and_slow(options, top_k=top_k, residual=True, adaptive=adaptive, mask=mask))


@pytest.mark.parametrize("name", ["temperature", "soft temperature", "top_p", "threshold", "shared", "expert dropout"])
def test_experts_that_share_one_a_equal_its_formula_in_loops(name: str) -> None:
    options, top_k = OPTIONS[name]
    assert_same(*fast_and_slow(options, top_k=top_k, residual=False, shared_a=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"top_k": 4}, {"shared_experts": 1}, {"routing": Routing.THRESHOLD, "max_threshold": 0.25},
        {"routing": Routing.TOP_P}, {"dropout": 0.3}, {"num_experts": 1, "top_k": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_gated_start_is_the_base_to_the_last_bit_and_moves_no_router(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    settings = MixtureSettings(
        **{"num_experts": E, "top_k": 2, "scale": 13.7, "balance_coef": 0.0, "mean_share": 0.0} | options
    )
    num_tokens, size_i, size_o = 33, 70, 51
    a, b = draw(R, size_i).to(dtype), draw(size_o, R).to(dtype)
    router = draw(settings.num_choices, size_i).to(dtype).requires_grad_() if settings.num_experts > 1 else None
    threshold = draw(1, size_i).to(dtype) if settings.routing is Routing.THRESHOLD else None
    x, base = draw(num_tokens, size_i).to(dtype).requires_grad_(), draw(num_tokens, size_o).to(dtype)
    factors = MixtureFactors(
        a.clone().requires_grad_(), b.clone().requires_grad_(), a, b, router, None, threshold,
        None if threshold is None else draw(1).to(dtype),
    )  # fmt: skip
    y, _ = mixture(x, base, factors, settings, signal=BalanceSignal(), dropout_seed=3 if settings.dropout else None)
    assert torch.equal(y, base)
    y.square().sum().backward()
    assert router is None or not router.grad.any()
    assert not x.grad.any()
    assert factors.a_RI.grad.any() and factors.b_OR.grad.any()


def test_dropout_takes_the_same_inputs_from_a_gated_residual() -> None:
    torch.manual_seed(0)
    x, a, b, a0, b0 = (draw(*shape) for shape in ((5, IN), (R, IN), (OUT, R), (R, IN), (OUT, R)))
    settings = MixtureSettings(num_experts=1, top_k=1, scale=1.3, balance_coef=0.0, dropout=0.25, mean_share=0.0)
    inputs = [value.requires_grad_() for value in (x, a, b)]
    y, _ = mixture(x, draw(5, OUT) * 0, MixtureFactors(a, b, a0, b0), settings, signal=BalanceSignal(), dropout_seed=7)
    seen = x * dropout_mask(x, dropout=0.25, seed=7) / 0.75
    expected = 1.3 * (seen @ a.T @ b.T - seen @ a0.T @ b0.T)
    torch.testing.assert_close(y, expected)
    target = draw(5, OUT)
    for found, right in zip(
        torch.autograd.grad((y * target).sum(), inputs),
        torch.autograd.grad((expected * target).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


def test_a_gated_difference_is_as_accurate_in_bf16_as_what_has_been_trained() -> None:
    torch.manual_seed(0)
    a0, b0 = draw(R, IN).bfloat16(), draw(OUT, R).bfloat16()
    a, b = (value + 2**-7 * torch.randn_like(value) for value in (a0, b0))
    x, router = draw(20, IN).bfloat16(), draw(E, IN).bfloat16()
    options = {"num_experts": E, "top_k": 4, "scale": 1.0, "balance_coef": 0.0}
    base = torch.zeros(20, OUT).bfloat16()
    y, _ = mixture(
        x,
        base,
        MixtureFactors(a, b, a0, b0, router),
        MixtureSettings(**options, mean_share=0.0),
        signal=BalanceSignal(),
    )
    exact, _ = reference.layer(
        *(value.double() for value in (x, torch.zeros(OUT, IN), a, b, a0, b0, router)),
        scales=[1.0] * E, top_k=4, mean_share=0.0,
    )  # fmt: skip
    assert (y.double() - exact).norm() < 2**-7 * exact.norm()


VIEWS = ("view", "permute", ".t.", "slice", "split", "detach", "expand", "select", "alias", "unsqueeze")
"""Operators that compute nothing."""


def operators_of(**options: Any) -> list[str]:
    """List what a layer's forward and backward compute."""
    torch.manual_seed(0)
    x, a, b, a0, b0, router = (
        draw(*shape).float() for shape in ((5, IN), (R, IN), (OUT, R), (R, IN), (OUT, R), (E, IN))
    )
    trained = [value.requires_grad_() for value in (x, a, b, router)]
    settings = MixtureSettings(**{"num_experts": E, "top_k": 2, "scale": 1.3, "balance_coef": 0.0} | options)
    with Called() as called:
        y, _ = mixture(x, torch.zeros(5, OUT), MixtureFactors(a, b, a0, b0, router), settings, signal=BalanceSignal())
        torch.autograd.grad(y.sum(), trained)
    return [name for name in called.operators if not any(view in name for view in VIEWS)]


def test_soft_routing_searches_nothing_and_is_fewer_operators_than_top_k() -> None:
    soft, top_2 = operators_of(top_k=E), operators_of(top_k=2)
    assert any("topk" in name for name in top_2) and any("scatter" in name for name in top_2)
    assert not any("topk" in name or "scatter" in name or "sort" in name for name in soft)
    assert len(soft) < len(top_2)


def test_a_gated_residual_computes_no_more_over_tokens_than_the_default() -> None:
    gated, default = operators_of(mean_share=0.0), operators_of()
    for product in ("aten.mm.default", "aten.addmm.default"):
        assert gated.count(product) == default.count(product)
    # Forward and backward take the differences of A and of B and stack them, which is not over tokens.
    of_factors = 2 * 3 + 1
    assert len(gated) - of_factors <= len(default)


def test_experts_are_left_out_as_often_as_said_and_never_all() -> None:
    for num_experts, share in ((8, 0.5), (2, 0.9)):
        logits = torch.zeros(20_000, num_experts, dtype=torch.float64)
        disturb_router_(logits, noise=0.0, expert_dropout=share, seed=0)
        is_out = logits == -torch.inf
        assert not is_out.all(dim=1).any()
        # All would be left out by chance, and one of them stays.
        expected = share - share**num_experts / num_experts
        assert is_out.double().mean(dim=0).tolist() == pytest.approx([expected] * num_experts, abs=0.02)


def test_noise_has_the_deviation_it_names_and_comes_again_from_its_seed() -> None:
    logits = [torch.zeros(20_000, 4) for _ in range(3)]
    for value, seed in zip(logits, (1, 2, 1), strict=True):
        disturb_router_(value, noise=0.5, expert_dropout=0.0, seed=seed)
    assert logits[0].std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[0], logits[1])
