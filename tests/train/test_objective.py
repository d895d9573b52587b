"""What a micro-batch adds to the loss and to the routers' gradients, data and fillers."""

from typing import Any

import pytest
import torch
from peft import get_peft_model

from goat_ds import GoatConfig
from goat_ds.data import MicroBatch, StepBatch
from goat_ds.data.batches import filler
from goat_ds.train.objective import objective
from tests.models import causal_lm

NUM_MICRO_BATCHES, NUM_REAL = 4, 3
COEF = 0.5


def model(**settings: Any) -> Any:
    config = GoatConfig(r=8, num_experts=4, balance_coef=COEF, task_type="CAUSAL_LM", **settings)
    return get_peft_model(causal_lm(), config).train()


def data() -> MicroBatch:
    ids = torch.arange(1, 9)[None]
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(8)[None],
        labels=ids.roll(-1, 1),
        label_index=torch.tensor([2, 5, 6]),
        num_tokens=8,
        is_filler=False,
    )


def step_of(*micro_batches: MicroBatch) -> StepBatch:
    return StepBatch(
        micro_batches=list(micro_batches),
        num_label_tokens=10,
        num_real_micro_batches=NUM_REAL,
        epoch=0,
        record_ids=[],
    )


def router_gradients(peft_model: Any) -> torch.Tensor:
    found = [p.grad for name, p in peft_model.named_parameters() if name.endswith(".router")]
    return torch.cat([grad.flatten() for grad in found])


def test_a_filler_runs_and_has_no_say_in_loss_or_balance() -> None:
    peft_model, batch = model(), filler()
    step = step_of(data(), batch)
    loss = objective(peft_model, peft_model.base_model, batch, step_batch=step, num_micro_batches=NUM_MICRO_BATCHES)
    loss.total.backward()
    assert loss.total.item() == 0
    assert (router_gradients(peft_model) == 0).all()


def test_data_brings_its_share_of_the_labels_and_of_the_balance() -> None:
    peft_model, batch = model(), data()
    loss = objective(
        peft_model, peft_model.base_model, batch, step_batch=step_of(batch), num_micro_batches=NUM_MICRO_BATCHES
    )
    loads = [load.balance_loss for load in peft_model.base_model.signal.loads.values()]
    share, weight = NUM_MICRO_BATCHES / 10, NUM_MICRO_BATCHES / NUM_REAL
    assert loss.total.item() == pytest.approx((loss.lm_sum * share + weight * COEF * sum(loads)).item())
    assert loss.balance.item() == pytest.approx((sum(loads) / len(loads)).item())
    loss.total.backward()
    assert (router_gradients(peft_model) != 0).any()


def test_another_method_than_goat_has_no_balance() -> None:
    plain, batch = causal_lm().train(), data()
    loss = objective(plain, None, batch, step_batch=step_of(batch), num_micro_batches=NUM_MICRO_BATCHES)
    assert loss.balance.item() == 0
    assert loss.total.item() == pytest.approx(loss.lm_sum.item() * NUM_MICRO_BATCHES / 10)
