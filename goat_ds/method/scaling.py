"""How large an expert's product counts: s, GOAT-s (arXiv 2502.16894, Theorem 3.5), rsLoRA.

Shape letters: E experts, R total rank, D rank of one expert.
"""

import math
from enum import StrEnum

import torch
from torch import Tensor

from goat_ds.errors import ConfigError


class Scaling(StrEnum):
    """Which formula gives ``s``."""

    THEORY = "theory"
    ALPHA = "alpha"
    RSLORA = "rslora"


def expert_scale(scaling: Scaling, *, in_features: int, expert_rank: int, eta: float, lora_alpha: float) -> float:
    """Return ``s``, the factor in front of every expert of a layer.

    ``theory`` is ``sqrt(3 eta I / d)`` (arXiv 2502.16894, Theorem 3.5). The theorem prints ``r``; the variance it
    is derived from is that of one expert's ``A``, so it is the rank ``d`` of one expert here. ``alpha`` is what the
    released scripts run, ``rslora`` is arXiv 2312.03732.

    Args:
        scaling: The formula.
        in_features: ``I`` of the layer; used by ``theory``.
        expert_rank: ``d = r / E``.
        eta: Ratio of the learning rates, full fine-tuning to LoRA; used by ``theory``.
        lora_alpha: Numerator of ``alpha`` and ``rslora``.
    """
    match scaling:
        case Scaling.THEORY:
            return math.sqrt(3 * eta * in_features / expert_rank)
        case Scaling.ALPHA:
            return lora_alpha / expert_rank
        case Scaling.RSLORA:
            return lora_alpha / math.sqrt(expert_rank)


def residual_scale(
    scale: Tensor | float,
    *,
    r: int,
    num_experts: int,
    shared_experts: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor | float:
    """Return ``s_e c_e``, what the start's term counts: a number, or that of every direction ``[R]``.

    ``c_e`` is the mean gate of an expert: ``1/N`` for the N that a router chooses among, whose gates sum to 1 (arXiv
    2502.16894, Theorem 3.4), and 1 for a shared expert, which is always on.

    Args:
        scale: ``s``, or ``s_e`` of the expert each direction belongs to ``[R]``.
        r: R.
        num_experts: ``E``, the shared ones among them.
        shared_experts: How many are shared: the first ones.
        dtype: Of the result, where it is a tensor.
        device: The same.
    """
    if not shared_experts:
        return scale / num_experts
    divisor_R = torch.full((r,), float(num_experts - shared_experts), dtype=dtype, device=device)
    divisor_R[: r // num_experts * shared_experts] = 1
    return scale / divisor_R


def adaptive_scales(scale: float, singular_values_ED: Tensor) -> Tensor:
    """Return the scale of every expert, ``s_e = s sqrt(sum_0 / sum_e)`` (GOAT-s).

    Args:
        scale: ``s`` of the layer.
        singular_values_ED: The singular values each expert starts from ``[E, D]``.

    Returns:
        ``[E]``, in the dtype of ``singular_values_ED``; the first entry is ``scale``.

    Raises:
        ConfigError: an expert's singular values are all zero, so its scale would be infinite.
    """
    sums_E = singular_values_ED.sum(dim=1)
    if empty := (sums_E <= 0).nonzero().flatten().tolist():
        raise ConfigError(
            f"adaptive_scale divides by the singular values of each expert, and those of expert {empty[0]} are all "
            "zero: the weight has too low a rank; set adaptive_scale=False, or put the layer in exclude_modules"
        )
    return scale * (sums_E[0] / sums_E).sqrt()
