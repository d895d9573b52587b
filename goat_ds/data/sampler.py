"""Decide which packs form which global batch, and which rank computes which of them.

A step consumes one *global batch*: a number of packs of the epoch's seeded permutation. The sequence of global batches
depends on that number alone, so the same run on another number of ranks sees the same packs in the same steps.
Everything here is arithmetic that each rank repeats for itself: nobody has to communicate to know the label tokens of
the whole global batch, nor to start at any step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

Pack = Sequence[int]
"""The rows of the tokenised data set that stand behind each other in one sequence."""


class GlobalBatch(NamedTuple):
    """The packs that all ranks together compute in one step."""

    step: int
    """Counted from 0 over the whole run."""
    epoch: int
    """Counted from 0."""
    pack_ids: tuple[int, ...]
    """Positions in ``BatchPlan.packs``; fewer than a full batch only in the last step of an epoch."""
    num_label_tokens: int
    """Label tokens of the whole global batch: the denominator of the step's mean loss."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The order of the packs over the whole run, for all ranks.

    Each epoch visits every pack exactly once; its last global batch may be short. Same arguments, same plan.
    """

    packs: Sequence[Pack]
    """At least one; as made by :func:`goat_ds.data.packing.pack`."""
    num_labels: Sequence[int]
    """Label tokens of each pack."""
    micro_batch_size: int
    """Packs in one micro-batch of one rank."""
    global_batch_size: int
    """Packs in a full global batch; what ranks and micro-batches do not divide ends in shorter ones."""
    world_size: int
    """Ranks that share a global batch."""
    seed: int
    """Not negative; with the epoch it determines the epoch's permutation."""

    def __post_init__(self) -> None:
        assert self.packs and len(self.packs) == len(self.num_labels)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of one rank in one step."""
        return -(-self.global_batch_size // (self.micro_batch_size * self.world_size))

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the short last one included."""
        return -(-len(self.packs) // self.global_batch_size)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Return the permutation of the packs that ``epoch`` walks through, the same on every rank."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.packs))

    def from_step(self, step: int, *, until: int | None = None) -> Iterator[GlobalBatch]:
        """Yield the global batches from ``step`` on, without visiting the earlier ones.

        Args:
            step: The first step to yield, 0 at the start of a run.
            until: The first step not to yield; without it the epochs follow each other for ever.
        """
        first_epoch, skipped = divmod(step, self.steps_per_epoch)
        for epoch in count(first_epoch):
            order = self.epoch_order(epoch)
            for position in range(skipped, self.steps_per_epoch):
                now = epoch * self.steps_per_epoch + position
                if until is not None and now >= until:
                    return
                yield self._global_batch(order, position, step=now, epoch=epoch)
            skipped = 0

    def _global_batch(self, order: np.ndarray, position: int, *, step: int, epoch: int) -> GlobalBatch:
        start = position * self.global_batch_size
        pack_ids = tuple(order[start : start + self.global_batch_size].tolist())
        return GlobalBatch(step, epoch, pack_ids, sum(int(self.num_labels[pack_id]) for pack_id in pack_ids))

    def share_of(self, batch: GlobalBatch, *, world_rank: int) -> list[list[int]]:
        """Return the pack ids of each of this rank's ``grad_accum_steps`` micro-batches.

        An empty micro-batch stands for a filler: ZeRO-3 gathers parameters collectively, so a rank without a pack
        must run its forward and backward all the same.
        """
        return deal(
            batch.pack_ids,
            micro_batch_size=self.micro_batch_size,
            num_micro_batches=self.grad_accum_steps,
            world_rank=world_rank,
            world_size=self.world_size,
        )

    def num_micro_batches(self, batch: GlobalBatch) -> int:
        """Return the micro-batches of all ranks that hold a pack; the others are fillers."""
        per_rank = (len(batch.pack_ids[rank :: self.world_size]) for rank in range(self.world_size))
        return sum(-(-packs // self.micro_batch_size) for packs in per_rank)


def deal(
    pack_ids: Sequence[int], *, micro_batch_size: int, num_micro_batches: int, world_rank: int, world_size: int
) -> list[list[int]]:
    """Deal packs out like cards, one a rank in turn, and return the micro-batches of ``world_rank``.

    No rank has more than one pack more than another; ranks fill their micro-batches from the first one on, so the
    empty ones of a short global batch come last and, where possible, on all ranks at once.
    """
    mine = list(pack_ids[world_rank::world_size])
    starts = range(0, num_micro_batches * micro_batch_size, micro_batch_size)
    assert len(mine) <= num_micro_batches * micro_batch_size
    return [mine[start : start + micro_batch_size] for start in starts]
