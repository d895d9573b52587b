"""The best dense stand-in for a routed mixture: one ``A'`` for all tokens, by least squares.

    routed   y = W0 x + b + s B (g(x) ∘ A x) - s c B0 A0 x
    dense    y = W0 x + b + s B A' x         - s c B0 A0 x        A' = E[(g ∘ Ax) xᵀ] E[x xᵀ]⁻¹

``A'`` is the best linear prediction of the gated activations from the layer's input, and so ``B A' x`` is that of the
mixture's output, whatever ``B`` is. Its change of the weight, ``ΔW = s B A' - s c B0 A0``, has rank 2 R at most, ``c``
being the mean gates. Where the residual takes the token's own gates, ``A0`` has a dense form as well: every expert is
then fitted with ``A_e`` and ``A0_e`` one below the other, and ``B_e`` and ``-B0_e`` beside each other.

Shape letters: T tokens, I in features, O out features, E experts, R gated ranks: the total rank, or twice that where
the residual takes the gates, S = R, or R and the total rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from goat_ds.method.mixture import MixtureFactors, MixtureSettings, gated_activations
from goat_ds.method.scaling import residual_scale
from goat_ds.method.spectrum import VALUES_AT_ONCE, Factors

RIDGE = 1e-3
"""How firmly ``A'`` is held at the mean gates, in units of every input feature's mean square."""
ROWS_AT_ONCE = 256
"""Rows of a symmetric product that are computed together."""
TOKENS_PER_FEATURE = 2
"""Tokens that a fit needs for every in feature: with fewer it would learn the noise of its sample."""


@dataclass
class FitSums:
    """Sums over the tokens of one layer, in fp32 or better; ``xx_II`` may belong to several layers."""

    xx_II: Tensor
    """``Σ x xᵀ``, in the lower triangle."""
    hx_RI: Tensor
    """``Σ (g ∘ Ax) xᵀ``."""
    hh_RR: Tensor
    """``Σ (g ∘ Ax)(g ∘ Ax)ᵀ``."""
    gates_E: Tensor
    """``Σ g``."""
    num_tokens: int
    """How many."""


class MixtureSums(NamedTuple):
    """What the tokens of one micro-batch add to a layer's own sums."""

    hx_RI: Tensor
    hh_RR: Tensor
    gates_E: Tensor


class DenseFit(NamedTuple):
    """The dense form of one layer.

    ``a_RI`` is ``A'`` in float64. ``unexplained`` is the mean square of what it misses of the mixture's output
    ``s B (g ∘ Ax)``, as a share of that output's own; ``unexplained_by_mean`` the same with mean gates.
    """

    a_RI: Tensor
    unexplained: float
    unexplained_by_mean: float


def gated_factors(trained: Factors, start: Factors | None, *, num_experts: int) -> Factors:
    """Return ``A [R, I]`` and ``B [O, R]`` that gates stand between, expert by expert: what a fit is made for.

    Args:
        trained: ``A``, also where all experts share it, and ``B``.
        start: ``A0`` and ``B0`` where the residual takes the gates, else None.
        num_experts: E.
    """
    a_RI, b_OR = trained
    a_RI = a_RI.repeat(b_OR.shape[1] // len(a_RI), 1)
    if start is None:
        return Factors(a_RI, b_OR)
    a_ERI, a0_ERI = (a.unflatten(0, (num_experts, -1)) for a in (a_RI, start.a_RI))
    b_OER, b0_OER = (b.unflatten(1, (num_experts, -1)) for b in (b_OR, start.b_OR))
    return Factors(torch.cat([a_ERI, a0_ERI], dim=1).flatten(0, 1), torch.cat([b_OER, -b0_OER], dim=2).flatten(1))


def parted_forms(a_RI: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the dense forms of ``A`` and of ``A0`` out of that of ``gated_factors``."""
    first_ERI, second_ERI = a_RI.unflatten(0, (num_experts, -1)).chunk(2, dim=1)
    return first_ERI.flatten(0, 1), second_ERI.flatten(0, 1)


def add_input_sums_(xx_II: Tensor, x_TI: Tensor) -> None:
    """Add ``Σ x xᵀ`` over tokens to the lower triangle of a matrix of their dtype, some rows at a time.

    The rest of the matrix holds parts of it and means nothing: the sum is symmetric, and half the products are saved.
    """
    for first in range(0, len(xx_II), ROWS_AT_ONCE):
        end = min(first + ROWS_AT_ONCE, len(xx_II))
        xx_II[first:end, :end].addmm_(x_TI[:, first:end].T, x_TI[:, :end])


def mixture_sums(x_TI: Tensor, factors: MixtureFactors, settings: MixtureSettings) -> MixtureSums:
    """Return a layer's own sums over tokens, whose inputs are in fp32 or better."""
    h_TR, gates_TE = gated_activations(x_TI, factors, settings)
    return MixtureSums(h_TR.T @ x_TI, h_TR.T @ h_TR, gates_TE.sum(dim=0))


def is_finite(sums: FitSums) -> bool:
    """Whether a fit to these sums can be made."""
    tensors = (sums.xx_II.diagonal(), sums.hx_RI, sums.hh_RR)
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def mean_gates_form(a_RI: Tensor, sums: FitSums) -> Tensor:
    """Return ``E[g] ∘ A`` in float64 ``[R, I]``: what is left of the routing when every gate is its mean."""
    mean_E = sums.gates_E.double() / sums.num_tokens
    return mean_E.repeat_interleave(len(a_RI) // len(mean_E))[:, None] * a_RI.double()


def fit_dense(a_RI: Tensor, b_OR: Tensor, sums: FitSums, *, ridge: float = RIDGE) -> DenseFit:
    """Fit the dense form of one layer.

    The ridge pulls towards the mean gates, so that a direction which the tokens hardly show keeps those, and counts
    in units of each feature's mean square, because some features of a language model are a thousand times larger
    than others.

    Args:
        a_RI: ``A``.
        b_OR: ``B``, times ``s_e`` where experts have scales of their own; says how much every activation counts in
            ``unexplained``.
        sums: Of the layer.
        ridge: Weight of the pull.
    """
    start_RI, xx_II = mean_gates_form(a_RI, sums), _symmetric(sums.xx_II)
    size_I = xx_II.diagonal().sqrt()
    # A feature that is always zero has nothing to say and must not divide.
    size_I = torch.where(size_I > 0, size_I, torch.ones_like(size_I))
    normal_II = (xx_II / size_I).div_(size_I[:, None])
    normal_II.diagonal().add_(ridge)
    missing_RI = (sums.hx_RI.double() - start_RI @ xx_II) / size_I
    step_RI = torch.cholesky_solve(missing_RI.T, torch.linalg.cholesky(normal_II)).T / size_I
    fitted_RI = start_RI + step_RI
    return DenseFit(
        fitted_RI,
        _unexplained(fitted_RI, b_OR, sums, xx_II),
        _unexplained(start_RI, b_OR, sums, xx_II),
    )


def _symmetric(lower_II: Tensor) -> Tensor:
    whole_II = lower_II.double().tril_()
    whole_II += whole_II.tril(-1).T
    return whole_II


def _unexplained(a_RI: Tensor, b_OR: Tensor, sums: FitSums, xx_II: Tensor) -> float:
    """Return ``E‖B(h - A'x)‖² / E‖B h‖²``; 0 where the mixture gives nothing."""
    hx_RI, hh_RR = sums.hx_RI.double(), sums.hh_RR.double()
    cross_RR = a_RI @ hx_RI.T
    left_RR = hh_RR - cross_RR - cross_RR.T + a_RI @ xx_II @ a_RI.T
    weight_RR = b_OR.double().T @ b_OR.double()
    whole = float((weight_RR * hh_RR).sum())
    return float((weight_RR * left_RR).sum().clamp_min(0)) / whole if whole > 0 else 0.0


def dense_factors(
    dense: Factors, start: Factors | None, *, scale_R: Tensor | float, num_experts: int, shared_experts: int = 0
) -> Factors:
    """Return ``A [S, I]`` and ``B [O, S]`` of ``ΔW = B A = s B A' - s c B0 A0``.

    Every row of ``A`` is as large as its column of ``B``.

    Args:
        dense: ``A'`` and ``B``.
        start: ``A0`` and ``B0`` where their term stands beside the base weight and takes mean gates; None where there
            is none, or where it was folded into the weight.
        scale_R: ``s``, or that of the expert each direction belongs to ``[R]`` (GOAT-s).
        num_experts: E.
        shared_experts: How many of them are always on.
    """
    a_SI, b_OS = dense.a_RI, dense.b_OR * scale_R
    if start is not None:
        a_SI = torch.cat([a_SI, start.a_RI])
        counts_R = residual_scale(
            -scale_R,
            r=len(start.a_RI),
            num_experts=num_experts,
            shared_experts=shared_experts,
            dtype=start.b_OR.dtype,
            device=start.b_OR.device,
        )
        b_OS = torch.cat([b_OS, start.b_OR * counts_R], dim=1)
    return _balanced(Factors(a_SI, b_OS))


def _balanced(factors: Factors) -> Factors:
    """Return the same product with every row of ``A`` as large as its column of ``B``: steps and rounding suit both."""
    a_R, b_R = factors.a_RI.norm(dim=1), factors.b_OR.norm(dim=0)
    ratio_R = torch.where((a_R > 0) & (b_R > 0), (b_R / a_R).sqrt(), torch.ones_like(a_R))
    return Factors(factors.a_RI * ratio_R[:, None], factors.b_OR / ratio_R)


def merged(weight_OI: Tensor, delta: Factors, *, dtype: torch.dtype) -> Tensor:
    """Return ``W + ΔW`` in a dtype, added in fp32 or better and rounded once.

    Some rows at a time, so that beside the weight and the result nothing of their size is ever there.
    """
    merged_OI, wide = torch.empty(weight_OI.shape, dtype=dtype), torch.promote_types(delta.a_RI.dtype, torch.float32)
    num_rows, a_SI = max(1, VALUES_AT_ONCE // weight_OI.shape[1]), delta.a_RI.to(wide)
    for to_OI, rows_OI, b_OS in zip(
        merged_OI.split(num_rows), weight_OI.split(num_rows), delta.b_OR.split(num_rows), strict=True
    ):
        to_OI.copy_(torch.addmm(rows_OI.to(wide), b_OS.to(wide), a_SI))
    return merged_OI
