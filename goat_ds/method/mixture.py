"""The adapter's output, fast: every expert of a layer in three skinny products (arXiv 2502.16894, eq. 10).

``A``, ``A0`` and the router see the same ``x``; gates multiply the rank-R activations, unselected experts by zero.
That costs what one LoRA of rank R costs and has no data-dependent control flow, so every rank of a sharded run
touches the same parameters in the same order. Backward keeps ``x``, the rank-R activations and the gates only.

Shape letters: T tokens, I in features, O out features, E experts, R total rank, D = R / E.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from goat_ds.method.routing import (
    BalanceSignal,
    Gates,
    RouterLoad,
    logits_gradient,
    real_token_weights,
    router_load,
    top_k_gates,
)


class MixtureFactors(NamedTuple):
    """The tensors of one layer's mixture.

    ``a0_RI`` and ``b0_OR`` are None where there is no low-rank residual, ``router_EI`` is None for one expert,
    ``scale_E`` holds ``s_e`` for GOAT-s and is None where all experts share ``MixtureSettings.scale``.
    """

    a_RI: Tensor
    b_OR: Tensor
    a0_RI: Tensor | None = None
    b0_OR: Tensor | None = None
    router_EI: Tensor | None = None
    scale_E: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """What one layer's mixture computes with, besides its tensors."""

    num_experts: int
    """E."""
    top_k: int
    """Experts a token uses."""
    scale: float
    """s."""
    balance_coef: float
    """Weight of this layer's balance loss; 0 leaves it out of the gradient."""


class MixtureOutput(NamedTuple):
    """The adapter's output ``[T, O]`` and what its router did; ``load`` is None for one expert."""

    y_TO: Tensor
    load: RouterLoad | None


def mixture(
    x_TI: Tensor,
    base_TO: Tensor,
    factors: MixtureFactors,
    settings: MixtureSettings,
    *,
    signal: BalanceSignal,
    dropout_mask_TI: Tensor | None = None,
) -> MixtureOutput:
    """Give ``base + Σ_e s_e g_e(x) B_e A_e x - Σ_e s_e/E B0_e A0_e x``, and what the router did.

    Args:
        x_TI: Input ``[T, I]``; factors are cast to its dtype, the router's product is taken in fp32 or better.
        base_TO: The frozen layer's output ``[T, O]``.
        factors: The layer's tensors.
        settings: The layer's numbers.
        signal: Which tokens are real, and what the balance loss is worth in backward.
        dropout_mask_TI: What ``A`` (not the router, not the residual) sees of ``x`` is ``x * mask``: 0 or 1/(1-p).
    """
    y_TO, *load = _Mixture.apply(x_TI, base_TO, dropout_mask_TI, settings, signal, *factors)
    return MixtureOutput(y_TO, RouterLoad(*load) if load else None)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        base_TO: Tensor,
        dropout_mask_TI: Tensor | None,
        settings: MixtureSettings,
        signal: BalanceSignal,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        factors = MixtureFactors(*tensors)  # type: ignore[arg-type]
        a_RI, b_OR = factors.a_RI.to(x_TI.dtype), factors.b_OR.to(x_TI.dtype)
        u_TR = _dropped(x_TI, dropout_mask_TI) @ a_RI.T
        gates = _gates(x_TI, factors.router_EI, settings)
        h_TR = u_TR * _rank_gates(gates, factors, settings, dtype=x_TI.dtype)
        if factors.a0_RI is None or factors.b0_OR is None:
            y_TO = torch.addmm(base_TO, h_TR, b_OR.T)
        else:
            h0_TR = (x_TI @ factors.a0_RI.to(x_TI.dtype).T) * _residual_gates(factors, settings, dtype=x_TI.dtype)
            b_and_b0 = torch.cat([b_OR, factors.b0_OR.to(x_TI.dtype)], dim=1)
            y_TO = torch.addmm(base_TO, torch.cat([h_TR, h0_TR], dim=1), b_and_b0.T)
        # Parameters are saved as they are: a sharded one is empty between forward and backward, and whole in both.
        ctx.save_for_backward(x_TI, dropout_mask_TI, u_TR, *(gates or (None, None, None)), *tensors)
        ctx.settings, ctx.signal = settings, signal
        if gates is None:
            return (y_TO,)
        ctx.mask_T = signal.mask_of(len(x_TI))
        load = router_load(gates, top_k=settings.top_k, mask_T=ctx.mask_T)
        ctx.share_E = load.share_E
        ctx.mark_non_differentiable(*load)
        return (y_TO, *load)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, dropout_mask_TI, u_TR, gates_TE, probs_TE, kept_TE, *tensors = ctx.saved_tensors
        factors, settings = MixtureFactors(*tensors), ctx.settings
        gates = None if gates_TE is None else Gates(gates_TE, probs_TE, kept_TE)
        dtype = x_TI.dtype
        rank_gates_TR = _rank_gates(gates, factors, settings, dtype=dtype)
        grad_h_TR = grad_TO @ factors.b_OR.to(dtype)
        grad_u_TR = grad_h_TR * rank_gates_TR
        grads: dict[str, Tensor | None] = {}
        if ctx.needs_input_grad[5]:
            grads["a"] = (grad_u_TR.T @ _dropped(x_TI, dropout_mask_TI)).to(factors.a_RI.dtype)
        if ctx.needs_input_grad[6]:
            grads["b"] = (grad_TO.T @ (u_TR * rank_gates_TR)).to(factors.b_OR.dtype)
        grad_logits_TE = None
        if gates is not None and factors.router_EI is not None:
            grad_logits_TE = _logits_gradient(ctx, gates, factors, grad_h_TR * u_TR)
            if ctx.needs_input_grad[9]:
                x_wide = x_TI.to(grad_logits_TE.dtype)
                grads["router"] = (grad_logits_TE.T @ x_wide).to(factors.router_EI.dtype)
        if ctx.needs_input_grad[0]:
            grads["x"] = _input_gradient(grad_TO, grad_u_TR, grad_logits_TE, factors, settings, dropout_mask_TI)
        base_grad = grad_TO if ctx.needs_input_grad[1] else None
        a_grad, b_grad, router_grad = grads.get("a"), grads.get("b"), grads.get("router")
        return (grads.get("x"), base_grad, None, None, None, a_grad, b_grad, None, None, router_grad, None)


def _dropped(x_TI: Tensor, mask_TI: Tensor | None) -> Tensor:
    return x_TI if mask_TI is None else x_TI * mask_TI


def _gates(x_TI: Tensor, router_EI: Tensor | None, settings: MixtureSettings) -> Gates | None:
    if router_EI is None:
        return None
    # Logits in bf16 would tie or swap experts whose logits differ by less than 1/256 of their size.
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    return top_k_gates(functional.linear(x_TI.to(wide), router_EI.to(wide)), top_k=settings.top_k)


def _scales(factors: MixtureFactors, settings: MixtureSettings, *, like: Tensor) -> Tensor:
    """``s_e`` for every expert ``[E]``."""
    if factors.scale_E is None:
        return like.new_full((settings.num_experts,), settings.scale)
    return factors.scale_E.to(like.dtype)


def _rank_gates(
    gates: Gates | None, factors: MixtureFactors, settings: MixtureSettings, *, dtype: torch.dtype
) -> Tensor | float:
    """What multiplies the rank-R activations: ``s_e g_e``, repeated over the D rows of expert e ``[T, R]``."""
    if gates is None:
        return settings.scale if factors.scale_E is None else factors.scale_E.to(dtype)
    scaled_TE = gates.gates_TE * _scales(factors, settings, like=gates.gates_TE)
    return scaled_TE.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts, dim=1)


def _residual_gates(factors: MixtureFactors, settings: MixtureSettings, *, dtype: torch.dtype) -> Tensor | float:
    """What multiplies the start's activations: ``-s_e/E`` (Theorem 3.4), a number or ``[R]``."""
    if factors.scale_E is None:
        return -settings.scale / settings.num_experts
    scale_R = factors.scale_E.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts)
    return -scale_R / settings.num_experts


def _logits_gradient(ctx: Any, gates: Gates, factors: MixtureFactors, grad_gates_TR: Tensor) -> Tensor:
    settings = ctx.settings
    per_expert_TED = grad_gates_TR.to(gates.gates_TE.dtype).unflatten(1, (settings.num_experts, -1))
    gates_grad_TE = per_expert_TED.sum(dim=-1) * _scales(factors, settings, like=gates.gates_TE)
    balance_grad_TE = None
    if settings.balance_coef:
        # dL_b/dp_e(t) = f_e / T for a real token: f counts choices, and choices have no gradient.
        weight_T = real_token_weights(gates.probs_TE, ctx.mask_T) * ctx.signal.take_upstream()
        share_E = ctx.share_E * settings.num_experts * settings.balance_coef
        balance_grad_TE = weight_T[:, None] * share_E
    return logits_gradient(gates, gates_grad_TE=gates_grad_TE, balance_grad_TE=balance_grad_TE)


def _input_gradient(
    grad_TO: Tensor,
    grad_u_TR: Tensor,
    grad_logits_TE: Tensor | None,
    factors: MixtureFactors,
    settings: MixtureSettings,
    dropout_mask_TI: Tensor | None,
) -> Tensor:
    dtype = grad_TO.dtype
    into_x = [(grad_u_TR, factors.a_RI.to(dtype))]
    if factors.a0_RI is not None and factors.b0_OR is not None:
        grad_h0_TR = (grad_TO @ factors.b0_OR.to(dtype)) * _residual_gates(factors, settings, dtype=dtype)
        into_x.append((grad_h0_TR, factors.a0_RI.to(dtype)))
    if grad_logits_TE is not None and factors.router_EI is not None:
        into_x.append((grad_logits_TE.to(dtype), factors.router_EI.to(dtype)))
    if dropout_mask_TI is None:
        return torch.cat([grad for grad, _ in into_x], dim=1) @ torch.cat([weight for _, weight in into_x])
    grad_x_TI = (into_x[0][0] @ into_x[0][1]).mul_(dropout_mask_TI)
    for grad, weight in into_x[1:]:
        grad_x_TI.addmm_(grad, weight)
    return grad_x_TI
