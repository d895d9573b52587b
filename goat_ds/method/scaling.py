"""How large an expert's product counts: s, GOAT-s (arXiv 2502.16894, Theorem 3.5), rsLoRA.

Shape letters: E experts, D rank of one expert.
"""

import math
from enum import StrEnum

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
