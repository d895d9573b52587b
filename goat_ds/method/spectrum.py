"""Start each expert on its own segment of a weight's singular spectrum (arXiv 2502.16894, eq. 13 and 19).

Shape letters: O out features, I in features, Q = min(O, I), L = max(O, I), E experts, R total rank, D = R / E, W wanted
directions.
"""

import math
from enum import StrEnum
from typing import NamedTuple

import scipy.linalg
import torch
from scipy.linalg import blas, eigh_tridiagonal, lapack
from torch import Tensor

from goat_ds.errors import ConfigError
from goat_ds.method.scaling import residual_scale


class Init(StrEnum):
    """Which directions of the spectrum the experts start from."""

    GOAT = "goat"
    GOAT_MINI = "goat_mini"
    PISSA = "pissa"
    MILORA = "milora"
    PISSA_MILORA = "pissa_milora"
    OLORA = "olora"
    ZERO = "zero"

    @property
    def decomposes(self) -> bool:
        """Whether this start comes of the weight; the other draws ``A`` and leaves ``B`` at zero."""
        return self is not Init.ZERO


VALUES_AT_ONCE = 2**20
"""How many values of a weight are widened at a time."""


ACCURACY = 1e-7
"""Largest error of a triplet ``(u, s, v)``, ``‖W v - s u‖`` or ``‖Wᵀ u - s v‖``, relative to the largest ``s``."""


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
    """Return why a layer is too small for its experts, or None: a segment must hold ``r / num_experts`` directions."""
    segment = min(out_features, in_features) // num_experts
    needed = r // num_experts
    if needed <= segment:
        return None
    return (
        f"{out_features} x {in_features} has segments of {segment} directions (num_experts {num_experts}), "
        f"fewer than r / num_experts ({needed})"
    )


def chosen_indices(start: Init, *, num_directions: int, num_experts: int, r: int) -> Tensor:
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
        case Init.GOAT:
            first_E = experts_E * segment
        case Init.GOAT_MINI:
            first_E = (experts_E + 1) * segment - expert_rank
        case Init.PISSA | Init.OLORA:
            first_E = experts_E * expert_rank
        case Init.MILORA:
            first_E = num_directions - r + experts_E * expert_rank
        case Init.PISSA_MILORA:
            # An odd expert in the middle, and a single expert, count as leading.
            trailing_E = experts_E >= math.ceil(num_experts / 2)
            first_E = experts_E * expert_rank + trailing_E * (num_directions - r)
        case Init.ZERO:
            raise ValueError("start 'zero' takes no directions")
    return first_E[:, None] + within_D


@torch.no_grad()
def decompose(weight_OI: Tensor, indices_ED: Tensor) -> Directions:
    """Decompose a whole weight and keep the chosen singular triplets.

    The eigenvectors of the smaller Gram matrix are the singular vectors of that side, and only the chosen ones are
    computed where that is cheaper. In float64 squaring costs half of the digits, which leaves those of fp32; what comes
    out is checked, and where it is less accurate than ``ACCURACY`` the SVD is taken, in float64 as well.

    Args:
        weight_OI: The whole weight ``[O, I]``, any float dtype, all finite.
        indices_ED: Wanted indices into the descending spectrum ``[E, D]``.

    Returns:
        Directions in float64, the same bits for the same weight on one machine with as many threads.
    """
    weight_64, indices_R = weight_OI.detach().to(torch.float64), indices_ED.flatten().to(weight_OI.device)
    return _decompose_by_gram(weight_64, indices_R) or _decompose_by_svd(weight_64, indices_R)


@torch.no_grad()
def leading_of_qr(weight_OI: Tensor, r: int) -> Directions:
    """Return the first ``r`` columns of Q and rows of R of ``W = Q R`` (OLoRA, arXiv 2406.01775), in float64.

    They stand where singular vectors stand, with 1 for every singular value.
    """
    q_OQ, r_QI = torch.linalg.qr(weight_OI.detach().to(torch.float64))
    return Directions(q_OQ[:, :r], q_OQ.new_ones(r), r_QI[:r])


def _decompose_by_svd(weight_OI: Tensor, indices_R: Tensor) -> Directions:
    u_OQ, s_Q, vh_QI = torch.linalg.svd(weight_OI, full_matrices=False)
    return Directions(u_OQ[:, indices_R], s_Q[indices_R], vh_QI[indices_R])


def _decompose_by_gram(weight_OI: Tensor, indices_R: Tensor) -> Directions | None:
    """Return the triplets from the smaller Gram matrix, or None where they are not accurate."""
    wide = weight_OI.shape[0] <= weight_OI.shape[1]
    side_QL = weight_OI if wide else weight_OI.T
    # The leading direction comes along, because its singular value is what errors are measured by.
    wanted_W, places = torch.cat([indices_R.new_zeros(1), indices_R]).unique(return_inverse=True)
    # On the host a few eigenvectors cost half of what all cost; CUDA's solver gives all or none.
    find = _some_eigenpairs if weight_OI.device.type == "cpu" else _all_eigenpairs
    try:
        values_W, vectors_QW = find(side_QL, wanted_W)
    except (scipy.linalg.LinAlgError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return None
    # Of all triplets on these directions the most accurate (Rayleigh-Ritz), orthonormal on both sides however small σ.
    basis_QW = torch.linalg.qr(vectors_QW).Q
    far_LW, s_W, turn_WW = torch.linalg.svd(side_QL.T @ basis_QW, full_matrices=False)
    near_QW = basis_QW @ turn_WW.T
    if not _error(side_QL, near_QW, s_W, far_LW, values_W) <= ACCURACY * s_W[0]:
        return None
    near_QR, s_R, far_LR = near_QW[:, places[1:]], s_W[places[1:]], far_LW[:, places[1:]]
    return Directions(near_QR, s_R, far_LR.T) if wide else Directions(far_LR, s_R, near_QR.T)


def _error(side_QL: Tensor, near_QW: Tensor, s_W: Tensor, far_LW: Tensor, values_W: Tensor) -> Tensor:
    """Return the largest error of any triplet: of either of its equations, and of its place in the spectrum."""
    residuals = [side_QL @ far_LW - near_QW * s_W, side_QL.T @ near_QW - far_LW * s_W]
    off_W = s_W - values_W.clamp_min(0).sqrt()
    return torch.stack([*(residual.norm(dim=0).max() for residual in residuals), off_W.abs().max()]).max()


class _Eigenpairs(NamedTuple):
    """Of a Gram matrix, in the order of the descending spectrum."""

    values_W: Tensor
    vectors_QW: Tensor


def _all_eigenpairs(side_QL: Tensor, wanted_W: Tensor) -> _Eigenpairs:
    values_Q, vectors_QQ = torch.linalg.eigh(side_QL @ side_QL.T)
    # eigh ascends, the spectrum descends.
    chosen_W = len(values_Q) - 1 - wanted_W
    return _Eigenpairs(values_Q[chosen_W], vectors_QQ[:, chosen_W])


def _some_eigenpairs(side_QL: Tensor, wanted_W: Tensor) -> _Eigenpairs:
    """Make the Gram matrix tridiagonal, find the wanted eigenvectors of that, and turn them back."""
    # Half of a product, as it is symmetric; Fortran's order is the transpose of ours.
    in_order = side_QL.is_contiguous()
    gram_QQ = blas.dsyrk(1.0, (side_QL.T if in_order else side_QL).numpy(), trans=in_order, lower=1)
    num_work = int(lapack.dsytrd_lwork(len(gram_QQ), lower=1)[0])
    reflectors_QQ, diagonal, beside, tau, _ = lapack.dsytrd(gram_QQ, lower=1, lwork=num_work, overwrite_a=1)
    ascending_W = len(diagonal) - 1 - wanted_W.flip(0)
    runs = ascending_W.tensor_split((ascending_W.diff() != 1).nonzero().flatten() + 1)
    found = [eigh_tridiagonal(diagonal, beside, select="i", select_range=(run[0], run[-1])) for run in runs]
    values_W, vectors_QW = (torch.cat([*map(torch.from_numpy, part)], -1).flip(-1) for part in zip(*found, strict=True))
    # The reflectors of a tridiagonal form begin below the first row, which stays.
    reflectors, lengths = torch.from_numpy(reflectors_QQ)[1:, :-1], torch.from_numpy(tau)
    vectors_QW[1:] = torch.ormqr(reflectors, lengths, vectors_QW[1:])
    return _Eigenpairs(values_W, vectors_QW)


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
    weight_OI: Tensor,
    start: Factors,
    *,
    scale: float,
    scale_E: Tensor | None,
    num_experts: int,
    shared_experts: int = 0,
    times: int,
) -> None:
    """Add ``times W_res = times Σ_e s_e c_e B0_e A0_e`` (Theorem 3.4) to a weight in place.

    In fp32 or better, rounded once, and some rows at a time, so that no product of the weight's size is ever there.

    Args:
        weight_OI: ``[O, I]``, any strides.
        start: The factors at the start.
        scale: ``s``.
        scale_E: ``s_e`` for GOAT-s, in place of ``scale``; else None.
        num_experts: ``E``.
        shared_experts: How many of them are always on.
        times: -1 folds the residual into the base weight, 1 takes it out again.
    """
    wide = torch.promote_types(start.a_RI.dtype, torch.float32)
    scale_R: Tensor | float = scale
    if scale_E is not None:
        scale_R = scale_E.to(wide).repeat_interleave(len(start.a_RI) // num_experts)
    a_RI, num_rows = start.a_RI.to(wide), max(1, VALUES_AT_ONCE // weight_OI.shape[1])
    counts_R = residual_scale(
        times * scale_R,
        r=len(a_RI),
        num_experts=num_experts,
        shared_experts=shared_experts,
        dtype=wide,
        device=a_RI.device,
    )
    for rows_OI, b_OR in zip(weight_OI.split(num_rows), start.b_OR.split(num_rows), strict=True):
        rows_OI.copy_(rows_OI.to(wide) + (b_OR.to(wide) * counts_R) @ a_RI)


def zero_init(
    *, out_features: int, in_features: int, r: int, num_rows: int, dtype: torch.dtype, device: torch.device
) -> Factors:
    """Draw ``A ~ U(-1/sqrt(I), 1/sqrt(I))`` from torch's generator and leave ``B`` at zero (LoRA-MoE).

    ``num_rows`` are those of ``A``: ``r``, or the rank of one expert where all share it (HydraLoRA).
    """
    bound = 1 / math.sqrt(in_features)
    a_RI = torch.empty(num_rows, in_features, dtype=dtype, device=device).uniform_(-bound, bound)
    return Factors(a_RI=a_RI, b_OR=torch.zeros(out_features, r, dtype=dtype, device=device))
