"""Turn packs into the tensors of a step: rows without padding, documents told apart by their positions.

Shape letters: T tokens of a row, L label positions of a row.

A micro-batch is one row ``[1, T]`` in which all its documents stand behind each other. ``position_ids`` restart at 0
for each document: that is what tells attention (FlashAttention's variable-length kernels, or a block mask with SDPA)
where one ends. Labels are shifted here, once: ``labels[0, t]`` is the token after ``t``, and a document's last position
has none, so nothing is predicted across documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from goat_ds.data.sampler import BatchPlan, GlobalBatch, Pack, deal
from goat_ds.tuner.model import IGNORE


class MicroBatch(NamedTuple):
    """One row of documents, ready for the model."""

    input_ids: Tensor
    """``[1, T]``, int64."""
    position_ids: Tensor
    """``[1, T]``, from 0 in every document."""
    labels: Tensor
    """``[1, T]``, already shifted: the target of each position, or ``IGNORE``."""
    label_index: Tensor
    """``[L]``, the positions that have a target, ascending: what ``logits_to_keep`` takes."""
    num_tokens: int
    """Tokens of real documents: T, or 0 in a filler."""
    is_filler: bool
    """No document at all: run it for the collectives, count nothing of it, not its balance loss either."""

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Return the same micro-batch with its tensors on ``device``."""
        return self._replace(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            labels=self.labels.to(device),
            label_index=self.label_index.to(device),
        )


class StepBatch(NamedTuple):
    """What one rank computes in one step."""

    epoch: int
    """Counted from 0."""
    micro_batches: list[MicroBatch]
    """``grad_accum_steps`` of them on every rank, fillers last."""
    num_label_tokens: int
    """Label tokens of the WHOLE global batch, over all ranks and micro-batches."""
    num_real_micro_batches: int
    """Micro-batches of the WHOLE global batch that are no fillers."""
    record_ids: list[int]
    """Rows of the tokenised data set that this rank sees, to say where a bad loss came from."""

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank's real documents."""
        return sum(micro_batch.num_tokens for micro_batch in self.micro_batches)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The step batches of one rank, from any step on."""

    dataset: Dataset
    """As made by :func:`goat_ds.data.tokens.tokenise`."""
    plan: BatchPlan
    world_rank: int

    def from_step(self, step: int, *, until: int | None = None) -> Iterator[tuple[int, StepBatch]]:
        """Yield ``(step, batch)`` from ``step`` on; ends before step ``until``, or never."""
        for batch in self.plan.from_step(step, until=until):
            yield batch.step, self._step_batch(batch)

    def _step_batch(self, batch: GlobalBatch) -> StepBatch:
        shares = self.plan.share_of(batch, world_rank=self.world_rank)
        rows = [_rows(self.plan.packs, pack_ids) for pack_ids in shares]
        micro_batches = [micro_batch_of(self.dataset, row_ids) for row_ids in rows]
        return StepBatch(
            epoch=batch.epoch,
            micro_batches=micro_batches,
            num_label_tokens=batch.num_label_tokens,
            num_real_micro_batches=self.plan.num_micro_batches(batch),
            record_ids=[row for row_ids in rows for row in row_ids],
        )


def batches(dataset: Dataset, plan: BatchPlan, *, world_rank: int) -> Batches:
    """Return the part of ``world_rank`` of every global batch of ``plan``."""
    return Batches(
        dataset=dataset.with_format("numpy", columns=["input_ids", "labels"]), plan=plan, world_rank=world_rank
    )


def eval_batches(
    dataset: Dataset, packs: Sequence[Pack], *, micro_batch_size: int, world_rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """Yield this rank's part of the packs, in order: over all ranks each pack exactly once.

    Every rank yields the same number of micro-batches, the last ones fillers where packs run out.
    """
    documents = _documents(dataset)
    most_packs = -(-len(packs) // world_size)
    shares = deal(
        range(len(packs)),
        micro_batch_size=micro_batch_size,
        num_micro_batches=-(-most_packs // micro_batch_size),
        world_rank=world_rank,
        world_size=world_size,
    )
    for pack_ids in shares:
        yield micro_batch_of(documents, _rows(packs, pack_ids))


def _documents(dataset: Dataset) -> Dataset:
    return dataset.with_format("numpy", columns=["input_ids", "labels"])


def _rows(packs: Sequence[Pack], pack_ids: Sequence[int]) -> list[int]:
    return [int(row) for pack_id in pack_ids for row in packs[pack_id]]


def micro_batch_of(dataset: Dataset, rows: Sequence[int]) -> MicroBatch:
    """Lay the documents in ``rows`` behind each other in one row; no rows make a filler."""
    if not rows:
        return filler()
    columns = dataset[list(rows)]
    lengths = [len(ids) for ids in columns["input_ids"]]
    labels = torch.from_numpy(np.concatenate([shifted(labels) for labels in columns["labels"]]))
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(list(columns["input_ids"])).astype(np.int64))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        labels=labels[None],
        label_index=(labels != IGNORE).nonzero()[:, 0],
        num_tokens=sum(lengths),
        is_filler=False,
    )


def shifted(labels: np.ndarray) -> np.ndarray:
    """Return the target of each position of one document: the label of the next position, none at the end."""
    return np.append(labels[1:], IGNORE).astype(np.int64)


def filler() -> MicroBatch:
    """Return the smallest row a model can run: two tokens, nothing to predict."""
    # Token 0 exists in every vocabulary. Two tokens, because one alone would be taken for a decoding step.
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        position_ids=torch.arange(2)[None],
        labels=torch.full((1, 2), IGNORE),
        label_index=torch.empty(0, dtype=torch.int64),
        num_tokens=0,
        is_filler=True,
    )
