"""The adapter's output, fast: every expert of a layer in two skinny products (arXiv 2502.16894, eq. 10).

One product takes ``x`` into the ranks of ``A`` and ``A0``, gates multiply them, unselected experts by zero, and one
takes them out by ``B`` and ``B0``. That costs what one LoRA of rank R costs and has no data-dependent control flow, so
every rank of a sharded run touches the same parameters in the same order. Backward keeps ``x``, the rank-R
activations and the router's logits only; a dropout mask is drawn again from its seed.

Reading and writing ``[T, I]`` and ``[T, O]`` once more costs more than the skinny products do, so the mixture is added
in place: to the base's output where the caller allows it, and to the base's gradient of ``x`` (``together``).

Shape letters: T tokens, I in features, O out features, E experts, R total rank, D = R / E, S = R, or 2 R where the
start's term stands beside the experts, G = S + E where there is a router, else S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_ds.method.dropout import dropout_mask, kept_share
from goat_ds.method.input_gradient import Product, SummedGradient
from goat_ds.method.routing import (
    BalanceSignal,
    Gates,
    RouterLoad,
    logits_gradient,
    real_token_weights,
    router_load,
    top_k_gates,
)

WIDENED_BYTES = 2**20
"""How much of a half-precision input is copied to fp32 at a time on a CPU: what stays in a core's own cache."""
LAUNCHED_BYTES = 2**25
"""The same on a device where every piece is two kernels to launch."""


class MixtureFactors(NamedTuple):
    """The tensors of one layer's mixture.

    ``a0_RI`` and ``b0_OR`` are None where there is no low-rank residual, ``router_EI`` is None for one expert and for
    dense experts, which all count for every token, ``scale_E`` holds ``s_e`` for GOAT-s and is None where all experts
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
    """Return what a router lets through of the rank-R activations; has no gradient of its own."""
    u_TR, _, logits_TE = _activations(x_TI, factors._replace(a0_RI=None), settings, None)
    assert logits_TE is not None, "a layer without a router is dense already"
    gates_TE = top_k_gates(logits_TE, top_k=settings.top_k).gates_TE
    expert_rank = len(factors.a_RI) // settings.num_experts
    return GatedActivations(u_TR * gates_TE.to(x_TI.dtype).repeat_interleave(expert_rank, dim=1), gates_TE)


def mixture(
    x: Tensor,
    base: Tensor,
    factors: MixtureFactors,
    settings: MixtureSettings,
    *,
    signal: BalanceSignal,
    dropout_seed: int | None = None,
    into_base: bool = False,
    summed: SummedGradient | None = None,
) -> MixtureOutput:
    """Return ``base + Σ_e s_e g_e(x) B_e A_e x - Σ_e s_e/E B0_e A0_e x``, and what the router did.

    Args:
        x: Input ``[..., I]``; factors are cast to its dtype, the router's product is taken in fp32 or better.
        base: The frozen layer's output ``[..., O]``.
        factors: The layer's tensors.
        settings: The layer's numbers.
        signal: Which tokens are real, and what the balance loss is worth in backward.
        dropout_seed: Of ``dropout_mask``, through which ``A`` sees ``x``; the router and the residual see all of it.
            None: no dropout.
        into_base: Whether the result may take the place of ``base`` in memory, because nobody else reads it.
        summed: What takes the gradient of ``x``, which is given detached then.
    """
    y, *load = _Mixture.apply(x, base, dropout_seed, into_base, summed, settings, signal, *factors)
    return MixtureOutput(y, RouterLoad(*load) if load else None)


class _Mixture(torch.autograd.Function):
    # Tokens are made one dimension in here: a reshape outside is a node of its own, whose gradient is a view, and
    # autograd then adds it to the base's gradient out of place.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        dropout_seed: int | None,
        into_base: bool,
        summed: SummedGradient | None,
        settings: MixtureSettings,
        signal: BalanceSignal,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        factors = MixtureFactors(*tensors)  # type: ignore[arg-type]
        x_TI, base_TO = _by_token(x), _by_token(base)
        u_TR, u0_TR, logits_TE = _activations(x_TI, factors, settings, dropout_seed)
        gates = None if logits_TE is None else top_k_gates(logits_TE, top_k=settings.top_k)
        spread_ER = None if gates is None else _spread(factors, settings, like=gates.gates_TE)
        h_TS = u_TR * _rank_gates(gates, spread_ER, factors, settings, dtype=x.dtype)
        if u0_TR is not None:
            h_TS = torch.cat([h_TS, u0_TR * _residual_gates(factors, settings, dtype=x.dtype)], dim=1)
        b_SO = _stacked_b(factors, x.dtype).T
        # Detached, the base is an output of its own that shares memory and version: had anybody kept the base for
        # backward, autograd would refuse to go on.
        y_TO = base_TO.detach().addmm_(h_TS, b_SO) if into_base else torch.addmm(base_TO, h_TS, b_SO)
        # Parameters are saved as they are: a sharded one is empty between forward and backward, and whole in both.
        # Gates and probabilities come of the logits again.
        ctx.save_for_backward(x, u_TR, logits_TE, *tensors)
        ctx.dropout_seed, ctx.summed, ctx.settings, ctx.signal = dropout_seed, summed, settings, signal
        ctx.spread_ER = spread_ER
        if gates is None:
            return (y_TO.view(base.shape),)
        ctx.mask_T = signal.mask_of(len(x_TI))
        load = router_load(gates, top_k=settings.top_k, mask_T=ctx.mask_T)
        ctx.share_E = load.share_E
        ctx.mark_non_differentiable(*load)
        return (y_TO.view(base.shape), *load)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, u_TR, logits_TE, *tensors = ctx.saved_tensors
        x_TI, grad_TO = _by_token(x), _by_token(grad)
        factors, settings, summed = MixtureFactors(*tensors), ctx.settings, ctx.summed
        needs_x, needs_base, *_, needs_a, needs_b, _, _, needs_router, _ = ctx.needs_input_grad
        gates = None if logits_TE is None else top_k_gates(logits_TE, top_k=settings.top_k)
        rank_gates_TR = _rank_gates(gates, ctx.spread_ER, factors, settings, dtype=x.dtype)
        grad_h_TS = grad_TO @ _stacked_b(factors, grad.dtype)
        grads = _rank_gradients(ctx, grad_h_TS, u_TR, gates, factors, rank_gates_TR)
        mask_TI = _mask(x_TI, settings, ctx.dropout_seed)
        grad_x = grad_a_RI = grad_b_OR = grad_router_EI = None
        if needs_x or summed is not None:
            part = _input_gradient(grads, factors, mask_TI)
            if summed is not None:
                summed.put(id(ctx), part)
            else:
                grad_x = (part.left_TG @ part.right_GI if isinstance(part, Product) else part).view(x.shape)
        if needs_b:
            grad_b_OR = _summed_over_tokens(u_TR * rank_gates_TR, grad_TO).T.to(factors.b_OR.dtype).contiguous()
        if needs_a or needs_router:
            grad_a_RI, grad_router_EI = _gradients_by_input(x_TI, grads, mask_TI)
            grad_a_RI = grad_a_RI.to(factors.a_RI.dtype) if needs_a else None
            if factors.router_EI is not None and grad_router_EI is not None:
                grad_router_EI = grad_router_EI.to(factors.router_EI.dtype) if needs_router else None
        grad_base = grad if needs_base else None
        return (grad_x, grad_base, *[None] * 5, grad_a_RI, grad_b_OR, None, None, grad_router_EI, None)


class _Activations(NamedTuple):
    """``A x`` and ``A0 x`` in the dtype of ``x``, and the router's logits in fp32 or better.

    The first and the logits are in storage of their own, because they are kept for backward.
    """

    u_TR: Tensor
    u0_TR: Tensor | None
    logits_TE: Tensor | None


class _RankGradients(NamedTuple):
    """The gradients of ``A x``, under dropout of ``A`` times what it sees, of the logits, and of ``A0 x``."""

    u_TR: Tensor
    logits_TE: Tensor | None
    u0_TR: Tensor | None


def _by_token(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _mask(x_TI: Tensor, settings: MixtureSettings, seed: int | None) -> Tensor | None:
    return None if seed is None else dropout_mask(x_TI, dropout=settings.dropout, seed=seed)


def _dropped(x_TI: Tensor, mask_TI: Tensor | None) -> Tensor:
    """What ``A`` sees, but for the division by ``kept_share``, which is cheaper on ``A x`` and on its gradient."""
    return x_TI if mask_TI is None else x_TI * mask_TI


def _activations(
    x_TI: Tensor, factors: MixtureFactors, settings: MixtureSettings, dropout_seed: int | None
) -> _Activations:
    router_EI, is_dropped = factors.router_EI, dropout_seed is not None
    is_apart = router_EI is not None and not _has_wide_product(x_TI, router_EI)
    weights = (None if is_dropped else factors.a_RI, factors.a0_RI, None if is_apart else router_EI)
    u_TR, u0_TR, logits_TE = _products(x_TI, weights, wide=router_EI is not None and not is_apart)
    if is_dropped:
        mask_TI = _mask(x_TI, settings, dropout_seed)
        u_TR = (_dropped(x_TI, mask_TI) @ factors.a_RI.to(x_TI.dtype).T).div_(kept_share(settings.dropout))
    if router_EI is not None and is_apart:
        logits_TE = _widened_logits(x_TI, router_EI)
    assert u_TR is not None
    u0_TR = None if u0_TR is None else u0_TR.to(x_TI.dtype)
    # Tokens lie next to each other in memory, as _softmax wants them.
    logits_TE = None if logits_TE is None else logits_TE.T.clone(memory_format=torch.contiguous_format).T
    return _Activations(u_TR.to(x_TI.dtype).contiguous(), u0_TR, logits_TE)


def _has_wide_product(x_TI: Tensor, router_EI: Tensor) -> bool:
    """Whether one product with ``x`` can give the logits in fp32 or better along with the rest."""
    # Rounded to bf16, logits would tie or swap experts whose logits differ by less than 1/256 of their size. Of torch's
    # back ends CUDA's gives a half-precision product in fp32.
    is_half = x_TI.dtype != torch.promote_types(x_TI.dtype, torch.float32)
    return not is_half or (x_TI.is_cuda and router_EI.dtype == x_TI.dtype)


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


def _widened_logits(x_TI: Tensor, router_EI: Tensor) -> Tensor:
    """Return the logits of half-precision ``x`` in fp32, copying a piece of it at a time; memory is ``[E, T]``."""
    wide, (num_tokens, in_features) = torch.float32, x_TI.shape
    router_EI = router_EI.to(wide)
    num_bytes = WIDENED_BYTES if x_TI.device.type == "cpu" else LAUNCHED_BYTES
    piece_PI = x_TI.new_empty(min(num_tokens, max(1, num_bytes // (4 * in_features))), in_features, dtype=wide)
    # A product with few rows is twice as fast as one with few columns.
    logits_ET = x_TI.new_empty(len(router_EI), num_tokens, dtype=wide)
    for x_PI, logits_EP in zip(x_TI.split(len(piece_PI)), logits_ET.split(len(piece_PI), dim=1), strict=True):
        torch.mm(router_EI, piece_PI[: len(x_PI)].copy_(x_PI).T, out=logits_EP)
    return logits_ET.T


def _stacked_b(factors: MixtureFactors, dtype: torch.dtype) -> Tensor:
    """``B``, and ``B0`` beside it where there is one ``[O, S]``."""
    b_OR = factors.b_OR.to(dtype)
    return b_OR if factors.b0_OR is None else torch.cat([b_OR, factors.b0_OR.to(dtype)], dim=1)


def _spread(factors: MixtureFactors, settings: MixtureSettings, *, like: Tensor) -> Tensor:
    """``s_e`` for the D rows of expert e, 0 for those of the others ``[E, R]``."""
    scale = settings.scale if factors.scale_E is None else factors.scale_E.to(like.dtype)[:, None]
    experts_EE = torch.eye(settings.num_experts, dtype=like.dtype, device=like.device)
    return experts_EE.mul_(scale).repeat_interleave(len(factors.a_RI) // settings.num_experts, dim=1)


def _rank_gates(
    gates: Gates | None,
    spread_ER: Tensor | None,
    factors: MixtureFactors,
    settings: MixtureSettings,
    *,
    dtype: torch.dtype,
) -> Tensor | float:
    """What multiplies the rank-R activations: ``s_e g_e``, repeated over the D rows of expert e ``[T, R]``.

    A number or ``[R]`` without a router.
    """
    if gates is not None and spread_ER is not None:
        # Repeating along the last dimension takes four times as long.
        return (gates.gates_TE @ spread_ER).to(dtype)
    if factors.scale_E is None:
        return settings.scale
    return factors.scale_E.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts)


def _residual_gates(factors: MixtureFactors, settings: MixtureSettings, *, dtype: torch.dtype) -> Tensor | float:
    """What multiplies the start's activations: ``-s_e/E`` (Theorem 3.4), a number or ``[R]``."""
    if factors.scale_E is None:
        return -settings.scale / settings.num_experts
    scale_R = factors.scale_E.to(dtype).repeat_interleave(len(factors.a_RI) // settings.num_experts)
    return -scale_R / settings.num_experts


def _rank_gradients(
    ctx: Any,
    grad_h_TS: Tensor,
    u_TR: Tensor,
    gates: Gates | None,
    factors: MixtureFactors,
    rank_gates_TR: Tensor | float,
) -> _RankGradients:
    settings, r = ctx.settings, u_TR.shape[1]
    grad_logits_TE = grad_u0_TR = None
    if grad_h_TS.shape[1] > r:
        grad_u0_TR = grad_h_TS[:, r:] * _residual_gates(factors, settings, dtype=u_TR.dtype)
    if gates is not None:
        grad_gates_TR = (grad_h_TS[:, :r] * u_TR).to(gates.gates_TE.dtype)
        grad_gates_ET = ctx.spread_ER @ grad_gates_TR.T
        grad_logits_TE = _logits_gradient(ctx, gates, grad_gates_ET.T).to(u_TR.dtype)
    grad_u_TR = grad_h_TS[:, :r] * rank_gates_TR
    if ctx.dropout_seed is not None:
        grad_u_TR.div_(kept_share(settings.dropout))
    return _RankGradients(grad_u_TR, grad_logits_TE, grad_u0_TR)


def _logits_gradient(ctx: Any, gates: Gates, grad_gates_TE: Tensor) -> Tensor:
    settings, grad_probs_TE = ctx.settings, None
    if settings.balance_coef:
        # dL_b/dp_e(t) = f_e / T for a real token: f counts choices, and choices have no gradient.
        weight_T = real_token_weights(gates.probs_TE, ctx.mask_T) * ctx.signal.take_upstream(like=gates.probs_TE)
        share_E = ctx.share_E * settings.num_experts * settings.balance_coef
        grad_probs_TE = (share_E[:, None] * weight_T).T
    return logits_gradient(gates.gates_TE, gates.probs_TE, grad_gates_TE=grad_gates_TE, grad_probs_TE=grad_probs_TE)


def _summed_over_tokens(few_TG: Tensor, many_TI: Tensor) -> Tensor:
    """Return ``fewᵀ many`` ``[G, I]``."""
    # Laid out by rows, the small factor makes this up to a third faster.
    return few_TG.T.contiguous() @ many_TI


def _gradients_by_input(x_TI: Tensor, grads: _RankGradients, mask_TI: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of ``A`` and of the router, one product with ``x`` for both unless dropout parts them."""
    if grads.logits_TE is None:
        return _summed_over_tokens(grads.u_TR, _dropped(x_TI, mask_TI)), None
    if mask_TI is not None:
        grad_a_RI = _summed_over_tokens(grads.u_TR, _dropped(x_TI, mask_TI))
        return grad_a_RI, _summed_over_tokens(grads.logits_TE, x_TI)
    r = grads.u_TR.shape[1]
    both = _summed_over_tokens(torch.cat([grads.u_TR, grads.logits_TE], dim=1), x_TI)
    return both[:r], both[r:]


def _input_gradient(grads: _RankGradients, factors: MixtureFactors, mask_TI: Tensor | None) -> Tensor | Product:
    dtype = grads.u_TR.dtype
    into_x = zip(grads, (factors.a_RI, factors.router_EI, factors.a0_RI), strict=True)
    pairs = [(grad, weight.to(dtype)) for grad, weight in into_x if grad is not None and weight is not None]
    if mask_TI is None:
        return Product(torch.cat([grad for grad, _ in pairs], dim=1), torch.cat([weight for _, weight in pairs]))
    (grad, weight), *undropped = pairs
    grad_x_TI = (grad @ weight).mul_(mask_TI)
    for grad, weight in undropped:
        grad_x_TI.addmm_(grad, weight)
    return grad_x_TI
