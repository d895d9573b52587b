"""What a model loses on the labels of a micro-batch: cross-entropy, with logits only where there is a label.

Shape letters: L label positions, V vocabulary.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional

from goat_ds.data.batches import MicroBatch


def label_logits(model: Any, batch: MicroBatch) -> Tensor:
    """Give the logits ``[L, V]`` where a micro-batch has labels, in the dtype they are computed in.

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
    logits_LV: Tensor = output.logits[0]
    return logits_LV


def label_targets(batch: MicroBatch) -> Tensor:
    """Give the label tokens of a micro-batch ``[L]``."""
    return batch.labels[0, batch.label_index]


def label_loss_sum(model: Any, batch: MicroBatch) -> Tensor:
    """Give the summed cross-entropy of a micro-batch's labels, in nats; arguments as for ``label_logits``."""
    return functional.cross_entropy(label_logits(model, batch).float(), label_targets(batch), reduction="sum")
