"""Packing and label-only logits change nothing; the loss of a step is the mean over its label tokens."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from goat_ds.data.batches import MicroBatch
from goat_ds.data.loss import label_loss_sum
from tests.models import CAUSAL_LMS, causal_lm, token_ids

LENGTHS = [7, 1, 11, 3]


def packed_row(documents: list[torch.Tensor]) -> MicroBatch:
    ids = torch.cat(documents)[None]
    labels = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents])[None]
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None],
        labels=labels,
        label_index=(labels[0] != -100).nonzero()[:, 0],
        num_documents=len(documents),
        num_tokens=ids.numel(),
        is_filler=False,
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_packed_logits_equal_unpacked_ones(name: str, attention: str) -> None:
    model: Any = causal_lm(name).eval()
    model.set_attn_implementation(attention)
    documents = [token_ids(length, seed=length) for length in LENGTHS]
    row = packed_row(documents)
    with torch.no_grad():
        packed = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_logits_at_labels_only_give_the_same_loss(name: str) -> None:
    model: Any = causal_lm(name).eval()
    row = packed_row([token_ids(length, seed=length) for length in LENGTHS])
    with torch.no_grad():
        logits = model(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False).logits
        expected = functional.cross_entropy(logits[0].float(), row.labels[0], ignore_index=-100, reduction="sum")
        torch.testing.assert_close(label_loss_sum(model, row), expected)


def test_a_row_without_labels_has_no_loss_and_no_gradient() -> None:
    model: Any = causal_lm()
    row = packed_row([token_ids(1)])
    loss = label_loss_sum(model, row)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
