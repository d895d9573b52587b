"""What a model loses on the labels of a micro-batch: cross-entropy, with logits only where there is a label.

With a large vocabulary the logits are the largest tensor of a step. So they stay in the dtype that the model gives them
in, a few rows at a time are computed with in fp32, and backward writes their gradient over them.

Shape letters: L label positions, C label positions of a chunk, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from goat_ds.data.batches import MicroBatch
from goat_ds.tuner.model import IGNORE

CHUNK_VALUES = 2**22
"""Logits that are computed with at once: 16 MiB in fp32."""


def label_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Return the logits ``[L, V]`` where a micro-batch has labels, in the dtype they are computed in.

    Args:
        model: Whatever is called as a causal language model of transformers is.
        batch: On the model's device.
    """
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.label_index,
        use_cache=False,
    )
    # Indexing would copy the whole gradient in backward.
    logits_LV: Tensor = output.logits.squeeze(0)
    return logits_LV


def label_targets(batch: MicroBatch) -> Tensor:
    """Return the label tokens of a micro-batch ``[L]``."""
    return batch.labels[0, batch.label_index]


def label_loss_sum(model: Any, batch: MicroBatch) -> Tensor:
    """Return the summed cross-entropy of a micro-batch's labels, in nats; arguments as for ``label_logits``."""
    return cross_entropy_sum(label_logits(model, batch), label_targets(batch))


def cross_entropy_sum(logits_LV: Tensor, targets_L: Tensor) -> Tensor:
    """Return the summed cross-entropy in nats, in fp32 or better. Backward writes over the logits.

    Args:
        logits_LV: In any float dtype; nothing may need their values after backward has begun.
        targets_L: A token for each, or ``IGNORE``; there may be none.
    """
    loss: Tensor = _CrossEntropySum.apply(logits_LV, targets_L)
    return loss


def in_chunks(logits_LV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split logits, and what else has a row for each of theirs, into views of few enough rows to compute with in fp32.

    At least one chunk is given, though there may be no row.
    """
    num_rows = max(1, CHUNK_VALUES // logits_LV.shape[-1])
    return zip(*(tensor.split(num_rows) for tensor in (logits_LV, *others)), strict=True)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_LV: Tensor, targets_L: Tensor) -> Tensor:
        ctx.save_for_backward(logits_LV, targets_L)
        dtype = _wide(logits_LV)
        sums = [
            functional.cross_entropy(logits_CV.to(dtype), targets_C, ignore_index=IGNORE, reduction="sum")
            for logits_CV, targets_C in in_chunks(logits_LV, targets_L)
        ]
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits_LV, targets_L = ctx.saved_tensors
        # A second backward, or an operator before this one that has kept the logits, is refused by autograd: it counts
        # what is written in place.
        gradient_LV = logits_LV.detach()
        for gradient_CV, targets_C in in_chunks(gradient_LV, targets_L):
            error_CV = gradient_CV.softmax(dim=-1, dtype=_wide(logits_LV))
            error_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C.clamp_min(0)] -= 1
            # Scaled before it is rounded: a loss scale keeps small values from becoming 0 in fp16.
            gradient_CV.copy_(error_CV.mul_(grad * (targets_C != IGNORE)[:, None]))
        return gradient_LV, None


def _wide(logits_LV: Tensor) -> torch.dtype:
    return torch.promote_types(logits_LV.dtype, torch.float32)
