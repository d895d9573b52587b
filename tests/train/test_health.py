"""Numbers that have gone wrong end a run, by what is known of them; numbers that only look wrong do not."""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from goat_ds.distributed import ranks
from goat_ds.errors import TrainingError
from goat_ds.precision import Precision
from goat_ds.train.health import MOST_ZERO_NORMS, Health

SAVED = Path("runs/a/checkpoint-10")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "union_over_ranks", lambda mine: mine)


def health(precision: Precision = Precision.BF16, suspects: tuple[str, ...] = ()) -> Health:
    dataset = Dataset.from_dict({"origin": [f"a.jsonl line {line}" for line in range(1, 21)], "num_tokens": [9] * 20})
    return Health(dataset, precision=precision, suspects=suspects)


def check(watched: Health, step: int = 11, **numbers: Any) -> None:
    sound = {"loss": 1.0, "grad_norm": 1.0, "applied": True, "record_ids": [3, 0], "saved": SAVED}
    watched.check(step, **sound | numbers)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_told_with_its_step_its_records_and_the_last_checkpoint(value: float) -> None:
    rest = f"; records of step 11: a.jsonl line 4, a.jsonl line 1; the last checkpoint before it is {SAVED}"
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        with pytest.raises(TrainingError) as raised:
            check(health(), **{name: value})
        assert str(raised.value) == f"the {words} of step 11 is {value}{rest}"


def test_of_many_records_the_first_are_named_and_the_rest_counted() -> None:
    with pytest.raises(TrainingError, match=r"line 8 and 12 more; there is no checkpoint from before it$"):
        check(health(), loss=math.nan, record_ids=range(20), saved=None)


def test_a_loss_scaler_may_skip_steps_and_nothing_else_may() -> None:
    scaled = health(Precision.FP16)
    for norm in (math.inf, 0.0):
        for _ in range(2 * MOST_ZERO_NORMS):
            check(scaled, grad_norm=norm, applied=False)
    with pytest.raises(TrainingError, match="the gradient norm of step 11 is inf"):
        check(health(Precision.BF16), grad_norm=math.inf, applied=False)


def test_gradients_that_stay_zero_end_the_run_and_the_checkpoint_is_one_from_before() -> None:
    watched = health(suspects=("zero_hpz_partition_size",))
    for step in range(11, 11 + MOST_ZERO_NORMS - 1):
        check(watched, step, grad_norm=0.0, saved=SAVED if step == 11 else Path("runs/a/checkpoint-11"))
    records = "records of step 15: a.jsonl line 4, a.jsonl line 1"
    words = rf"has been 0 for 5 steps in a row, up to step 15; zero_hpz_partition_size of .*; {records}; .* {SAVED}$"
    with pytest.raises(TrainingError, match=words):
        check(watched, 15, grad_norm=0.0)


def test_a_gradient_of_zero_now_and_then_is_no_alarm() -> None:
    watched = health()
    for step in range(4 * MOST_ZERO_NORMS):
        check(watched, step, grad_norm=float(step % MOST_ZERO_NORMS == 0))
