"""One layer's router: from its input to logits and gates, and from gradients of gates to those of its product.

Shape letters: T tokens, I in features, E experts, N those that a router chooses among (not the shared ones), C the
columns of its product: N, and one more for a threshold.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goat_ds.method.dropout import disturb_router_
from goat_ds.method.routing import (
    BalanceSignal,
    Gates,
    RouterLoad,
    Routing,
    balance_gradient,
    logits_gradient,
    real_token_weights,
    router_load,
    threshold_gates,
    threshold_gradients,
    top_k_gates,
    top_p_gates,
)

WIDENED_BYTES = 2**20
"""How much of a half-precision input is copied to fp32 at a time on a CPU: what stays in a core's own cache."""
LAUNCHED_BYTES = 2**25
"""The same on a device where every piece is two kernels to launch."""


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """What one layer's router computes with, besides its tensors."""

    num_experts: int
    """E."""
    top_k: int
    """Experts a token uses, with ``Routing.TOP_K``."""
    balance_coef: float
    """Weight of this layer's balance loss; 0 leaves it out of the gradient."""
    routing: Routing = Routing.TOP_K
    """How experts are chosen."""
    top_p: float = 0.25
    """Probability that the chosen experts reach together, with ``Routing.TOP_P``."""
    max_threshold: float = 0.0
    """The highest threshold, with ``Routing.THRESHOLD``."""
    shared_experts: int = 0
    """The first so many experts are always on, with a gate of 1."""
    temperature: float = 1.0
    """What the router's logits are divided by."""
    router_noise: float = 0.0
    """Standard deviation of the noise on the router's logits, where there is a seed for it."""
    expert_dropout: float = 0.0
    """Probability that an expert that can be chosen is left out for a token, where there is a seed for it."""

    @property
    def num_choices(self) -> int:
        """N."""
        return self.num_experts - self.shared_experts

    @property
    def keeps_all(self) -> bool:
        """Whether every expert is kept for every token, so that no balance can be lost."""
        return self.routing is Routing.TOP_K and self.top_k == self.num_choices and not self.expert_dropout

    @property
    def same_number(self) -> int | None:
        """Experts that every token chooses; None: that number differs from token to token."""
        return self.top_k if self.routing is Routing.TOP_K and not self.expert_dropout else None


def by_token(tensor: Tensor) -> Tensor:
    """Return a tensor with its tokens in one dimension ``[T, ...]``."""
    return tensor.reshape(-1, tensor.shape[-1])


def stacked_router(router_NI: Tensor | None, threshold_1I: Tensor | None) -> Tensor | None:
    """Return the router, and the threshold's weight below it where there is one ``[C, I]``; None without a router."""
    if threshold_1I is None or router_NI is None:
        return router_NI
    return torch.cat([router_NI, threshold_1I])


def has_wide_product(x_TI: Tensor, router_CI: Tensor) -> bool:
    """Whether one product with ``x`` can give the logits in fp32 or better along with the rest."""
    # Rounded to bf16, logits would tie or swap experts whose logits differ by less than 1/256 of their size. Of torch's
    # back ends CUDA's gives a half-precision product in fp32.
    is_half = x_TI.dtype != torch.promote_types(x_TI.dtype, torch.float32)
    return not is_half or (x_TI.is_cuda and router_CI.dtype == x_TI.dtype)


def widened_logits(x_TI: Tensor, router_CI: Tensor) -> Tensor:
    """Return the logits of half-precision ``x`` in fp32, copying a piece of it at a time; memory is ``[C, T]``."""
    wide, (num_tokens, in_features) = torch.float32, x_TI.shape
    router_CI = router_CI.to(wide)
    num_bytes = WIDENED_BYTES if x_TI.device.type == "cpu" else LAUNCHED_BYTES
    piece_PI = x_TI.new_empty(min(num_tokens, max(1, num_bytes // (4 * in_features))), in_features, dtype=wide)
    # A product with few rows is twice as fast as one with few columns.
    logits_CT = x_TI.new_empty(len(router_CI), num_tokens, dtype=wide)
    for x_PI, logits_CP in zip(x_TI.split(len(piece_PI)), logits_CT.split(len(piece_PI), dim=1), strict=True):
        torch.mm(router_CI, piece_PI[: len(x_PI)].copy_(x_PI).T, out=logits_CP)
    return logits_CT.T


def prepared_logits(
    product_TC: Tensor, threshold_bias_1: Tensor | None, settings: RouterSettings, *, seed: int | None
) -> Tensor:
    """Return what gates are computed from, in storage of its own: backward then needs nothing random.

    Args:
        product_TC: The router's product, in fp32 or better.
        threshold_bias_1: Of the threshold, with ``Routing.THRESHOLD``.
        settings: Of the layer.
        seed: Of the noise and of the experts that are left out; None: neither.
    """
    # Tokens lie next to each other in memory, as routing's softmax wants them.
    logits_TC = product_TC.T.clone(memory_format=torch.contiguous_format).T
    logits_TN, threshold_logits_T = _parted_logits(logits_TC, settings)
    if threshold_logits_T is not None and threshold_bias_1 is not None:
        threshold_logits_T.add_(threshold_bias_1)
    if settings.temperature != 1:
        logits_TN.div_(settings.temperature)
    if seed is not None:
        # Noise stands before the division by the temperature.
        noise = settings.router_noise / settings.temperature
        disturb_router_(logits_TN, noise=noise, expert_dropout=settings.expert_dropout, seed=seed)
    return logits_TC


def _parted_logits(logits_TC: Tensor, settings: RouterSettings) -> tuple[Tensor, Tensor | None]:
    """Return the logits of the experts ``[T, N]``, and that of the threshold ``[T]`` where there is one."""
    if settings.routing is not Routing.THRESHOLD:
        return logits_TC, None
    return logits_TC[:, :-1], logits_TC[:, -1]


def gates_of(logits_TC: Tensor | None, settings: RouterSettings) -> Gates | None:
    """Return what a router decides by its prepared logits; None without one."""
    if logits_TC is None:
        return None
    logits_TN, threshold_logits_T = _parted_logits(logits_TC, settings)
    match settings.routing:
        case Routing.TOP_K:
            gates = top_k_gates(logits_TN, top_k=settings.top_k)
        case Routing.TOP_P:
            gates = top_p_gates(logits_TN, top_p=settings.top_p)
        case Routing.THRESHOLD:
            assert threshold_logits_T is not None
            gates = threshold_gates(logits_TN, threshold_logits_T, max_threshold=settings.max_threshold)
    if settings.expert_dropout:
        # Where more experts are left out than top_k leaves, some of those are among the k.
        gates = gates._replace(kept_TE=gates.kept_TE & (logits_TN > -torch.inf))
    return gates


def kept_load(
    ctx: Any, gates: Gates, settings: RouterSettings, *, signal: BalanceSignal, num_tokens: int
) -> RouterLoad:
    """Return what the router did, and keep on a function's context what ``product_gradient`` wants of it."""
    ctx.mask_T = signal.mask_of(num_tokens)
    load = router_load(gates, top_k=settings.same_number, mask_T=ctx.mask_T)
    ctx.share_E = load.share_E
    ctx.mark_non_differentiable(*load)
    return load


def product_gradient(
    gates: Gates,
    grad_gates_TN: Tensor,
    settings: RouterSettings,
    *,
    share_E: Tensor,
    mask_T: Tensor | None,
    signal: BalanceSignal,
) -> Tensor:
    """Return the gradient of the router's product ``[T, C]``, with that of the balance loss.

    Args:
        gates: Of the forward.
        grad_gates_TN: Their gradient; what it is for experts that are not kept has no effect.
        settings: Of the layer.
        share_E: As ``router_load`` returned it.
        mask_T: Which tokens are real; None: all.
        signal: What the balance loss is worth.
    """
    grad_balance_TN = None
    if settings.balance_coef and not settings.keeps_all:
        weight_T = real_token_weights(gates.probs_TE, mask_T) * signal.take_upstream(like=gates.probs_TE)
        grad_balance_TN = balance_gradient(gates, share_E, weight_T * settings.balance_coef)
    if gates.threshold_T is None:
        grad_TN = logits_gradient(
            gates.gates_TE, gates.probs_TE, grad_gates_TE=grad_gates_TN, grad_probs_TE=grad_balance_TN
        )
        return grad_TN if settings.temperature == 1 else grad_TN / settings.temperature
    grad_TN, grad_threshold_T = threshold_gradients(
        gates, max_threshold=settings.max_threshold, grad_gates_TE=grad_gates_TN, grad_over_TE=grad_balance_TN
    )
    return torch.cat([grad_TN / settings.temperature, grad_threshold_T[:, None]], dim=1)
