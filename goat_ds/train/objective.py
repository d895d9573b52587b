"""The loss of a micro-batch: cross-entropy where there is a label, and the balance of the routers.

The loss of a step is the mean over the label tokens of the whole global batch, whatever their spread over ranks and
micro-batches. DeepSpeed averages gradients over ranks and micro-batches, so each micro-batch's sum is divided by
the global number of label tokens and multiplied by the number of micro-batches. The balance loss of a step is the mean
over the micro-batches that hold data; fillers, which only keep the ranks in step, have no say in it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from goat_ds.data import MicroBatch, StepBatch, label_loss_sum
from goat_ds.tuner.model import GoatModel


class StepLoss(NamedTuple):
    """What one micro-batch contributes.

    ``total`` is what backward starts from. ``lm_sum`` is the summed cross-entropy of its labels, ``balance`` the mean
    ``L_b`` over the routed layers (1 when balanced), both detached.
    """

    total: Tensor
    lm_sum: Tensor
    balance: Tensor


def objective(
    engine: Any, tuner: GoatModel | None, micro_batch: MicroBatch, *, step_batch: StepBatch, num_micro_batches: int
) -> StepLoss:
    """Run one micro-batch forward.

    Args:
        engine: The DeepSpeed engine.
        tuner: The ``GoatModel`` inside it; None where another method is trained, which has no balance.
        micro_batch: One of this rank's, on the engine's device.
        step_batch: The step it belongs to.
        num_micro_batches: Micro-batches of a step over all ranks, fillers included.
    """
    lm_sum = label_loss_sum(engine, micro_batch)
    loads = list(tuner.signal.loads.values()) if tuner else []
    balance = torch.stack([load.balance_loss for load in loads]).mean() if loads else lm_sum.new_zeros(())
    total = lm_sum * (num_micro_batches / step_batch.num_label_tokens)
    if tuner is None:
        return StepLoss(total, lm_sum.detach(), balance)
    weight = 0.0 if micro_batch.is_filler else num_micro_batches / step_batch.num_real_micro_batches
    total = tuner.with_balance_loss(total, weight=weight)
    return StepLoss(total, lm_sum.detach(), balance)
