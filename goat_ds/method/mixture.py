"""The adapter's output, fast: every expert of a layer in two skinny products (arXiv 2502.16894, eq. 10).

One product takes ``x`` into the ranks of ``A`` and ``A0``, gates multiply them, unselected experts by zero, and one
takes them out by ``B`` and ``B0``. That costs what one LoRA of rank R costs and has no data-dependent control flow, so
every rank of a sharded run touches the same parameters in the same order. Backward keeps ``x``, the rank-R
activations and the router's logits only; a dropout mask is drawn again from its seed.

Reading and writing ``[T, I]`` and ``[T, O]`` once more costs more than the skinny products do, so the mixture is added
in place: to the base's output where the caller allows it, and to the base's gradient of ``x`` (``together``).

A residual that takes the token's own gates stands on both sides as differences, ``g ∘ (B (A - A0) + (B - B0) A0) x``:
the same function, and exactly nothing at the start, whatever the gates and however products round.

Shape letters: T tokens, I in features, O out features, E experts, N those that a router chooses among (not the shared
ones), C the columns of its product: N, and one more for a threshold, R total rank, D = R / E, G gated ranks: R, or 2 R
where the residual takes the gates too, S = G, or 2 R where the start's term stands beside the experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_ds.method.dropout import dropout_mask, kept_share
from goat_ds.method.input_gradient import Product, SummedGradient
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
from goat_ds.method.scaling import residual_scale


class MixtureFactors(NamedTuple):
    """The tensors of one layer's mixture.

    ``a_RI`` is ``[D, I]`` where all experts share one ``A``. ``a0_RI`` and ``b0_OR`` are None where there is no
    residual beside the base, ``router_EI`` is None for one expert and for dense experts, which all count for every
    token, and has no rows for shared experts. ``scale_E`` holds ``s_e`` for GOAT-s and is None where all experts share
    ``MixtureSettings.scale``; the threshold's weight and bias are None but for ``Routing.THRESHOLD``.
    """

    a_RI: Tensor
    b_OR: Tensor
    a0_RI: Tensor | None = None
    b0_OR: Tensor | None = None
    router_EI: Tensor | None = None
    scale_E: Tensor | None = None
    threshold_1I: Tensor | None = None
    threshold_bias_1: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureSettings(RouterSettings):
    """What one layer's mixture computes with, besides its tensors."""

    scale: float
    """s."""
    dropout: float = 0.0
    """Share of the input that the dropout mask zeroes; what is kept counts ``1 / (1 - dropout)``."""
    mean_share: float = 1.0
    """Share of the residual that takes the mean gates; the rest takes the token's own."""


class MixtureOutput(NamedTuple):
    """The adapted layer's output ``[..., O]`` and what its router did; ``load`` is None without one."""

    y: Tensor
    load: RouterLoad | None


class GatedActivations(NamedTuple):
    """``g ∘ A x`` without scale ``[T, G]``, in the dtype of ``x``, and all experts' gates in fp32 or better ``[T, E]``.

    Where the residual takes the gates, an expert's ``g A0 x`` follows its ``g A x``.
    """

    h_TG: Tensor
    gates_TE: Tensor


def gated_activations(x_TI: Tensor, factors: MixtureFactors, settings: MixtureSettings) -> GatedActivations:
    """Return what a router lets through of the rank-R activations; has no gradient of its own."""
    assert factors.router_EI is not None, "a layer without a router is dense already"
    alone = factors._replace(a0_RI=None, b0_OR=None)
    u_TR, _, logits_TC = _activations(x_TI, alone, settings, None, None)
    gates = gates_of(logits_TC, settings)
    assert gates is not None
    shared_TE = gates.gates_TE.new_ones(len(x_TI), settings.shared_experts)
    gates_TE = torch.cat([shared_TE, gates.gates_TE], dim=1)
    u_TED = _for_every_expert(u_TR, factors).unflatten(1, (settings.num_experts, -1))
    if factors.a0_RI is not None and _takes_gates(factors, settings):
        u0_TR = x_TI @ factors.a0_RI.to(x_TI.dtype).T
        u_TED = torch.cat([u_TED, u0_TR.view_as(u_TED)], dim=2)
    return GatedActivations((u_TED * gates_TE[..., None].to(x_TI.dtype)).flatten(1), gates_TE)


def mixture(
    x: Tensor,
    base: Tensor,
    factors: MixtureFactors,
    settings: MixtureSettings,
    *,
    signal: BalanceSignal,
    dropout_seed: int | None = None,
    router_seed: int | None = None,
    into_base: bool = False,
    summed: SummedGradient | None = None,
) -> MixtureOutput:
    """Return ``base + Σ_e s_e g_e(x) B_e A_e x - Σ_e s_e c_e B0_e A0_e x``, and what the router did.

    ``c_e`` is the mean gate: 1 for a shared expert, else ``1/N`` (Theorem 3.4). Where ``mean_share`` ``w`` is below 1,
    ``w c_e + (1 - w) g_e(x)`` takes its place.

    Args:
        x: Input ``[..., I]``; factors are cast to its dtype, the router's product is taken in fp32 or better.
        base: The frozen layer's output ``[..., O]``.
        factors: The layer's tensors.
        settings: The layer's numbers.
        signal: Which tokens are real, and what the balance loss is worth in backward.
        dropout_seed: Of ``dropout_mask``, through which ``A`` sees ``x``, and ``A0`` where ``mean_share`` is 0; the
            router sees all of it. None: no dropout.
        router_seed: Of the router's noise and of the experts that are left out. None: neither.
        into_base: Whether the result may take the place of ``base`` in memory, because nobody else reads it.
        summed: What takes the gradient of ``x``, which is given detached then.
    """
    seeds = (dropout_seed, router_seed)
    y, *load = _Mixture.apply(x, base, seeds, into_base, summed, settings, signal, *factors)
    return MixtureOutput(y, RouterLoad(*load) if load else None)


class _Mixture(torch.autograd.Function):
    # Tokens are made one dimension in here: a reshape outside is a node of its own, whose gradient is a view, and
    # autograd then adds it to the base's gradient out of place.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        seeds: tuple[int | None, int | None],
        into_base: bool,
        summed: SummedGradient | None,
        settings: MixtureSettings,
        signal: BalanceSignal,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        factors = MixtureFactors(*tensors)  # type: ignore[arg-type]
        x_TI, base_TO = by_token(x), by_token(base)
        u_TG, u0_TR, logits_TC = _activations(x_TI, factors, settings, *seeds)
        gates = gates_of(logits_TC, settings)
        spread = None if gates is None else _spread(factors, settings, like=gates.gates_TE)
        rank_gates_TG = _rank_gates(gates, spread, factors, settings, dtype=x.dtype)
        h_TS = _for_every_expert(u_TG, factors) * rank_gates_TG
        if u0_TR is not None:
            residual_gates_TR = _residual_gates(rank_gates_TG, factors, settings, dtype=x.dtype)
            h_TS = torch.cat([h_TS, u0_TR * residual_gates_TR], dim=1)
        b_SO = _stacked_b(factors, settings, x.dtype).T
        # Detached, the base is an output of its own that shares memory and version: had anybody kept the base for
        # backward, autograd would refuse to go on.
        y_TO = base_TO.detach().addmm_(h_TS, b_SO) if into_base else torch.addmm(base_TO, h_TS, b_SO)
        # Only while the residual warms up do gates multiply it beside the experts.
        kept_u0_TR = u0_TR.contiguous() if u0_TR is not None and settings.mean_share < 1 else None
        # Parameters are saved as they are: a sharded one is empty between forward and backward, and whole in both.
        # Gates and probabilities come of the logits again.
        ctx.save_for_backward(x, u_TG, kept_u0_TR, logits_TC, *tensors)
        ctx.dropout_seed, ctx.summed, ctx.settings, ctx.signal = seeds[0], summed, settings, signal
        ctx.spread = spread
        if gates is None:
            return (y_TO.view(base.shape),)
        return (y_TO.view(base.shape), *kept_load(ctx, gates, settings, signal=signal, num_tokens=len(x_TI)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TG, u0_TR, logits_TC, *tensors = ctx.saved_tensors
        x_TI, grad_TO = by_token(x), by_token(grad)
        factors, settings, summed = MixtureFactors(*tensors), ctx.settings, ctx.summed
        needs_x, needs_base, *_, needs_a, needs_b, _, _, needs_router, _, needs_threshold, _ = ctx.needs_input_grad
        gates = gates_of(logits_TC, settings)
        u_TG = _for_every_expert(u_TG, factors)
        rank_gates_TG = _rank_gates(gates, ctx.spread, factors, settings, dtype=x.dtype)
        grad_h_TS = grad_TO @ _stacked_b(factors, settings, grad.dtype)
        grads = _rank_gradients(ctx, grad_h_TS, u_TG, u0_TR, gates, factors, rank_gates_TG)
        mask_TI = _mask(x_TI, settings, ctx.dropout_seed)
        grad_x = grad_b_OR = None
        if needs_x or summed is not None:
            part = _input_gradient(grads, factors, settings, mask_TI)
            if summed is not None:
                summed.put(id(ctx), part)
            else:
                grad_x = (part.left_TG @ part.right_GI if isinstance(part, Product) else part).view(x.shape)
        if needs_b:
            h_TR = _in_total_ranks(u_TG * rank_gates_TG, factors)
            grad_b_OR = _summed_over_tokens(h_TR, grad_TO).T.to(factors.b_OR.dtype).contiguous()
        into = _FactorGradients(None, None, None, None)
        if needs_a or needs_router or needs_threshold:
            needs = MixtureFactors(needs_a, needs_b, router_EI=needs_router, threshold_1I=needs_threshold)
            into = _gradients_by_input(x_TI, grads, factors, needs, mask_TI)
        grad_base = grad if needs_base else None
        return (
            *(grad_x, grad_base, *[None] * 5, into.a_RI, grad_b_OR, None, None, into.router_EI, None),
            *(into.threshold_1I, into.threshold_bias_1),
        )


class _Activations(NamedTuple):
    """What gates multiply, in the dtype of ``x``, what they do not, and the router's logits in fp32 or better.

    The first is ``A x`` (``[T, D]`` where all experts share ``A``), or ``(A - A0) x`` and ``A0 x``; the second is
    ``A0 x``. The first and the logits are in storage of their own, because they are kept for backward.
    """

    u_TG: Tensor
    u0_TR: Tensor | None
    logits_TC: Tensor | None


class _RankGradients(NamedTuple):
    """The gradients of the activations, under dropout of their weights times what these see.

    ``u_TG`` is ``[T, D]`` where all experts share ``A``.
    """

    u_TG: Tensor
    logits_TC: Tensor | None
    u0_TR: Tensor | None


class _FactorGradients(NamedTuple):
    """Of those parameters whose products are taken with ``x``."""

    a_RI: Tensor | None
    router_EI: Tensor | None
    threshold_1I: Tensor | None
    threshold_bias_1: Tensor | None


class _Spread(NamedTuple):
    """What turns gates into those of ranks: ``s_e`` for the D ranks of expert e and 0 for those of the others.

    ``shared_G`` are the gates of the shared experts' ranks, 0 for others; None: there are none.
    """

    spread_NG: Tensor
    shared_G: Tensor | None


def _takes_gates(factors: MixtureFactors, settings: MixtureSettings) -> bool:
    """Whether the residual takes the token's own gates, and so stands in the differences of both sides."""
    return factors.a0_RI is not None and settings.mean_share == 0


def _expert_rank(factors: MixtureFactors, settings: MixtureSettings) -> int:
    return factors.b_OR.shape[1] // settings.num_experts


def _for_every_expert(u_TG: Tensor, factors: MixtureFactors) -> Tensor:
    """Return the activations of all experts, where they share one ``A`` ``[T, R]``; else what is given."""
    r = factors.b_OR.shape[1]
    return u_TG.repeat(1, r // u_TG.shape[1]) if u_TG.shape[1] < r else u_TG


def _in_total_ranks(h_TG: Tensor, factors: MixtureFactors) -> Tensor:
    """Return what ``B`` multiplies ``[T, R]``: both parts, where the residual takes the gates."""
    r = factors.b_OR.shape[1]
    return h_TG if h_TG.shape[1] == r else h_TG[:, :r] + h_TG[:, r:]


def _mask(x_TI: Tensor, settings: MixtureSettings, seed: int | None) -> Tensor | None:
    return None if seed is None else dropout_mask(x_TI, dropout=settings.dropout, seed=seed)


def _dropped(x_TI: Tensor, mask_TI: Tensor | None) -> Tensor:
    """What ``A`` sees, but for the division by ``kept_share``, which is cheaper on ``A x`` and on its gradient."""
    return x_TI if mask_TI is None else x_TI * mask_TI


def _activations(
    x_TI: Tensor,
    factors: MixtureFactors,
    settings: MixtureSettings,
    dropout_seed: int | None,
    router_seed: int | None,
) -> _Activations:
    router_CI, is_dropped = stacked_router(factors.router_EI, factors.threshold_1I), dropout_seed is not None
    is_apart = router_CI is not None and not has_wide_product(x_TI, router_CI)
    takes_gates = _takes_gates(factors, settings)
    a_GI = _gated_a(factors, settings)
    weights = (None if is_dropped else a_GI, None if takes_gates else factors.a0_RI, None if is_apart else router_CI)
    u_TG, u0_TR, logits_TC = _products(x_TI, weights, wide=router_CI is not None and not is_apart)
    if is_dropped:
        mask_TI = _mask(x_TI, settings, dropout_seed)
        u_TG = (_dropped(x_TI, mask_TI) @ a_GI.to(x_TI.dtype).T).div_(kept_share(settings.dropout))
    if router_CI is not None and is_apart:
        logits_TC = widened_logits(x_TI, router_CI)
    assert u_TG is not None
    u0_TR = None if u0_TR is None else u0_TR.to(x_TI.dtype)
    if logits_TC is not None:
        logits_TC = prepared_logits(logits_TC, factors.threshold_bias_1, settings, seed=router_seed)
    return _Activations(u_TG.to(x_TI.dtype).contiguous(), u0_TR, logits_TC)


def _gated_a(factors: MixtureFactors, settings: MixtureSettings) -> Tensor:
    """``A``, or ``A - A0`` and ``A0``, where the residual takes the gates ``[G, I]``."""
    if not _takes_gates(factors, settings):
        return factors.a_RI
    assert factors.a0_RI is not None
    return torch.cat([factors.a_RI - factors.a0_RI, factors.a0_RI])


def _products(x_TI: Tensor, weights: Sequence[Tensor | None], *, wide: bool) -> list[Tensor | None]:
    """Return ``x`` times each weight that is there, by one product over ``x``; in fp32 or better, if ``wide``."""
    there = [weight.to(x_TI.dtype) for weight in weights if weight is not None]
    if not there:
        return [None] * len(weights)
    stacked_IG = torch.cat(there).T
    if wide and x_TI.dtype != torch.promote_types(x_TI.dtype, torch.float32):
        product_TG = torch.mm(x_TI, stacked_IG, out_dtype=torch.float32)
    else:
        product_TG = x_TI @ stacked_IG
    parts = iter(product_TG.split([len(weight) for weight in there], dim=1))
    return [None if weight is None else next(parts) for weight in weights]


def _stacked_b(factors: MixtureFactors, settings: MixtureSettings, dtype: torch.dtype) -> Tensor:
    """``B``, and ``B0`` beside it where there is one, or ``B - B0`` where the residual takes the gates ``[O, S]``."""
    b_OR, b0_OR = factors.b_OR, factors.b0_OR
    if b0_OR is None:
        return b_OR.to(dtype)
    second_OR = b_OR - b0_OR if _takes_gates(factors, settings) else b0_OR
    return torch.cat([b_OR.to(dtype), second_OR.to(dtype)], dim=1)


def _spread(factors: MixtureFactors, settings: MixtureSettings, *, like: Tensor) -> _Spread:
    scale = settings.scale if factors.scale_E is None else factors.scale_E.to(like.dtype)[:, None]
    experts_EE = torch.eye(settings.num_experts, dtype=like.dtype, device=like.device)
    spread_EG = experts_EE.mul_(scale).repeat_interleave(_expert_rank(factors, settings), dim=1)
    if _takes_gates(factors, settings):
        spread_EG = spread_EG.repeat(1, 2)
    if not settings.shared_experts:
        return _Spread(spread_EG, None)
    shared_EG, spread_NG = spread_EG.split([settings.shared_experts, settings.num_choices])
    return _Spread(spread_NG, shared_EG.sum(dim=0))


def _rank_gates(
    gates: Gates | None,
    spread: _Spread | None,
    factors: MixtureFactors,
    settings: MixtureSettings,
    *,
    dtype: torch.dtype,
) -> Tensor | float:
    """What multiplies the gated activations: ``s_e g_e``, repeated over the D ranks of expert e ``[T, G]``.

    A number or ``[G]`` without a router.
    """
    if gates is not None and spread is not None:
        # Repeating along the last dimension takes four times as long.
        if spread.shared_G is None:
            return (gates.gates_TE @ spread.spread_NG).to(dtype)
        return torch.addmm(spread.shared_G, gates.gates_TE, spread.spread_NG).to(dtype)
    if factors.scale_E is None:
        return settings.scale
    scale_R = factors.scale_E.to(dtype).repeat_interleave(_expert_rank(factors, settings))
    return scale_R.repeat(2) if _takes_gates(factors, settings) else scale_R


def _residual_gates(
    rank_gates_TR: Tensor | float, factors: MixtureFactors, settings: MixtureSettings, *, dtype: torch.dtype
) -> Tensor | float:
    """What multiplies the start's activations: ``-s_e c_e``, or less of it and the rest by the gates of the token.

    A number, ``[R]`` or ``[T, R]``.
    """
    scale: Tensor | float = settings.scale
    if factors.scale_E is not None:
        scale = factors.scale_E.to(dtype).repeat_interleave(_expert_rank(factors, settings))
    mean = residual_scale(
        -scale,
        r=factors.b_OR.shape[1],
        num_experts=settings.num_experts,
        shared_experts=settings.shared_experts,
        dtype=dtype,
        device=factors.b_OR.device,
    )
    share = settings.mean_share
    return mean if share == 1 else share * mean - (1 - share) * rank_gates_TR


def _rank_gradients(
    ctx: Any,
    grad_h_TS: Tensor,
    u_TG: Tensor,
    u0_TR: Tensor | None,
    gates: Gates | None,
    factors: MixtureFactors,
    rank_gates_TG: Tensor | float,
) -> _RankGradients:
    settings, num_gated = ctx.settings, u_TG.shape[1]
    grad_logits_TC = grad_u0_TR = None
    if grad_h_TS.shape[1] > num_gated:
        residual_gates_TR = _residual_gates(rank_gates_TG, factors, settings, dtype=u_TG.dtype)
        grad_u0_TR = grad_h_TS[:, num_gated:] * residual_gates_TR
    if gates is not None:
        grad_gates_TG = grad_h_TS[:, :num_gated] * u_TG
        if u0_TR is not None:
            grad_gates_TG -= (1 - settings.mean_share) * grad_h_TS[:, num_gated:] * u0_TR
        grad_gates_NT = ctx.spread.spread_NG @ grad_gates_TG.to(gates.gates_TE.dtype).T
        grad_logits_TC = product_gradient(
            gates, grad_gates_NT.T, settings, share_E=ctx.share_E, mask_T=ctx.mask_T, signal=ctx.signal
        ).to(u_TG.dtype)
    grad_u_TG = grad_h_TS[:, :num_gated] * rank_gates_TG
    if ctx.dropout_seed is not None:
        grad_u_TG.div_(kept_share(settings.dropout))
    if len(factors.a_RI) < factors.b_OR.shape[1]:
        grad_u_TG = grad_u_TG.unflatten(1, (settings.num_experts, -1)).sum(dim=1)
    return _RankGradients(grad_u_TG, grad_logits_TC, grad_u0_TR)


def _summed_over_tokens(few_TG: Tensor, many_TI: Tensor) -> Tensor:
    """Return ``fewᵀ many`` ``[G, I]``."""
    # Laid out by rows, the small factor makes this up to a third faster.
    return few_TG.T.contiguous() @ many_TI


def _gradients_by_input(
    x_TI: Tensor, grads: _RankGradients, factors: MixtureFactors, needs: MixtureFactors, mask_TI: Tensor | None
) -> _FactorGradients:
    """Return the gradients of ``A`` and of the router, one product with ``x`` for both unless dropout parts them.

    Args:
        x_TI: The input.
        grads: Of the activations.
        factors: The layer's tensors.
        needs: Whether each of them needs a gradient.
        mask_TI: Of dropout.
    """
    # Beside A stands A0 where the residual takes the gates, and is frozen.
    grad_u_TR, grad_logits_TC = grads.u_TG[:, : len(factors.a_RI)], grads.logits_TC
    if grad_logits_TC is None:
        grad_a_RI = _summed_over_tokens(grad_u_TR, _dropped(x_TI, mask_TI))
        return _FactorGradients(grad_a_RI.to(factors.a_RI.dtype) if needs.a_RI else None, None, None, None)
    if mask_TI is not None:
        grad_a_RI = _summed_over_tokens(grad_u_TR, _dropped(x_TI, mask_TI))
        grad_router_CI = _summed_over_tokens(grad_logits_TC, x_TI)
    else:
        both = _summed_over_tokens(torch.cat([grad_u_TR, grad_logits_TC], dim=1), x_TI)
        grad_a_RI, grad_router_CI = both.split([grad_u_TR.shape[1], grad_logits_TC.shape[1]])
    grad_threshold_1I = grad_bias_1 = None
    if factors.threshold_1I is not None and needs.threshold_1I:
        grad_threshold_1I = grad_router_CI[-1:].to(factors.threshold_1I.dtype)
        grad_bias_1 = grad_logits_TC[:, -1].sum(dtype=torch.promote_types(x_TI.dtype, torch.float32))[None]
        grad_bias_1 = grad_bias_1.to(factors.threshold_1I.dtype)
    assert factors.router_EI is not None
    return _FactorGradients(
        grad_a_RI.to(factors.a_RI.dtype) if needs.a_RI else None,
        grad_router_CI[: len(factors.router_EI)].to(factors.router_EI.dtype) if needs.router_EI else None,
        grad_threshold_1I,
        grad_bias_1,
    )


def _input_gradient(
    grads: _RankGradients, factors: MixtureFactors, settings: MixtureSettings, mask_TI: Tensor | None
) -> Tensor | Product:
    dtype = grads.u_TG.dtype
    router_CI = stacked_router(factors.router_EI, factors.threshold_1I)
    into_x = zip(grads, (_gated_a(factors, settings), router_CI, factors.a0_RI), strict=True)
    pairs = [(grad, weight.to(dtype)) for grad, weight in into_x if grad is not None and weight is not None]
    if mask_TI is None:
        return Product(torch.cat([grad for grad, _ in pairs], dim=1), torch.cat([weight for _, weight in pairs]))
    (grad, weight), *undropped = pairs
    grad_x_TI = (grad @ weight).mul_(mask_TI)
    for grad, weight in undropped:
        grad_x_TI.addmm_(grad, weight)
    return grad_x_TI
