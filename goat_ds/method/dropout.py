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


def disturb_router_(logits_TE: Tensor, *, noise: float, expert_dropout: float, seed: int) -> None:
    """Add noise to a router's logits and leave experts out, in place; the same for the same seed on the same device.

    Every expert of every token is left out with the same probability, but never all of one token's: of those that
    would be, one by chance stays. What is left out has a logit of minus infinity, so the others share its probability.

    Args:
        logits_TE: Router logits ``[T, E]``.
        noise: Standard deviation of the Gaussian noise.
        expert_dropout: Probability that an expert is left out.
        seed: Of both.
    """
    generator = torch.Generator(logits_TE.device).manual_seed(seed)
    if noise:
        logits_TE.add_(torch.empty_like(logits_TE).normal_(std=noise, generator=generator))
    if expert_dropout:
        chance_TE = torch.empty_like(logits_TE).uniform_(generator=generator)
        is_out_TE = chance_TE < expert_dropout
        # The one of the highest chance is the last to be left out.
        is_out_TE.scatter_(-1, chance_TE.argmax(dim=-1, keepdim=True), False)
        logits_TE.masked_fill_(is_out_TE, -torch.inf)
