"""The loss of a micro-batch: cross-entropy where there is a label, and the balance of the routers.

The loss of a step is the mean over the label tokens of the whole global batch, whatever their spread over ranks and
micro-batches. DeepSpeed averages gradients over ranks and micro-batches, so each micro-batch's sum is divided by
the global number of label tokens and multiplied by the number of micro-batches.

Shape letters: L label positions, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from goat_ds.data import MicroBatch


class StepLoss(NamedTuple):
    """What one micro-batch contributes.

    ``total`` is what backward starts from. ``lm_sum`` is the summed cross-entropy of its labels, ``balance`` the mean
    ``L_b`` over the routed layers (1 when balanced), both detached.
    """

    total: Tensor
    lm_sum: Tensor
    balance: Tensor


def label_loss_sum(model: Any, batch: MicroBatch) -> Tensor:
    """Give the summed cross-entropy of a micro-batch's labels; logits exist only where there is a label."""
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.label_index,
        use_cache=False,
    )
    logits_LV = output.logits[0].float()
    return functional.cross_entropy(logits_LV, batch.labels[0, batch.label_index], reduction="sum")


def objective(engine: Any, tuner: Any, batch: MicroBatch, *, num_label_tokens: int, num_micro_batches: int) -> StepLoss:
    """Run one micro-batch forward.

    Args:
        engine: The DeepSpeed engine.
        tuner: The ``GoatModel`` inside it.
        batch: This rank's micro-batch, on the engine's device.
        num_label_tokens: Label tokens of the whole global batch.
        num_micro_batches: Micro-batches of the whole global batch, over all ranks.
    """
    lm_sum = label_loss_sum(engine, batch)
    loads = list(tuner.signal.loads.values())
    balance = torch.stack([load.balance_loss for load in loads]).mean() if loads else lm_sum.new_zeros(())
    total = lm_sum * (num_micro_batches / num_label_tokens)
    # A filler keeps the ranks in step and has no say in how tokens are routed.
    total = tuner.with_balance_loss(total, weight=0.0 if batch.is_filler else 1.0)
    return StepLoss(total, lm_sum.detach(), balance)
