"""The dense finish of a run: its latest batches once more, for the fit, and an engine that trains on."""

import logging
import math
from typing import Any

from goat_ds.data import Batches, label_loss_sum
from goat_ds.train.build import schedule_of
from goat_ds.train.inputs import Inputs
from goat_ds.train.metrics import Metrics
from goat_ds.zero import engine as engines
from goat_ds.zero import partition
from goat_ds.zero.dense_finish import finish_densely, tokens_to_fit

logger = logging.getLogger(__name__)


def finish(
    engine: Any,
    stream: Batches,
    step: int,
    inputs: Inputs,
    metrics: Metrics,
    *,
    num_steps: int,
) -> Any:
    """Make the experts dense after a step, and return the engine that trains them on. A collective."""
    tokens = LatestTokens(engine, stream, step, num_steps=latest_steps(engine, step, metrics.tokens))
    done = finish_densely(
        engine,
        run=tokens.run,
        counts=tokens.counts,
        engine_config=inputs.engine_config,
        schedule=schedule_of(inputs.config, num_steps=num_steps),
        rates=inputs.config.rates,
    )
    logger.info(f"dense finish after step {step}: {done}")
    metrics.record_finish(step, **done.numbers())
    return done.engine


class LatestTokens:
    """The tokens of the latest steps, to run through the model once more."""

    def __init__(self, engine: Any, stream: Batches, step: int, *, num_steps: int) -> None:
        self._engine, self._stream = engine, stream
        self._first, self._until = step - num_steps, step
        self._counts = True

    def run(self) -> None:
        """Run this rank's part of them. A collective under ZeRO-3."""
        for _, batch in self._stream.from_step(self._first, until=self._until):
            for micro_batch in batch.micro_batches:
                self._counts = not micro_batch.is_filler
                label_loss_sum(self._engine, micro_batch.to(self._engine.device))
                partition.end_without_backward(self._engine)

    def counts(self) -> bool:
        """Whether what runs now is data, and no filler."""
        return self._counts


def latest_steps(engine: Any, step: int, num_tokens: int) -> int:
    """Return how many of the ``step`` steps so far, which held ``num_tokens``, a dense finish looks back at."""
    wanted = tokens_to_fit(engines.peft_model(engine))
    return min(step, math.ceil(wanted * step / num_tokens))
