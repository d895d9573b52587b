"""Stop a run whose numbers have gone wrong, and say since when, at which records, and what was saved before."""

import math
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from goat_ds.distributed import ranks
from goat_ds.errors import TrainingError
from goat_ds.precision import Precision

MOST_ZERO_NORMS = 5
"""Steps in a row with a gradient of exactly 0 that end a run: one may have nothing to learn, so many have lost it."""
MOST_RECORDS = 8
"""Records that a message names; of more it gives the number."""


class Health:
    """Looks at the loss and the gradient norm of every step, which all ranks see alike."""

    def __init__(self, dataset: Dataset, *, precision: Precision, suspects: Sequence[str]) -> None:
        """Take what messages are made of.

        Args:
            dataset: The tokenised training data.
            precision: Of the run.
            suspects: Switches of the ds_config that are on and known to have lost gradients.
        """
        self._dataset, self._precision, self._suspects = dataset, precision, suspects
        self._num_zero = 0
        self._saved_before_zero: Path | None = None

    def check(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        applied: bool,
        record_ids: Sequence[int],
        saved: Path | None,
    ) -> None:
        """Stop before weights that are no numbers, or that no longer learn, can be saved.

        A collective where it stops.

        Args:
            step: Counted from 1.
            loss: Of the step, over all ranks.
            grad_norm: Likewise.
            applied: Whether the optimizer has taken the step.
            record_ids: Rows of the data set that this rank has seen in it.
            saved: The last checkpoint before it.

        Raises:
            TrainingError: the loss is not finite, or the gradient is not and no loss scaler has skipped the step, or
                the gradient has been 0 for ``MOST_ZERO_NORMS`` steps.
        """
        skipped = self._precision is Precision.FP16 and not applied
        wrong = [f"the loss of step {step} is {loss}"] if not math.isfinite(loss) else []
        if not skipped and not math.isfinite(grad_norm):
            wrong.append(f"the gradient norm of step {step} is {grad_norm}")
        if wrong:
            raise TrainingError(f"{' and '.join(wrong)}; {self._records(step, record_ids)}; {last_checkpoint(saved)}")
        if not skipped:
            self._count_zero(step, grad_norm, record_ids, saved)

    def _count_zero(self, step: int, grad_norm: float, record_ids: Sequence[int], saved: Path | None) -> None:
        if grad_norm != 0:
            self._num_zero = 0
            return
        if not self._num_zero:
            self._saved_before_zero = saved
        self._num_zero += 1
        if self._num_zero == MOST_ZERO_NORMS:
            known = (
                f"; {', '.join(self._suspects)} of the ds_config can cause it, try without" if self._suspects else ""
            )
            raise TrainingError(
                f"the gradient norm has been 0 for {MOST_ZERO_NORMS} steps in a row, up to step {step}{known}; "
                f"{self._records(step, record_ids)}; {last_checkpoint(self._saved_before_zero)}"
            )

    def _records(self, step: int, record_ids: Sequence[int]) -> str:
        """Name the records of a step. A collective."""
        by_rank = ranks.union_over_ranks({str(ranks.get_rank()): list(record_ids)})
        rows = [row for mine in by_rank.values() for row in mine]
        named = self._dataset.select_columns("origin")[rows[:MOST_RECORDS]]["origin"]
        more = len(rows) - len(named)
        return f"records of step {step}: {', '.join(named)}" + (f" and {more} more" if more else "")


def last_checkpoint(saved: Path | None) -> str:
    """Return which checkpoint a run that stops can go on from."""
    return f"the last checkpoint before it is {saved}" if saved else "there is no checkpoint from before it"
