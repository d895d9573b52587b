"""Give each expert its own segment of a weight's singular spectrum (arXiv 2502.16894, eq. 13 and 19).

Shape letters: O out features, I in features, Q = min(O, I), E experts, R total rank, D = R / E.
"""

import math
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from goat_ds.errors import ConfigError


class Start(StrEnum):
    """Which directions of the spectrum the experts start from."""

    GOAT = "goat"
    GOAT_MINI = "goat_mini"
    PISSA = "pissa"
    MILORA = "milora"
    PISSA_MILORA = "pissa_milora"
    ZERO = "zero"

    @property
    def decomposes(self) -> bool:
        """Whether this start needs singular vectors; the others draw ``A`` and leave ``B`` at zero."""
        return self is not Start.ZERO


VALUES_AT_ONCE = 2**20
"""How many values of a weight are widened at a time."""


class Directions(NamedTuple):
    """Chosen singular triplets, expert after expert: ``weight ≈ u_OR diag(s_R) v_RI`` on those directions."""

    u_OR: Tensor
    s_R: Tensor
    v_RI: Tensor


class Factors(NamedTuple):
    """Stacked low-rank factors; expert ``e`` owns rows ``e D … (e+1) D - 1`` of ``A`` and those columns of ``B``."""

    a_RI: Tensor
    b_OR: Tensor


def segment_problem(*, out_features: int, in_features: int, num_experts: int, r: int) -> str | None:
    """Say why a layer is too small for its experts, or None: every segment must hold ``r / num_experts`` directions."""
    segment = min(out_features, in_features) // num_experts
    needed = r // num_experts
    if needed <= segment:
        return None
    return (
        f"{out_features} x {in_features} has segments of {segment} directions (num_experts {num_experts}), "
        f"fewer than r / num_experts ({needed})"
    )


def chosen_indices(start: Start, *, num_directions: int, num_experts: int, r: int) -> Tensor:
    """List the indices into the descending spectrum that each expert starts from.

    Args:
        start: The rule; must be one that decomposes.
        num_directions: ``Q``, the length of the spectrum.
        num_experts: ``E``.
        r: Total rank, a multiple of ``num_experts``.

    Returns:
        int64 ``[E, D]``.

    Raises:
        ConfigError: a segment holds fewer than ``r / num_experts`` directions.
    """
    if problem := segment_problem(
        out_features=num_directions, in_features=num_directions, num_experts=num_experts, r=r
    ):
        raise ConfigError(problem)
    expert_rank, segment = r // num_experts, num_directions // num_experts
    within_D = torch.arange(expert_rank)
    experts_E = torch.arange(num_experts)
    match start:
        case Start.GOAT:
            first_E = experts_E * segment
        case Start.GOAT_MINI:
            first_E = (experts_E + 1) * segment - expert_rank
        case Start.PISSA:
            first_E = experts_E * expert_rank
        case Start.MILORA:
            first_E = num_directions - r + experts_E * expert_rank
        case Start.PISSA_MILORA:
            # An odd expert in the middle, and a single expert, count as leading.
            trailing_E = experts_E >= math.ceil(num_experts / 2)
            first_E = experts_E * expert_rank + trailing_E * (num_directions - r)
        case Start.ZERO:
            raise ValueError("start 'zero' takes no directions")
    return first_E[:, None] + within_D


def decompose(weight_OI: Tensor, indices_ED: Tensor) -> Directions:
    """Decompose a whole weight and keep the chosen singular triplets.

    The eigenvectors of the smaller Gram matrix, in float64, are the singular vectors of that side; the other side is
    one product. That is several times faster than ``torch.linalg.svd`` in fp32 and no less accurate, as squaring
    costs half of float64's digits, where fp32 starts. Where a wanted singular value is so small that even this is
    not enough, the SVD is taken in float64.

    Args:
        weight_OI: The whole weight ``[O, I]``, any float dtype.
        indices_ED: Wanted indices into the descending spectrum ``[E, D]``.

    Returns:
        Directions in float64.
    """
    indices_R = indices_ED.flatten().to(weight_OI.device)
    weight_64 = weight_OI.to(torch.float64)
    wide = weight_64.shape[0] <= weight_64.shape[1]
    side_QL = weight_64 if wide else weight_64.T
    eigenvalues_Q, vectors_QQ = torch.linalg.eigh(side_QL @ side_QL.T)
    # eigh ascends, the spectrum descends.
    chosen_R = len(eigenvalues_Q) - 1 - indices_R
    s_R = eigenvalues_Q[chosen_R].clamp_min(0).sqrt()
    # Not "<": of a weight that is all zero, everything is 0, and the division below would give nan.
    if s_R.min() <= 1e-6 * eigenvalues_Q[-1].clamp_min(0).sqrt():
        return _decompose_by_svd(weight_64, indices_R)
    near_QR = vectors_QQ[:, chosen_R]
    far_RL = (near_QR.T @ side_QL) / s_R[:, None]
    return Directions(near_QR, s_R, far_RL) if wide else Directions(far_RL.T, s_R, near_QR.T)


def _decompose_by_svd(weight_OI: Tensor, indices_R: Tensor) -> Directions:
    u_OQ, s_Q, vh_QI = torch.linalg.svd(weight_OI, full_matrices=False)
    return Directions(u_OQ[:, indices_R], s_Q[indices_R], vh_QI[indices_R])


def factors_from(directions: Directions, *, scale_R: Tensor | float, rho: float) -> Factors:
    """Split the chosen directions evenly over ``B`` and ``A``, so that ``s B A = U σ Vᵀ / rho`` on them (eq. 19).

    Args:
        directions: What ``decompose`` returned.
        scale_R: ``s``, or the scale of the expert each direction belongs to ``[R]`` (GOAT-s).
        rho: Divisor of the singular values, so that experts start small.
    """
    root_R = (directions.s_R / (scale_R * rho)).sqrt()
    return Factors(a_RI=root_R[:, None] * directions.v_RI, b_OR=directions.u_OR * root_R)


@torch.no_grad()
def add_residual_(
    weight_OI: Tensor, start: Factors, *, scale: float, scale_E: Tensor | None, num_experts: int, times: int
) -> None:
    """Add ``times W_res = times Σ_e s_e/E B0_e A0_e`` (Theorem 3.4) to a weight in place.

    In fp32 or better, rounded once, and some rows at a time, so that no product of the weight's size is ever there.

    Args:
        weight_OI: ``[O, I]``, any strides.
        start: The factors at the start.
        scale: ``s``.
        scale_E: ``s_e`` for GOAT-s, in place of ``scale``; else None.
        num_experts: ``E``.
        times: -1 folds the residual into the base weight, 1 takes it out again.
    """
    wide = torch.promote_types(start.a_RI.dtype, torch.float32)
    scale_R: Tensor | float = scale
    if scale_E is not None:
        scale_R = scale_E.to(wide).repeat_interleave(len(start.a_RI) // num_experts)
    a_RI, num_rows = start.a_RI.to(wide), max(1, VALUES_AT_ONCE // weight_OI.shape[1])
    for rows_OI, b_OR in zip(weight_OI.split(num_rows), start.b_OR.split(num_rows), strict=True):
        rows_OI.copy_(rows_OI.to(wide) + (b_OR.to(wide) * (times * scale_R / num_experts)) @ a_RI)


def zero_start(*, out_features: int, in_features: int, r: int, dtype: torch.dtype, device: torch.device) -> Factors:
    """Draw ``A ~ U(-1/sqrt(I), 1/sqrt(I))`` from torch's generator and leave ``B`` at zero (LoRA-MoE)."""
    bound = 1 / math.sqrt(in_features)
    a_RI = torch.empty(r, in_features, dtype=dtype, device=device).uniform_(-bound, bound)
    return Factors(a_RI=a_RI, b_OR=torch.zeros(out_features, r, dtype=dtype, device=device))
