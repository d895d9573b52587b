"""What the loop computes beside its steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from goat_ds.train import loop
from goat_ds.train.data import Tokens


class Rows:
    """A micro-batch that knows the sum of its losses."""

    def __init__(self, loss_sum: float) -> None:
        self.loss_sum = loss_sum

    def to(self, device: str) -> "Rows":
        """Stay where it is."""
        return self


def test_the_held_out_loss_is_a_mean_over_label_tokens_and_not_over_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "eval_batches", lambda *_, **__: [Rows(2.0), Rows(9.0)])
    monkeypatch.setattr(loop, "label_loss_sum", lambda engine, rows: torch.tensor(rows.loss_sum))
    monkeypatch.setattr(loop.partition, "end_without_backward", lambda engine: None)
    engine = SimpleNamespace(device="cpu", eval=lambda: None, train=lambda: None)
    packed: Any = SimpleNamespace(packs=[[0], [1]], num_labels=[1, 9])
    dataset: Any = None
    assert loop.evaluate(engine, Tokens(dataset, packed), 1) == pytest.approx(11 / 10)
