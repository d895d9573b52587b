"""Compare a model with the trained one on held-out tokens: loss, divergence and agreement where there is a label.

Shape letters: L label positions of a row, C label positions of a chunk, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from goat_ds.data import MicroBatch, cross_entropy_sum, in_chunks, label_logits, label_targets
from goat_ds.distributed import ranks
from goat_ds.export.calibration import Packs


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
        total += cross_entropy_sum(logits_LV, label_targets(batch)).double().cpu()
        kept.append(logits_LV.cpu())
    return Reference(packs, kept, float(total) / packs.num_labels)


@torch.no_grad()
def compare(model: Any, reference: Reference, *, name: str) -> Comparison:
    """Compare a model with the trained one.

    Args:
        model: Takes what a causal language model of transformers takes.
        reference: Of the trained model.
        name: What the progress bar calls it.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for batch, kept_LV in zip(_real(reference.packs, f"held out: {name}"), reference.logits_LV, strict=True):
        trained_LV = kept_LV.to(batch.labels.device)
        for logits_CV, trained_CV, targets_C in in_chunks(label_logits(model, batch), trained_LV, label_targets(batch)):
            loss = cross_entropy_sum(logits_CV, targets_C)
            kl = divergence(trained_CV, logits_CV)
            same = (logits_CV.argmax(dim=-1) == trained_CV.argmax(dim=-1)).sum()
            totals += torch.stack([loss.double(), kl.double(), same.double()]).cpu()
    return Comparison(*(float(total) / reference.packs.num_labels for total in totals))


def divergence(trained_LV: Tensor, logits_LV: Tensor) -> Tensor:
    """Return ``Σ_l KL(trained ‖ this)`` in nats, in fp32."""
    log_p_LV, log_q_LV = (
        torch.log_softmax(scores_LV, dim=-1, dtype=torch.float32) for scores_LV in (trained_LV, logits_LV)
    )
    return functional.kl_div(log_q_LV, log_p_LV, reduction="sum", log_target=True)


def _real(packs: Packs, name: str) -> "tqdm[MicroBatch]":
    rows = [batch.to(ranks.device()) for batch in packs.micro_batches(shared=False) if len(batch.label_index)]
    return tqdm(rows, desc=name, unit="row", disable=not ranks.is_first())
