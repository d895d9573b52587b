"""The dense form is the best linear one: what the fit says equals slow least squares, and identities hold."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from goat_ds.method import dense_fit
from goat_ds.method.dense_fit import (
    FitSums,
    add_input_sums_,
    dense_factors,
    fit_dense,
    gated_factors,
    mean_gates_form,
    mixture_sums,
    parted_forms,
)
from goat_ds.method.mixture import MixtureFactors, MixtureSettings, mixture
from goat_ds.method.routing import BalanceSignal, Routing
from goat_ds.method.spectrum import Factors
from tests import reference

NUM_TOKENS, IN, OUT, R, E = 200, 10, 6, 8, 4
SETTINGS = MixtureSettings(num_experts=E, top_k=2, scale=1.5, balance_coef=0.0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(seed: int = 0) -> tuple[Tensor, MixtureFactors]:
    """Return tokens whose features differ in size, and a routed layer."""
    torch.manual_seed(seed)
    x_TI = draw(NUM_TOKENS, IN) * torch.logspace(-2, 2, IN, dtype=torch.float64)
    return x_TI, MixtureFactors(a_RI=draw(R, IN), b_OR=draw(OUT, R), router_EI=draw(E, IN) / 10)


def sums_of(x_TI: Tensor, factors: MixtureFactors, settings: MixtureSettings = SETTINGS) -> FitSums:
    hx_RI, hh_RR, gates_E = mixture_sums(x_TI, factors, settings)
    xx_II = torch.zeros(IN, IN, dtype=x_TI.dtype)
    for part_TI in x_TI.split(NUM_TOKENS // 2):
        add_input_sums_(xx_II, part_TI)
    return FitSums(xx_II, hx_RI, hh_RR, gates_E, len(x_TI))


def slow_activations(x_TI: Tensor, factors: MixtureFactors) -> Tensor:
    rows = []
    for x in x_TI:
        gates, _, _ = reference.gates_of_token([factors.router_EI[e] @ x for e in range(E)], SETTINGS.top_k)
        rows.append(torch.cat([gates[e] * (factors.a_RI[e * R // E : (e + 1) * R // E] @ x) for e in range(E)]))
    return torch.stack(rows)


def test_without_a_ridge_the_fit_is_that_of_least_squares() -> None:
    x_TI, factors = layer()
    expected_IR = torch.linalg.lstsq(x_TI, slow_activations(x_TI, factors)).solution
    fit = fit_dense(factors.a_RI, factors.b_OR, sums_of(x_TI, factors), ridge=0.0)
    torch.testing.assert_close(fit.a_RI, expected_IR.T, rtol=1e-8, atol=1e-10)


def test_a_sum_that_takes_several_pieces_is_that_of_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_fit, "ROWS_AT_ONCE", 3)
    x_TI, xx_II = draw(NUM_TOKENS, IN), torch.zeros(IN, IN, dtype=torch.float64)
    dense_fit.add_input_sums_(xx_II, x_TI)
    torch.testing.assert_close(xx_II.tril(), (x_TI.T @ x_TI).tril())


def test_what_is_unexplained_is_what_the_outputs_miss() -> None:
    x_TI, factors = layer()
    h_TR, sums = slow_activations(x_TI, factors), sums_of(x_TI, factors)
    fit, output_TO = fit_dense(factors.a_RI, factors.b_OR, sums), h_TR @ factors.b_OR.T
    for a_RI, told in ((fit.a_RI, fit.unexplained), (mean_gates_form(factors.a_RI, sums), fit.unexplained_by_mean)):
        missed_TO = output_TO - x_TI @ a_RI.T @ factors.b_OR.T
        assert told == pytest.approx(float((missed_TO**2).sum() / (output_TO**2).sum()), rel=1e-9)
    assert fit.unexplained < fit.unexplained_by_mean


def test_a_strong_ridge_leaves_the_mean_gates() -> None:
    x_TI, factors = layer()
    sums = sums_of(x_TI, factors)
    fit = fit_dense(factors.a_RI, factors.b_OR, sums, ridge=1e15)
    torch.testing.assert_close(fit.a_RI, mean_gates_form(factors.a_RI, sums), rtol=1e-9, atol=1e-12)


def test_a_router_that_gives_every_token_the_same_gates_loses_nothing() -> None:
    x_TI, factors = layer()
    factors = factors._replace(router_EI=torch.zeros(E, IN, dtype=torch.float64))
    settings = MixtureSettings(num_experts=E, top_k=E, scale=1.5, balance_coef=0.0)
    fit = fit_dense(factors.a_RI, factors.b_OR, sums_of(x_TI, factors, settings))
    torch.testing.assert_close(fit.a_RI, factors.a_RI / E, rtol=1e-10, atol=1e-12)
    assert fit.unexplained < 1e-12 and fit.unexplained_by_mean < 1e-12


def test_a_feature_that_is_always_zero_keeps_its_mean_gates() -> None:
    x_TI, factors = layer()
    x_TI[:, 3] = 0
    sums = sums_of(x_TI, factors)
    fit = fit_dense(factors.a_RI, factors.b_OR, sums)
    torch.testing.assert_close(fit.a_RI[:, 3], mean_gates_form(factors.a_RI, sums)[:, 3])


@pytest.mark.parametrize("adaptive", [False, True])
def test_static_experts_are_a_dense_product(adaptive: bool) -> None:
    x_TI, routed = layer()
    scale_E = torch.tensor([1.5, 2.0, 0.5, 1.0], dtype=torch.float64) if adaptive else None
    scale_R = 1.5 if scale_E is None else scale_E.repeat_interleave(R // E)
    a0_RI, b0_OR, base_TO = draw(R, IN), draw(OUT, R), draw(NUM_TOKENS, OUT)
    factors = MixtureFactors(routed.a_RI, routed.b_OR, a0_RI, b0_OR, None, scale_E)
    y, load = mixture(x_TI, base_TO, factors, SETTINGS, signal=BalanceSignal())
    delta_OI = (routed.b_OR * scale_R) @ routed.a_RI - (b0_OR * scale_R / E) @ a0_RI
    torch.testing.assert_close(y, base_TO + x_TI @ delta_OI.T)
    assert load is None


@pytest.mark.parametrize(
    "options",
    [
        {}, {"mean_share": 0.0}, {"shared_experts": 1}, {"shared_experts": 1, "mean_share": 0.0}, {"temperature": 0.5},
        {"routing": Routing.TOP_P, "top_p": 0.6}, {"routing": Routing.THRESHOLD, "max_threshold": 0.2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shares_a", [False, True])
def test_with_every_option_the_dense_weight_is_that_of_least_squares_on_what_the_mixture_adds(
    options: dict[str, Any], shares_a: bool
) -> None:
    x_TI, factors = layer()
    settings = dataclasses.replace(SETTINGS, **options)
    factors = factors._replace(
        router_EI=factors.router_EI[: settings.num_choices], a0_RI=draw(R, IN), b0_OR=draw(OUT, R)
    )
    if shares_a:
        factors = factors._replace(a_RI=factors.a_RI[: R // E], a0_RI=None, b0_OR=None)
    if settings.routing is Routing.THRESHOLD:
        factors = factors._replace(threshold_1I=draw(1, IN) / 10, threshold_bias_1=draw(1))
    y_TO, _ = mixture(x_TI, draw(NUM_TOKENS, OUT) * 0, factors, settings, signal=BalanceSignal())
    expected_IO = torch.linalg.lstsq(x_TI, y_TO).solution

    start = None if factors.a0_RI is None else Factors(factors.a0_RI, factors.b0_OR)
    takes_gates = start is not None and settings.mean_share == 0
    a_RI, b_OR = gated_factors(Factors(factors.a_RI, factors.b_OR), start if takes_gates else None, num_experts=E)
    fit = fit_dense(a_RI, b_OR, sums_of(x_TI, factors, settings), ridge=0.0)
    delta = dense_factors(
        Factors(fit.a_RI, b_OR),
        None if takes_gates else start,
        scale_R=settings.scale,
        num_experts=E,
        shared_experts=settings.shared_experts,
    )
    torch.testing.assert_close(delta.b_OR @ delta.a_RI, expected_IO.T, rtol=1e-7, atol=1e-8)


def test_a_dense_form_parts_into_those_of_a_and_of_a0() -> None:
    a, b, a0, b0 = draw(R, IN), draw(OUT, R), draw(R, IN), draw(OUT, R)
    both = gated_factors(Factors(a, b), Factors(a0, b0), num_experts=E)
    torch.testing.assert_close(both.b_OR @ both.a_RI, b @ a - b0 @ a0)
    found, found0 = parted_forms(both.a_RI, num_experts=E)
    assert torch.equal(found, a) and torch.equal(found0, a0)
