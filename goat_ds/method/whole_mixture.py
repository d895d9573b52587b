"""A mixture of whole copies of a weight: what a mixture of low-rank experts approximates (arXiv 2502.16894, section 3).

Every expert starts as a copy of the frozen weight (upcycling, arXiv 2212.05055) and is held as its difference from it,
``D_e = W_e - W0``. Gates that sum to 1 then give ``Σ_e g_e(x) W_e x`` as ``W0 x + Σ_e g_e(x) D_e x``. Adam trains a
difference as it trains a copy, as long as no weight decays.

An expert's product is taken for the tokens that use it, one expert after the other, so ``[T, E, O]`` never exists. What
differs from step to step is the number of its rows alone: all experts are one tensor, which every rank of a sharded run
gathers once for forward and once for backward. Backward keeps ``x`` and the router's logits only.

Shape letters: T tokens, M those that use one expert, I in features, O out features, E experts, N those that a router
chooses among (not the shared ones), C the columns of its product: N, and one more for a threshold.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from goat_ds.method.dropout import dropout_mask, kept_share
from goat_ds.method.input_gradient import SummedGradient
from goat_ds.method.mixture import MixtureOutput
from goat_ds.method.router import (
    RouterSettings,
    by_token,
    gates_of,
    has_wide_product,
    kept_load,
    prepared_logits,
    product_gradient,
    stacked_router,
    widened_logits,
)
from goat_ds.method.routing import BalanceSignal, Gates, RouterLoad


class WholeFactors(NamedTuple):
    """The tensors of one layer's experts: differences from the base, and the router's, as ``MixtureFactors`` has it."""

    d_EOI: Tensor
    router_NI: Tensor | None = None
    threshold_1I: Tensor | None = None
    threshold_bias_1: Tensor | None = None


class Dropout(NamedTuple):
    """The share of the experts' input that is zeroed, and the seed of which values."""

    share: float
    seed: int


def whole_mixture(
    x: Tensor,
    base: Tensor,
    factors: WholeFactors,
    settings: RouterSettings,
    *,
    signal: BalanceSignal,
    dropout: Dropout | None = None,
    router_seed: int | None = None,
    into_base: bool = False,
    summed: SummedGradient | None = None,
) -> MixtureOutput:
    """Return ``base + Σ_e g_e(x) D_e x``, and what the router did.

    Args:
        x: Input ``[..., I]``; differences are cast to its dtype, the router's product is taken in fp32 or better.
        base: The frozen layer's output ``[..., O]``.
        factors: The layer's tensors.
        settings: The layer's numbers.
        signal: Which tokens are real, and what the balance loss is worth in backward.
        dropout: Through which the experts see ``x``; the router sees all of it. None: no dropout.
        router_seed: Of the router's noise and of the experts that are left out. None: neither.
        into_base: Whether the result may take the place of ``base`` in memory, because nobody else reads it.
        summed: What takes the gradient of ``x``, which is given detached then.
    """
    y, *load = _WholeMixture.apply(x, base, dropout, router_seed, into_base, summed, settings, signal, *factors)
    return MixtureOutput(y, RouterLoad(*load) if load else None)


class _WholeMixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        dropout: Dropout | None,
        router_seed: int | None,
        into_base: bool,
        summed: SummedGradient | None,
        settings: RouterSettings,
        signal: BalanceSignal,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        factors = WholeFactors(*tensors)  # type: ignore[arg-type]
        x_TI, base_TO = by_token(x), by_token(base)
        logits_TC = _logits(x_TI, factors, settings, router_seed)
        gates = gates_of(logits_TC, settings)
        seen_TI = _seen(x_TI, _mask(x_TI, dropout), dropout)
        # Detached, the base is an output of its own that shares memory and version: had anybody kept the base for
        # backward, autograd would refuse to go on.
        y_TO = base_TO.detach() if into_base else base_TO.clone()
        for expert, use in enumerate(_uses(gates, settings)):
            product_MO = seen_TI[use.tokens] @ factors.d_EOI[expert].to(x.dtype).T
            _add_at_(y_TO, use.tokens, _times(product_MO, use.gate_M))
        # Parameters are saved as they are: a sharded one is empty between forward and backward, and whole in both.
        ctx.save_for_backward(x, logits_TC, *tensors)
        ctx.dropout, ctx.summed, ctx.settings, ctx.signal = dropout, summed, settings, signal
        if gates is None:
            return (y_TO.view(base.shape),)
        return (y_TO.view(base.shape), *kept_load(ctx, gates, settings, signal=signal, num_tokens=len(x_TI)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, logits_TC, *tensors = ctx.saved_tensors
        x_TI, grad_TO = by_token(x), by_token(grad)
        factors, settings, summed = WholeFactors(*tensors), ctx.settings, ctx.summed
        needs_x, needs_base, *_, needs_d, needs_router, needs_threshold, _ = ctx.needs_input_grad
        gates = gates_of(logits_TC, settings)
        mask_TI = _mask(x_TI, ctx.dropout)
        into = _gradients_of_experts(
            _seen(x_TI, mask_TI, ctx.dropout), grad_TO, gates, factors, settings, needs_d=needs_d
        )
        grad_x_TI = _seen(into.seen_TI, mask_TI, ctx.dropout)
        grad_router = grad_threshold = grad_bias = None
        router_CI = stacked_router(factors.router_NI, factors.threshold_1I)
        if gates is not None and router_CI is not None and into.gates_TN is not None:
            grad_logits_TC = product_gradient(
                gates, into.gates_TN, settings, share_E=ctx.share_E, mask_T=ctx.mask_T, signal=ctx.signal
            )
            # In half precision, as the gradients of all other products with x.
            rounded_TC = grad_logits_TC.to(x.dtype)
            grad_x_TI.addmm_(rounded_TC, router_CI.to(x.dtype))
            if needs_router or needs_threshold:
                grad_router_CI = (rounded_TC.T @ x_TI).to(router_CI.dtype)
                grad_router = grad_router_CI[: settings.num_choices] if needs_router else None
                if needs_threshold:
                    grad_threshold = grad_router_CI[settings.num_choices :]
                    grad_bias = grad_logits_TC[:, -1].sum()[None].to(router_CI.dtype)
        grad_x = None
        if summed is not None:
            summed.put(id(ctx), grad_x_TI)
        elif needs_x:
            grad_x = grad_x_TI.view(x.shape)
        grad_base = grad if needs_base else None
        return grad_x, grad_base, *[None] * 6, into.d_EOI, grad_router, grad_threshold, grad_bias


class _Use(NamedTuple):
    """Which tokens use an expert, all of them by a slice, and by which gates; None: each by 1."""

    tokens: Tensor | slice
    gate_M: Tensor | None


class _Gradients(NamedTuple):
    """Of what the experts see, of the gates, and of the differences from the base."""

    seen_TI: Tensor
    gates_TN: Tensor | None
    d_EOI: Tensor | None


def _uses(gates: Gates | None, settings: RouterSettings) -> Iterator[_Use]:
    """Yield how tokens use each expert."""
    every = slice(None)
    for expert in range(settings.num_experts):
        choice = expert - settings.shared_experts
        if gates is None or choice < 0:
            yield _Use(every, None)
            continue
        # Tensors without values, on which a run is planned, tell no number of tokens: it counts the most it may be.
        is_every = settings.keeps_all or isinstance(gates.kept_TE, FakeTensor)
        tokens = every if is_every else gates.kept_TE[:, choice].nonzero()[:, 0]
        yield _Use(tokens, gates.gates_TE[tokens, choice])


def _gradients_of_experts(
    seen_TI: Tensor,
    grad_TO: Tensor,
    gates: Gates | None,
    factors: WholeFactors,
    settings: RouterSettings,
    *,
    needs_d: bool,
) -> _Gradients:
    grad_seen_TI = torch.zeros_like(seen_TI)
    grad_gates_TN = None if gates is None else torch.zeros_like(gates.gates_TE)
    grad_d_EOI = torch.empty_like(factors.d_EOI) if needs_d else None
    for expert, use in enumerate(_uses(gates, settings)):
        grad_MO, seen_MI = grad_TO[use.tokens], seen_TI[use.tokens]
        back_MI = grad_MO @ factors.d_EOI[expert].to(grad_MO.dtype)
        if grad_gates_TN is not None and use.gate_M is not None:
            # <grad, D x> is <Dᵀ grad, x>, and Dᵀ grad is there already.
            dot_M = (back_MI * seen_MI).sum(dim=1, dtype=grad_gates_TN.dtype)
            grad_gates_TN[use.tokens, expert - settings.shared_experts] = dot_M
        if grad_d_EOI is not None:
            # An expert that no token uses has a gradient of zeros, and not none: all are one parameter.
            grad_d_EOI[expert] = _times(grad_MO, use.gate_M).T @ seen_MI
        _add_at_(grad_seen_TI, use.tokens, _times(back_MI, use.gate_M))
    return _Gradients(grad_seen_TI, grad_gates_TN, grad_d_EOI)


def _logits(x_TI: Tensor, factors: WholeFactors, settings: RouterSettings, seed: int | None) -> Tensor | None:
    """Return what gates are computed from, in fp32 or better; None without a router."""
    router_CI = stacked_router(factors.router_NI, factors.threshold_1I)
    if router_CI is None:
        return None
    if not has_wide_product(x_TI, router_CI):
        product_TC = widened_logits(x_TI, router_CI)
    elif x_TI.dtype == torch.promote_types(x_TI.dtype, torch.float32):
        product_TC = x_TI @ router_CI.to(x_TI.dtype).T
    else:
        product_TC = torch.mm(x_TI, router_CI.T, out_dtype=torch.float32)
    return prepared_logits(product_TC, factors.threshold_bias_1, settings, seed=seed)


def _mask(x_TI: Tensor, dropout: Dropout | None) -> Tensor | None:
    return None if dropout is None else dropout_mask(x_TI, dropout=dropout.share, seed=dropout.seed)


def _seen(x_TI: Tensor, mask_TI: Tensor | None, dropout: Dropout | None) -> Tensor:
    """Return what dropout lets through, which is also the gradient's way back."""
    return x_TI if mask_TI is None or dropout is None else (x_TI * mask_TI).div_(kept_share(dropout.share))


def _times(values_MO: Tensor, gate_M: Tensor | None) -> Tensor:
    return values_MO if gate_M is None else values_MO * gate_M[:, None].to(values_MO.dtype)


def _add_at_(into_TO: Tensor, tokens: Tensor | slice, values_MO: Tensor) -> None:
    """Add rows in place; no token is named twice."""
    if isinstance(tokens, slice):
        into_TO.add_(values_MO)
    else:
        into_TO.index_add_(0, tokens, values_MO)
