"""Hold a model against the trained one on held-out tokens: loss, divergence and agreement where there is a label.

Shape letters: L label positions of a row, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from goat_ds.data import MicroBatch, label_logits, label_targets
from goat_ds.export import ranks
from goat_ds.export.tokens import Packs


class Comparison(NamedTuple):
    """What one model says about the held-out tokens, beside what the trained one says.

    ``loss`` is the mean cross-entropy over label tokens, ``kl`` the mean divergence ``KL(trained ‖ this)`` in nats,
    ``agreement`` the share of label positions at which both find the same token most probable.
    """

    loss: float
    kl: float
    agreement: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


class Reference(NamedTuple):
    """What the trained model says: its logits by row, on the host, in the dtype they were computed in."""

    packs: Packs
    logits_LV: list[Tensor]
    loss: float


@torch.no_grad()
def take_reference(model: Any, packs: Packs) -> Reference:
    """Run the trained model over the held-out tokens and keep its logits."""
    kept, total = [], torch.zeros((), dtype=torch.float64)
    for batch in _real(packs, "held out: trained"):
        logits_LV = label_logits(model, batch)
        total += functional.cross_entropy(logits_LV.float(), label_targets(batch), reduction="sum").double().cpu()
        kept.append(logits_LV.cpu())
    return Reference(packs, kept, float(total) / packs.num_labels)


@torch.no_grad()
def compare(model: Any, reference: Reference, *, name: str) -> Comparison:
    """Hold a model against the trained one.

    Args:
        model: Takes what a causal language model of transformers takes.
        reference: Of the trained model.
        name: What the progress bar calls it.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for batch, kept_LV in zip(_real(reference.packs, f"held out: {name}"), reference.logits_LV, strict=True):
        logits_LV, trained_LV = label_logits(model, batch).float(), kept_LV.to(batch.labels.device).float()
        loss = functional.cross_entropy(logits_LV, label_targets(batch), reduction="sum")
        kl = divergence(trained_LV, logits_LV)
        same = (logits_LV.argmax(dim=-1) == trained_LV.argmax(dim=-1)).sum()
        totals += torch.stack([loss.double(), kl.double(), same.double()]).cpu()
    return Comparison(*(float(total) / reference.packs.num_labels for total in totals))


def divergence(trained_LV: Tensor, logits_LV: Tensor) -> Tensor:
    """Give ``Σ_l KL(trained ‖ this)`` in nats."""
    return functional.kl_div(
        torch.log_softmax(logits_LV, dim=-1), torch.log_softmax(trained_LV, dim=-1), reduction="sum", log_target=True
    )


def _real(packs: Packs, name: str) -> "tqdm[MicroBatch]":
    rows = [batch.to(ranks.device()) for batch in packs.micro_batches(shared=False) if len(batch.label_index)]
    return tqdm(rows, desc=name, unit="row", disable=not ranks.is_first())
