"""The adapter's output, fast: every expert of a layer in two skinny products (arXiv 2502.16894, eq. 10).

One product takes ``x`` into the ranks of ``A`` and ``A0``, gates multiply them, unselected experts by zero, and one
takes them out by ``B`` and ``B0``. That costs what one LoRA of rank R costs and has no data-dependent control flow, so
every rank of a sharded run touches the same parameters in the same order. Backward keeps ``x``, the rank-R
activations and the gates only.

Shape letters: T tokens, I in features, O out features, E experts, R total rank, D = R / E, S = R, or 2 R where the
start's term stands beside the experts.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from goat_ds.method.routing import (
    BalanceSignal,
    Gates,
    RouterLoad,
    logits_gradient,
    real_token_weights,
    router_load,
    top_k_gates,
)

WIDENED_TOKENS = 2048
"""How many tokens of a half-precision input are copied to fp32 at a time."""


class MixtureFactors(NamedTuple):
    """The tensors of one layer's mixture.

    ``a0_RI`` and ``b0_OR`` are None where there is no low-rank residual, ``router_EI`` is None for one expert and for
    static experts, which all count for every token, ``scale_E`` holds ``s_e`` for GOAT-s and is None where all experts
    share ``MixtureSettings.scale``.
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
    dropout: float = 0.0
    """Share of the input that the dropout mask zeroes; what is kept counts ``1 / (1 - dropout)``."""


class MixtureOutput(NamedTuple):
    """The adapted layer's output ``[..., O]`` and what its router did; ``load`` is None without one."""

    y: Tensor
    load: RouterLoad | None


class GatedActivations(NamedTuple):
    """``g ∘ A x`` without scale ``[T, R]``, in the dtype of ``x``, and the gates ``[T, E]`` in fp32 or better."""

    h_TR: Tensor
    gates_TE: Tensor


def gated_activations(x_TI: Tensor, factors: MixtureFactors, settings: MixtureSettings) -> GatedActivations:
    """Give what a router lets through of the rank-R activations; has no gradient of its own."""
    gates = _gates(x_TI, factors.router_EI, settings)
    assert gates is not None, "a layer without a router is static already"
    u_TR = x_TI @ factors.a_RI.to(x_TI.dtype).T
    expert_rank = len(factors.a_RI) // settings.num_experts
    return GatedActivations(u_TR * gates.gates_TE.to(x_TI.dtype).repeat_interleave(expert_rank, dim=1), gates.gates_TE)


def mixture(
    x: Tensor,
    base: Tensor,
    factors: MixtureFactors,
    settings: MixtureSettings,
    *,
    signal: BalanceSignal,
    dropout_mask: Tensor | None = None,
) -> MixtureOutput:
    """Give ``base + Σ_e s_e g_e(x) B_e A_e x - Σ_e s_e/E B0_e A0_e x``, and what the router did.

    Args:
        x: Input ``[..., I]``; factors are cast to its dtype, the router's product is taken in fp32 or better.
        base: The frozen layer's output ``[..., O]``.
        factors: The layer's tensors.
        settings: The layer's numbers.
        signal: Which tokens are real, and what the balance loss is worth in backward.
        dropout_mask: True where ``A`` sees ``x``; the router and the residual see all of it.
    """
    y, *load = _Mixture.apply(x, base, dropout_mask, settings, signal, *factors)
    return MixtureOutput(y, RouterLoad(*load) if load else None)


class _Mixture(torch.autograd.Function):
    # Tokens are made one dimension in here: a reshape outside is a node of its own, whose gradient is a view, and
    # autograd then adds it to the base's gradient out of place.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        dropout_mask: Tensor | None,
        settings: MixtureSettings,
        signal: BalanceSignal,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        factors = MixtureFactors(*tensors)  # type: ignore[arg-type]
        x_TI = _by_token(x)
        gates = _gates(x_TI, factors.router_EI, settings)
        gates_TE, probs_TE = (None, None) if gates is None else (gates.gates_TE, gates.probs_TE)
        u_TR, u0_TR = _into_ranks(x_TI, factors, settings, _by_token(dropout_mask))
        h_TS = u_TR * _rank_gates(gates_TE, factors, settings, dtype=x.dtype)
        if u0_TR is not None:
            h_TS = torch.cat([h_TS, u0_TR * _residual_gates(factors, settings, dtype=x.dtype)], dim=1)
        y = torch.addmm(_by_token(base), h_TS, _stacked_b(factors, x.dtype).T).view(base.shape)
        # Parameters are saved as they are: a sharded one is empty between forward and backward, and whole in both.
        ctx.save_for_backward(x, dropout_mask, u_TR, gates_TE, probs_TE, *tensors)
        ctx.settings, ctx.signal = settings, signal
        if gates is None:
            return (y,)
        ctx.mask_T = signal.mask_of(len(x_TI))
        load = router_load(gates, top_k=settings.top_k, mask_T=ctx.mask_T)
        ctx.share_E = load.share_E
        ctx.mark_non_differentiable(*load)
        return (y, *load)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, dropout_mask, u_TR, gates_TE, probs_TE, *tensors = ctx.saved_tensors
        x_TI, dropout_mask_TI, grad_TO = _by_token(x), _by_token(dropout_mask), _by_token(grad)
        factors, settings, r = MixtureFactors(*tensors), ctx.settings, u_TR.shape[1]
        needs_x, needs_base, _, _, _, needs_a, needs_b, _, _, needs_router, _ = ctx.needs_input_grad
        rank_gates_TR = _rank_gates(gates_TE, factors, settings, dtype=x.dtype)
        grad_h_TS = grad_TO @ _stacked_b(factors, grad.dtype)
        grad_u_TR, grad_u0_TR = grad_h_TS[:, :r] * rank_gates_TR, None
        if grad_h_TS.shape[1] > r:
            grad_u0_TR = grad_h_TS[:, r:] * _residual_gates(factors, settings, dtype=x.dtype)
        grad_logits_TE = None
        if gates_TE is not None:
            grad_gates_TR = grad_h_TS[:, :r] * u_TR
            grad_logits_TE = _logits_gradient(ctx, gates_TE, probs_TE, factors, grad_gates_TR).to(x.dtype)
        grad_x = grad_a_RI = grad_b_OR = grad_router_EI = None
        if needs_x:
            grad_x_TI = _input_gradient(grad_u_TR, grad_u0_TR, grad_logits_TE, factors, settings, dropout_mask_TI)
            grad_x = grad_x_TI.view(x.shape)
        if needs_b:
            grad_b_OR = (grad_TO.T @ (u_TR * rank_gates_TR)).to(factors.b_OR.dtype)
        if needs_a or needs_router:
            grad_a_RI, grad_router_EI = _gradients_by_input(x_TI, grad_u_TR, grad_logits_TE, settings, dropout_mask_TI)
            grad_a_RI = grad_a_RI.to(factors.a_RI.dtype) if needs_a else None
            if factors.router_EI is not None and grad_router_EI is not None:
                grad_router_EI = grad_router_EI.to(factors.router_EI.dtype) if needs_router else None
        grad_base = grad if needs_base else None
        return grad_x, grad_base, None, None, None, grad_a_RI, grad_b_OR, None, None, grad_router_EI, None


@overload
def _by_token(tensor: Tensor) -> Tensor: ...
@overload
def _by_token(tensor: None) -> None: ...
def _by_token(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def _gates(x_TI: Tensor, router_EI: Tensor | None, settings: MixtureSettings) -> Gates | None:
    if router_EI is None:
        return None
    # Logits in bf16 would tie or swap experts whose logits differ by less than 1/256 of their size. Widening x piece
    # by piece bounds the copy; a product with few rows is twice as fast as one with few columns.
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    pieces = x_TI.split(WIDENED_TOKENS) if x_TI.dtype != wide else (x_TI,)
    logits_ET = torch.cat([router_EI.to(wide) @ piece.to(wide).T for piece in pieces], dim=1)
    return top_k_gates(logits_ET.T.contiguous(), top_k=settings.top_k)


def _into_ranks(
    x_TI: Tensor, factors: MixtureFactors, settings: MixtureSettings, dropout_mask_TI: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Give ``A x`` and ``A0 x``, each in storage of its own: only the first is kept for backward."""
    a_RI = factors.a_RI.to(x_TI.dtype)
    if factors.a0_RI is None:
        return _dropped(x_TI, settings, dropout_mask_TI) @ a_RI.T, None
    a0_RI = factors.a0_RI.to(x_TI.dtype)
    if dropout_mask_TI is not None:
        return _dropped(x_TI, settings, dropout_mask_TI) @ a_RI.T, x_TI @ a0_RI.T
    u_TR, u0_TR = (x_TI @ torch.cat([a_RI, a0_RI]).T).chunk(2, dim=1)
    return u_TR.contiguous(), u0_TR


def _dropped(x_TI: Tensor, settings: MixtureSettings, mask_TI: Tensor | None) -> Tensor:
    return x_TI if mask_TI is None else (x_TI * mask_TI).div_(1 - settings.dropout)


def _stacked_b(factors: MixtureFactors, dtype: torch.dtype) -> Tensor:
    """``B``, and ``B0`` beside it where there is one ``[O, S]``."""
    b_OR = factors.b_OR.to(dtype)
    return b_OR if factors.b0_OR is None else torch.cat([b_OR, factors.b0_OR.to(dtype)], dim=1)


def _scales(factors: MixtureFactors, settings: MixtureSettings, *, like: Tensor) -> Tensor:
    """``s_e`` for every expert ``[E]``."""
    if factors.scale_E is None:
        return like.new_full((settings.num_experts,), settings.scale)
    return factors.scale_E.to(like.dtype)


def _rank_gates(
    gates_TE: Tensor | None, factors: MixtureFactors, settings: MixtureSettings, *, dtype: torch.dtype
) -> Tensor | float:
    """What multiplies the rank-R activations: ``s_e g_e``, repeated over the D rows of expert e ``[T, R]``.

    A number or ``[R]`` without a router.
    """
    if gates_TE is None:
        if factors.scale_E is None:
            return settings.scale
        return factors.scale_E.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts)
    scaled_TE = gates_TE * _scales(factors, settings, like=gates_TE)
    return scaled_TE.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts, dim=1)


def _residual_gates(factors: MixtureFactors, settings: MixtureSettings, *, dtype: torch.dtype) -> Tensor | float:
    """What multiplies the start's activations: ``-s_e/E`` (Theorem 3.4), a number or ``[R]``."""
    if factors.scale_E is None:
        return -settings.scale / settings.num_experts
    scale_R = factors.scale_E.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts)
    return -scale_R / settings.num_experts


def _logits_gradient(
    ctx: Any, gates_TE: Tensor, probs_TE: Tensor, factors: MixtureFactors, grad_gates_TR: Tensor
) -> Tensor:
    settings = ctx.settings
    per_expert_TED = grad_gates_TR.to(gates_TE.dtype).unflatten(1, (settings.num_experts, -1))
    grad_gates_TE = per_expert_TED.sum(dim=-1) * _scales(factors, settings, like=gates_TE)
    grad_probs_TE = None
    if settings.balance_coef:
        # dL_b/dp_e(t) = f_e / T for a real token: f counts choices, and choices have no gradient.
        weight_T = real_token_weights(probs_TE, ctx.mask_T) * ctx.signal.take_upstream(like=probs_TE)
        share_E = ctx.share_E * settings.num_experts * settings.balance_coef
        grad_probs_TE = weight_T[:, None] * share_E
    return logits_gradient(gates_TE, probs_TE, grad_gates_TE=grad_gates_TE, grad_probs_TE=grad_probs_TE)


def _gradients_by_input(
    x_TI: Tensor,
    grad_u_TR: Tensor,
    grad_logits_TE: Tensor | None,
    settings: MixtureSettings,
    dropout_mask_TI: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Give the gradients of ``A`` and of the router, one product with ``x`` for both unless dropout parts them."""
    if grad_logits_TE is None:
        return grad_u_TR.T @ _dropped(x_TI, settings, dropout_mask_TI), None
    if dropout_mask_TI is not None:
        return grad_u_TR.T @ _dropped(x_TI, settings, dropout_mask_TI), grad_logits_TE.T @ x_TI
    both = torch.cat([grad_u_TR, grad_logits_TE], dim=1).T @ x_TI
    r = grad_u_TR.shape[1]
    return both[:r], both[r:]


def _input_gradient(
    grad_u_TR: Tensor,
    grad_u0_TR: Tensor | None,
    grad_logits_TE: Tensor | None,
    factors: MixtureFactors,
    settings: MixtureSettings,
    dropout_mask_TI: Tensor | None,
) -> Tensor:
    dtype = grad_u_TR.dtype
    into_x = [(grad_u_TR, factors.a_RI), (grad_u0_TR, factors.a0_RI), (grad_logits_TE, factors.router_EI)]
    pairs = [(grad, weight.to(dtype)) for grad, weight in into_x if grad is not None and weight is not None]
    if dropout_mask_TI is None:
        return torch.cat([grad for grad, _ in pairs], dim=1) @ torch.cat([weight for _, weight in pairs])
    (grad, weight), *undropped = pairs
    grad_x_TI = (grad @ weight).mul_(dropout_mask_TI).div_(1 - settings.dropout)
    for grad, weight in undropped:
        grad_x_TI.addmm_(grad, weight)
    return grad_x_TI
