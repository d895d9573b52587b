"""Choose the experts of every token, and keep the choice balanced (arXiv 2502.16894, section 3 and eq. 6).

The balance loss reaches the routers without being carried through the model: a router's backward adds the gradient
of its own loss, times what ``BalanceSignal`` says arrived at the total loss. A loss kept as a tensor on a module has
no gradient under reentrant checkpointing and keeps graphs alive; here there is nothing to keep.

Shape letters: T tokens, E experts that a router chooses among.
"""

import warnings
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BalanceWarning(UserWarning):
    """The balance loss could not reach the gradient."""


class Routing(StrEnum):
    """How a router chooses the experts of a token."""

    TOP_K = "top_k"
    """The k most probable ones; all of them by their probabilities, where k is their number."""
    TOP_P = "top_p"
    """The smallest set whose probability reaches p."""
    THRESHOLD = "threshold"
    """Those whose probability reaches a threshold that the token itself sets (AdaMoLE, arXiv 2405.00361)."""


class Gates(NamedTuple):
    """A router's decision for every token; ``threshold_T`` is None but where tokens set one."""

    gates_TE: Tensor
    probs_TE: Tensor
    kept_TE: Tensor
    threshold_T: Tensor | None = None


class RouterLoad(NamedTuple):
    """What one router did with one micro-batch, detached.

    ``share_E`` is the share of all choices that went to each expert (sums to 1), ``entropy`` the mean entropy of the
    probabilities in nats, ``balance_loss`` is ``L_b`` (1 when balanced, but for thresholds).
    """

    share_E: Tensor
    entropy: Tensor
    balance_loss: Tensor


@dataclass
class BalanceSignal:
    """What passes between one forward of the model, its loss and the routers' backward.

    Attributes:
        mask: Real tokens of the current micro-batch, any shape with one entry a token, or None when all are real.
        loads: The routers' loads of the current forward, by layer name.
        balance: ``coef * L_b`` of every router of the current forward, detached, by layer name.
        mean_share: Share of the residual that takes mean gates in training; less than 1 while it warms up.
        upstream: Gradient that arrived at the total loss: 1, the loss scale, 1 / accumulation steps ...
        loss_carried_it: Whether that loss itself brought it, so that nothing need be read from log-probabilities.
    """

    mask: Tensor | None = None
    loads: dict[str, RouterLoad] = field(default_factory=dict)
    balance: dict[str, Tensor] = field(default_factory=dict)
    mean_share: float = 1.0
    upstream: Tensor | float | None = None
    loss_carried_it: bool = False

    def begin_forward(self, mask: Tensor | None) -> None:
        """Forget the last micro-batch; ``mask`` says which tokens of the new one are real."""
        self.mask = mask
        self.loads, self.balance = {}, {}
        self.upstream, self.loss_carried_it = None, False

    def record(self, name: str, load: RouterLoad, *, coef: float) -> None:
        """Keep a router's load; a layer recomputed under checkpointing records the same once more."""
        self.loads[name] = load
        self.balance[name] = coef * load.balance_loss

    def balance_loss(self) -> Tensor | None:
        """Return ``Σ_layers coef L_b`` of the current forward, detached; None where nothing was routed."""
        losses = list(self.balance.values())
        # Layers may live on several devices.
        return torch.stack([loss.to(losses[-1].device) for loss in losses]).sum() if losses else None

    def mask_of(self, num_tokens: int) -> Tensor | None:
        """Return the mask ``[T]`` if it speaks about these tokens; a pooled head sees sequences, not tokens."""
        if self.mask is None or self.mask.numel() != num_tokens:
            return None
        return self.mask.reshape(-1)

    def take_upstream(self, *, like: Tensor) -> Tensor:
        """Return the factor for a router's balance gradient, where ``like`` is; 0 and a warning when no loss has it."""
        if self.upstream is None:
            _warn("nothing connected it with the routers")
            self.upstream = 0.0
        return torch.as_tensor(self.upstream, device=like.device, dtype=like.dtype)


def top_k_gates(logits_TE: Tensor, *, top_k: int) -> Gates:
    """Keep the ``top_k`` most probable experts of each token and renormalise their probabilities.

    Args:
        logits_TE: Router logits ``[T, E]``, fp32 or better; minus infinity for an expert that is left out.
        top_k: ``k``, at most ``E``. All experts are kept by their probabilities where it is ``E``, without a search.
    """
    probs_TE = _softmax(logits_TE)
    if top_k == logits_TE.shape[1]:
        every = torch.ones((), dtype=torch.bool, device=logits_TE.device)
        return Gates(probs_TE, probs_TE, every.expand_as(probs_TE))
    # Logits that differ can round to equal probabilities. The kept probabilities, renormalised, are a softmax again.
    top_TK, index_TK = logits_TE.topk(top_k, dim=-1)
    gates_TE = torch.zeros_like(probs_TE).scatter_(-1, index_TK, _softmax(top_TK))
    kept_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(-1, index_TK, True)
    return Gates(gates_TE, probs_TE, kept_TE)


def top_p_gates(logits_TE: Tensor, *, top_p: float) -> Gates:
    """Keep the smallest set of experts whose probability reaches ``top_p``, and renormalise (arXiv 2403.07652, eq. 3).

    Args:
        logits_TE: Router logits ``[T, E]``, fp32 or better; minus infinity for an expert that is left out.
        top_p: ``p`` in (0, 1].
    """
    probs_TE = _softmax(logits_TE)
    falling_TE, index_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    # An expert is needed as long as those before it do not reach p together; nothing is before the first.
    needed_TE = (falling_TE.cumsum(dim=-1) - falling_TE < top_p).logical_and_(falling_TE > 0)
    kept_TE = torch.zeros_like(needed_TE).scatter_(-1, index_TE, needed_TE)
    return Gates(_softmax(logits_TE.masked_fill(~kept_TE, -torch.inf)), probs_TE, kept_TE)


def threshold_gates(logits_TE: Tensor, threshold_logits_T: Tensor, *, max_threshold: float) -> Gates:
    """Keep the experts whose probability reaches the token's own threshold; what they exceed it by counts.

    ``τ(x) = max_threshold · sigmoid(w·x + b)`` and ``g_e = max(p_e - τ, 0) / Σ max(p - τ, 0)`` (AdaMoLE, arXiv
    2405.00361, eq. 5 and 6). Where nothing exceeds the threshold all gates are 0.

    Args:
        logits_TE: Router logits ``[T, E]``, fp32 or better; minus infinity for an expert that is left out.
        threshold_logits_T: ``w·x + b``.
        max_threshold: The highest threshold; no token is without an expert where it is ``1 / E`` at most.
    """
    probs_TE = _softmax(logits_TE)
    threshold_T = max_threshold * threshold_logits_T.sigmoid()
    over_TE = probs_TE - threshold_T[:, None]
    # As in the released code, what just reaches the threshold is chosen: its gate is 0 and has a gradient.
    kept_TE = over_TE >= 0
    return Gates(over_TE.clamp_min(0) / _total(over_TE), probs_TE, kept_TE, threshold_T)


def _total(over_TE: Tensor) -> Tensor:
    """Return the sum of what exceeds the threshold ``[T, 1]``; 1 where that is nothing, and must not divide."""
    total_T1 = over_TE.clamp_min(0).sum(dim=-1, keepdim=True)
    return torch.where(total_T1 == 0, torch.ones_like(total_T1), total_T1)


def _softmax(logits_TE: Tensor) -> Tensor:
    # With tokens next to each other in memory, which the result keeps, this takes a twentieth of the time that few
    # experts next to each other take; so do the sums over experts that follow.
    return torch.softmax(logits_TE.T, dim=0).T


def router_load(gates: Gates, *, top_k: int | None, mask_T: Tensor | None) -> RouterLoad:
    """Measure a router over the real tokens of a micro-batch: ``L_b = Σ_e f_e P_e``, ``f_e = E/(k T) Σ_t kept``.

    The release omits the ``1/k``; with it a balanced router has ``L_b = 1`` for every ``k``. With thresholds it is as
    AdaMoLE's released code has it, without that factor and with ``P_e = 1/T Σ_t (p_e - τ)``.

    Args:
        gates: Of every token.
        top_k: Experts that every token uses; None: not all use as many, and ``k`` is their mean number.
        mask_T: Which tokens are real; None: all.
    """
    probs_TE, num_experts = gates.probs_TE, gates.probs_TE.shape[1]
    weight_T = real_token_weights(probs_TE, mask_T)
    prob_E = weight_T @ probs_TE
    # 0 log 0 is 0.
    log_probs_TE = probs_TE.clamp_min(torch.finfo(probs_TE.dtype).tiny).log_()
    entropy = -(weight_T @ log_probs_TE.mul_(probs_TE)).sum()
    if top_k == num_experts:
        share_E = weight_T.sum().div_(num_experts).expand(num_experts)
        return RouterLoad(share_E, entropy, balance_loss=prob_E.sum())
    chosen_E = weight_T @ gates.kept_TE.to(probs_TE.dtype)
    share_E = chosen_E / (top_k or chosen_E.sum().clamp_min(torch.finfo(chosen_E.dtype).tiny))
    if gates.threshold_T is None:
        return RouterLoad(share_E, entropy, balance_loss=num_experts * (share_E @ prob_E))
    over_E = prob_E - weight_T @ gates.threshold_T
    return RouterLoad(share_E, entropy, balance_loss=num_experts * (chosen_E @ over_E))


def balance_gradient(gates: Gates, share_E: Tensor, weight_T: Tensor) -> Tensor:
    """Return the gradient of ``L_b`` by the probabilities ``[T, E]``, with thresholds by what they are exceeded by.

    ``dL_b/dp_e(t) = f_e / T`` for a real token: ``f`` counts choices, and choices have no gradient.

    Args:
        gates: Of every token.
        share_E: As ``router_load`` returned it.
        weight_T: ``real_token_weights``, times what the loss is worth.
    """
    f_E = len(share_E) * share_E
    if gates.threshold_T is not None:
        real_T = (weight_T != 0).to(share_E.dtype)
        f_E = f_E * (real_T @ gates.kept_TE.to(share_E.dtype)).sum() / real_T.sum().clamp_min(1)
    return (f_E[:, None] * weight_T).T


def real_token_weights(probs_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """Return ``1/T`` for every real token and 0 for padding ``[T]``; all zero when nothing is real."""
    if mask_T is None:
        return probs_TE.new_full((probs_TE.shape[0],), 1 / max(probs_TE.shape[0], 1))
    real_T = mask_T.to(probs_TE)
    return real_T / real_T.sum().clamp_min(1)


def logits_gradient(
    gates_TE: Tensor, probs_TE: Tensor, *, grad_gates_TE: Tensor, grad_probs_TE: Tensor | None
) -> Tensor:
    """Turn gradients of the gates and of the probabilities into that of the logits ``[T, E]``.

    Renormalised top-k of a softmax is the softmax over the kept logits, so both are softmax backwards.

    Args:
        gates_TE: As ``top_k_gates`` returned them.
        probs_TE: As ``top_k_gates`` returned them.
        grad_gates_TE: Gradient of the gates.
        grad_probs_TE: Gradient of the probabilities that the balance loss adds, if any.
    """
    grad_TE = _softmax_backward(gates_TE, grad_gates_TE)
    if grad_probs_TE is not None:
        grad_TE = grad_TE + _softmax_backward(probs_TE, grad_probs_TE)
    return grad_TE


class ThresholdGradients(NamedTuple):
    """The gradients of the router's logits ``[T, E]`` and of the threshold's ``[T]``."""

    logits_TE: Tensor
    threshold_logits_T: Tensor


def threshold_gradients(
    gates: Gates, *, max_threshold: float, grad_gates_TE: Tensor, grad_over_TE: Tensor | None
) -> ThresholdGradients:
    """Turn gradients of the gates, and of ``p - τ``, into those of both logits.

    Args:
        gates: As ``threshold_gates`` returned them.
        max_threshold: As it was given there.
        grad_gates_TE: Gradient of the gates.
        grad_over_TE: Gradient of ``p_e - τ`` that the balance loss adds, if any; kept or not.
    """
    assert gates.threshold_T is not None
    total_T1 = _total(gates.probs_TE - gates.threshold_T[:, None])
    centred_TE = grad_gates_TE - (gates.gates_TE * grad_gates_TE).sum(dim=-1, keepdim=True)
    grad_TE = gates.kept_TE * centred_TE / total_T1
    if grad_over_TE is not None:
        grad_TE = grad_TE + grad_over_TE
    slope_T = gates.threshold_T * (1 - gates.threshold_T / max_threshold)
    return ThresholdGradients(_softmax_backward(gates.probs_TE, grad_TE), -grad_TE.sum(dim=-1) * slope_T)


def _softmax_backward(output_TE: Tensor, grad_TE: Tensor) -> Tensor:
    weighted_TE = output_TE * grad_TE
    return weighted_TE - output_TE * weighted_TE.sum(dim=-1, keepdim=True)


class _CarryBalance(torch.autograd.Function):
    """Add the balance loss to the loss, and tell the routers what gradient arrived.

    Every router's backward depends on this one's output, so the signal is always set before it is read.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, added: Tensor, signal: BalanceSignal, weight: Tensor | float) -> Tensor:
        ctx.signal, ctx.weight = signal, weight
        return loss + added

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.signal.upstream, ctx.signal.loss_carried_it = grads[0].sum() * ctx.weight, True
        return grads[0], None, None, None


class _CarryByLogProbs(torch.autograd.Function):
    """Pass log-probabilities on, and tell the routers what share of the whole batch their gradients add up to."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, signal: BalanceSignal, label_mask: Tensor | None) -> Tensor:
        ctx.signal, ctx.label_mask = signal, label_mask
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.signal.loss_carried_it:
            return grads[0], None, None
        # Positions without a label have the log-probability 0, and are summed with the others.
        labelled = grads[0] if ctx.label_mask is None else grads[0] * ctx.label_mask
        if (labelled > 0).any():
            # A preference or a policy loss pushes some down: what they add up to says nothing of the batch, and
            # may be negative, which would unbalance the routers.
            _warn("its gradients of the log-probabilities have both signs, so it is no likelihood")
            ctx.signal.upstream = 0.0
        else:
            ctx.signal.upstream = -labelled.sum()
        return grads[0], None, None


def carry_balance(loss: Tensor, balance: Tensor, signal: BalanceSignal, *, weight: Tensor | float = 1.0) -> Tensor:
    """Return ``loss + weight * balance``, whose backward also trains the routers.

    Args:
        loss: Scalar that the model's outputs lead to.
        balance: ``coef * Σ_layers L_b`` of this micro-batch, detached.
        signal: The model's signal.
        weight: Share of this micro-batch in the balance loss of the whole batch.
    """
    return _CarryBalance.apply(loss, (weight * balance).to(loss.dtype), signal, weight)


def carry_balance_by_log_probs(log_probs: Tensor, signal: BalanceSignal, *, label_mask: Tensor | None = None) -> Tensor:
    """Return ``log_probs`` unchanged; its backward trains the routers as if the loss were their negative mean.

    A trainer that takes its loss from log-probabilities sends ``-weight`` to each, so that minus their sum is the
    share of this micro-batch in the loss of the whole batch. Where some gradients are above zero the loss is none of
    that kind, and a ``BalanceWarning`` says that the balance loss is left out.

    Args:
        log_probs: One for each position of the micro-batch.
        signal: The model's signal.
        label_mask: Which positions have a label, in the shape of ``log_probs``; None when all have.
    """
    return _CarryByLogProbs.apply(log_probs, signal, label_mask)


def _warn(reason: str) -> None:
    warnings.warn(
        f"the balance loss does not reach the gradient: the loss was computed outside of the model, and {reason}. "
        "Pass labels to the model, or wrap your loss: loss = goat_ds.with_balance_loss(model, loss)",
        BalanceWarning,
        stacklevel=3,
    )
