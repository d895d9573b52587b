"""Dropout that is drawn again from its seed in backward, so that no mask as large as ``x`` is kept.

Shape letters: T tokens, I in features.
"""

import torch
from torch import Tensor

STEPS = 2**16
"""Probabilities are multiples of ``1 / STEPS``: four decisions come from one draw of 64 bits."""


def kept_share(dropout: float) -> float:
    """Return the probability that a value is kept, as it is drawn: never 1 or 0, where ``dropout`` is not 0 or 1."""
    return 1 - _num_dropped(dropout) / STEPS


def dropout_mask(x_TI: Tensor, *, dropout: float, seed: int) -> Tensor:
    """Return 1 where ``x`` is kept, else 0, in the dtype of ``x``; the same for the same seed on the same device.

    What is kept is to be divided by ``kept_share``.
    """
    generator = torch.Generator(x_TI.device).manual_seed(seed)
    # One draw for four decisions takes a CPU a quarter of the time of a draw each.
    words = torch.empty(-(-x_TI.numel() // 4), dtype=torch.int64, device=x_TI.device)
    bits_TI = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x_TI.numel()].view(x_TI.shape)
    return (bits_TI >= _num_dropped(dropout) - STEPS // 2).to(x_TI.dtype)


def _num_dropped(dropout: float) -> int:
    return min(max(round(dropout * STEPS), 1), STEPS - 1)
