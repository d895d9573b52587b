"""What was judged, on what, and how good it is: a table for people and JSON for programs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goat_ds.evaluate.choice_accuracy import ChoiceAccuracy
from goat_ds.evaluate.exact_match import ExactMatch
from goat_ds.evaluate.perplexity import Perplexity


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of one evaluation; a metric that was not asked for is None."""

    model: str
    """What was given as ``--model``."""
    kind: str
    """What it is: whole model, exact export, or an adapter by its method."""
    weights: str
    """Where the weights were read: the model's own, or its base."""
    base_quantization: dict[str, Any] | None
    """How the base was quantised while it loaded, as in training; None: not at all."""
    dtype: str
    data: tuple[str, ...]
    limit: int | None
    num_records: int
    """Records that were used."""
    dropped: dict[str, int]
    """Records that were read and not used, by reason."""
    perplexity: Perplexity | None = None
    exact_match: ExactMatch | None = None
    choice_accuracy: ChoiceAccuracy | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """What lm-evaluation-harness measured, by task."""

    def __str__(self) -> str:
        """Return the table, a line a number."""
        rows = list(self._rows())
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(
            [*self._head(), *(f"{name:<{width}}  {_shown(value)}  {what}".rstrip() for name, value, what in rows)]
        )

    def _head(self) -> Iterator[str]:
        base = f" on {self.weights}" if self.weights != self.model else ""
        four_bit = ", 4-bit as in training" if self.base_quantization else ""
        yield f"model: {self.model} ({self.kind}{base}{four_bit}, {self.dtype})"
        if self.data:
            dropped = "".join(f", {count:,} dropped: {reason}" for reason, count in sorted(self.dropped.items()))
            yield f"data: {', '.join(self.data)}: {self.num_records:,} records{dropped}"

    def _rows(self) -> Iterator[tuple[str, float, str]]:
        if (found := self.perplexity) is not None:
            yield "loss", found.loss, f"nats a token over {found.num_label_tokens:,} label tokens"
            truncated = f", {found.num_truncated:,} records truncated" if found.num_truncated else ""
            yield "perplexity", found.perplexity, f"its exponential{truncated}"
        if (match := self.exact_match) is not None:
            yield "exact_match", match.accuracy, f"{match.num_right:,} of {match.num_records:,}"
        if (choice := self.choice_accuracy) is not None:
            of = f"of {choice.num_records:,}, {len(choice.choices)} choices"
            yield "choice_accuracy", choice.accuracy, f"{choice.num_right:,} {of}"
            yield "choice_accuracy_per_token", choice.accuracy_per_token, f"{choice.num_right_per_token:,} {of}"
        for task, values in self.tasks.items():
            for name, value in values.items():
                yield f"{task} {name}", value, ""

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        values = dict(vars(self))
        for name in ("perplexity", "exact_match", "choice_accuracy"):
            values[name] = values[name] and values[name]._asdict()
        return values

    def write(self, path: Path) -> None:
        """Write the JSON file.

        Raises:
            FileExistsError: somebody has written it meanwhile.
        """
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(self.to_dict(), indent=2) + "\n")


def _shown(value: float) -> str:
    return f"{value:>9,}" if isinstance(value, int) else f"{value:>9.4f}"
