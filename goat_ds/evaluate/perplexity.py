"""Mean cross-entropy over label tokens, on the rows that training would form of the same records."""

import math
from typing import Any, NamedTuple

import torch

from goat_ds.data import Packed, Tokenised, eval_batches, label_loss_sum


class Perplexity(NamedTuple):
    """How surprised a model is by the answers of the data."""

    loss: float
    """Nats a label token."""
    perplexity: float
    """Its exponential."""
    num_label_tokens: int
    num_truncated: int
    """Records that were cut to ``max_length``."""


@torch.no_grad()
def perplexity(model: Any, tokens: Tokenised, packed: Packed) -> Perplexity:
    """Measure the loss as training's evaluation does; the model must keep the records of a packed row apart."""
    lm_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in eval_batches(tokens.dataset, packed.packs, micro_batch_size=1, world_rank=0, world_size=1):
        lm_sum += label_loss_sum(model, batch.to(model.device))
    num_labels = sum(packed.num_labels)
    loss = float(lm_sum) / num_labels
    # Above some 700 nats a double overflows, and such a model is no worse for being called infinitely surprised.
    return Perplexity(loss, math.exp(loss) if loss < 700 else math.inf, num_labels, tokens.report.num_truncated)
