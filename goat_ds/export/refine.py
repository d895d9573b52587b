"""Refine a dense form end to end: distil the trained model into the factors of every ``ΔW = B A``.

The fit makes every layer right on its own; what is left are errors that layers pass on to each other, and those show
in the model's predictions only. All of ``ΔW`` moves, also what took the start's contribution off.

A row has few labels, and its other positions tell of the same layers: the predictions at some of them, chosen anew in
every step, count as much as those at all labels together.

Shape letters: L positions, V vocabulary.
"""

import math
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from goat_ds.data import MicroBatch, label_logits
from goat_ds.distributed import ranks
from goat_ds.export.calibration import Packs
from goat_ds.export.divergence import Comparison, Reference, compare, divergence
from goat_ds.export.trained import DENSE, TRAINED, TrainedModel

LEARNING_RATE = 2e-3
"""Peak rate of AdamW, in units of each factor's root mean square."""
NUM_OTHERS = 64
"""Positions of a row without a label that count in a step; their logits take memory as those at labels do."""


class Refined(NamedTuple):
    """What the refinement did to the held-out comparison; what was not better was not kept."""

    num_steps: int
    before: Comparison
    after: Comparison

    @property
    def is_kept(self) -> bool:
        """Whether the held-out divergence became smaller."""
        return self.after.kl < self.before.kl


def refine(trained: TrainedModel, packs: Packs, reference: Reference, before: Comparison, *, num_steps: int) -> Refined:
    """Train the dense form towards the trained model's predictions. A collective.

    Args:
        trained: With a fitted dense form.
        packs: Calibration tokens; each rank takes a row a step, in order, and the same positions at every call.
        reference: The trained model on held-out tokens.
        before: The dense form on them.
        num_steps: Steps of AdamW, with a cosine from the peak rate to zero.
    """
    factors = [factor for experts in trained.experts(DENSE).values() for factor in (experts.A, experts.B)]
    start = [factor.detach().clone() for factor in factors]
    _distil(trained, packs, factors, num_steps=num_steps)
    with trained.computing_with(DENSE) as model:
        after = compare(model, reference, name="refined")
    refined = Refined(num_steps, before, after)
    if not refined.is_kept:
        with torch.no_grad():
            for factor, value in zip(factors, start, strict=True):
                factor.copy_(value)
    return refined


def _distil(trained: TrainedModel, packs: Packs, factors: list[nn.Parameter], *, num_steps: int) -> None:
    groups = [
        {"params": [factor], "lr": LEARNING_RATE * float(factor.detach().square().mean().sqrt())} for factor in factors
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / num_steps))
    )
    bar = tqdm(total=num_steps, desc="refine", unit="step", disable=not ranks.is_first())
    chance = torch.Generator().manual_seed(ranks.get_rank())
    for batch in islice(_rows_for_ever(packs), num_steps):
        kl = _gradients(trained, batch, _others(batch, chance), factors)
        for factor in factors:
            assert factor.grad is not None
            ranks.sum_over_ranks_(factor.grad)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
        bar.set_postfix(kl=f"{float(kl):.4f}")
    bar.close()


def _rows_for_ever(packs: Packs) -> Iterator[MicroBatch]:
    rows = [batch for batch in packs.micro_batches(shared=True) if len(batch.label_index)]
    return (rows[step % len(rows)] for step in count())


def _others(batch: MicroBatch, chance: torch.Generator) -> Tensor:
    """Choose positions that have no label."""
    has_none = torch.ones(batch.input_ids.shape[1], dtype=torch.bool)
    has_none[batch.label_index] = False
    places = has_none.nonzero()[:, 0]
    return places[torch.randperm(len(places), generator=chance)[:NUM_OTHERS]]


def _gradients(trained: TrainedModel, batch: MicroBatch, others_L: Tensor, factors: list[nn.Parameter]) -> Tensor:
    """Add the gradient of this rank's mean divergence, at labels and at other positions; return that at labels."""
    num_labels = len(batch.label_index)
    batch = batch._replace(label_index=torch.cat([batch.label_index, others_L])).to(ranks.device())
    with torch.no_grad(), trained.computing_with(TRAINED) as model:
        wanted_LV = label_logits(model, batch)
    with trained.computing_with(DENSE) as model:
        for factor in factors:
            factor.requires_grad_(True)
        logits_LV = label_logits(model, batch)
        kl = divergence(wanted_LV[:num_labels], logits_LV[:num_labels]) / num_labels
        others = divergence(wanted_LV[num_labels:], logits_LV[num_labels:]) / max(len(others_L), 1)
        loss: Any = (kl + others) / ranks.get_world_size()
        loss.backward()
    return kl.detach()
